"""Train a classifier on its accuracy itself, which has no gradient.

python scripts/examples/accuracy.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from es_flipout import EvolutionStrategy


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images ``(N, 64)`` and labels ``(N,)`` for training, then for testing."""
    bundled = load_digits()
    x = torch.tensor(bundled.data, dtype=torch.float32) / 6 - 0.8  # type: ignore[attr-defined]
    y = torch.tensor(bundled.target)  # type: ignore[attr-defined]
    return x[:1400], y[:1400], x[1400:], y[1400:]


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """Fraction of correct answers: ``(..., N, classes)`` to ``(...,)``."""
    return (logits.argmax(-1) == y).float().mean(-1)


def main(generations: int = 200, population_size: int = 1024) -> float:
    """Train on mini-batches; returns the accuracy on the test images."""
    torch.manual_seed(0)
    x, y, test_x, test_y = digits()
    network = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    strategy = EvolutionStrategy(network, population_size, sigma=0.1, learning_rate=0.03)
    print(f"untrained: {float(accuracy(network(test_x), test_y)):.1%} of the test images correct")
    for generation in range(1, generations + 1):
        batch = torch.randint(len(x), (128,))
        population = strategy.ask()
        strategy.tell(accuracy(population(x[batch].expand(population_size, -1, -1)), y[batch]))
        if generation % max(generations // 5, 1) == 0:
            score = float(accuracy(strategy.mean_module()(test_x), test_y))
            print(f"generation {generation}: {score:.1%} of the test images correct")
    return float(accuracy(strategy.mean_module()(test_x), test_y))


if __name__ == "__main__":
    torch.set_num_threads(1)  # small products: more threads only wait for each other
    main()
