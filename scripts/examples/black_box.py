"""Minimize a black-box function: Rastrigin's, which has a local minimum at every unit step.

python scripts/examples/black_box.py

The strategy evolves a bare ``nn.Parameter``. Adam on the exact gradient, from the same start, ends in the nearest local minimum.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from es_flipout import EvolutionStrategy


class Point(nn.Module):
    """A point, and the value of Rastrigin's function there; the minimum is 0 at ``center``."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.point = nn.Parameter(start.clone())

    def forward(self, center: Tensor) -> Tensor:
        """``(size,)`` to a number."""
        z = self.point - center
        return (z.square() - 10 * torch.cos(2 * math.pi * z) + 10).sum(-1)


def main(generations: int = 600, size: int = 20, population_size: int = 256) -> tuple[float, float]:
    """Minimize by gradient and by evolution; returns both minima found."""
    torch.manual_seed(0)
    center, start = torch.rand(size) * 2 - 1, 4 * torch.rand(size) + 1
    by_gradient = Point(start)
    print(f"start: {by_gradient(center).item():.2f}")
    optimizer = torch.optim.Adam(by_gradient.parameters(), 0.05)
    for _ in range(generations):
        optimizer.zero_grad()
        by_gradient(center).backward()
        optimizer.step()
    strategy = EvolutionStrategy(Point(start), population_size, sigma=1.0, learning_rate=0.1)
    for generation in range(generations):
        # Wide perturbations see the bowl and not the ripples; later ones search ever closer.
        strategy.sigma = 0.01 ** (generation / generations)
        strategy.learning_rate = 0.1 * strategy.sigma
        population = strategy.ask()
        strategy.tell(-population(center.expand(population_size, -1)))
    found = strategy.mean_module()(center).item(), by_gradient(center).item()
    print(f"evolution strategy, {generations} generations of {population_size}: {found[0]:.4f}")
    print(f"Adam on the exact gradient, {generations} steps: {found[1]:.4f}")
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)  # small products: more threads only wait for each other
    main()
