"""The evolution-strategies gradient: from shaped fitness to a gradient with respect to the mean weights."""

from __future__ import annotations

from torch import Tensor

from es_flipout.strategy.population import Population


def estimate_gradient(population: Population, weights: Tensor) -> dict[str, Tensor]:
    """Compute 1 / (P sigma) * sum_n weights_n * perturbation_n without materializing a member.

    This is an estimate of the gradient of the expected (shaped) fitness with respect to the mean weights: Flipout paper
    (Wen et al. 2018), equation 5, summed layer by layer as B * (R^T diag(u) S).

    Args:
        population: the members that were evaluated.
        weights: ``(P,)``, such as centered ranks; higher is better.

    Returns:
        The gradient of every parameter, by its name in the module.
    """
    scale = 1 / (population.size * population.sigma)
    return {name: total * scale for name, total in population.weighted_sum(weights).items()}
