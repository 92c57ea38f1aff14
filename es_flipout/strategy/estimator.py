"""The evolution-strategies gradient: from shaped fitness to a gradient with respect to the mean weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from es_flipout.strategy.population import Population

WeightedSum = Callable[[Population, Tensor], Mapping[str, Tensor]]


def estimate_gradient(
    population: Population, weights: Tensor, weighted_sum: WeightedSum = Population.weighted_sum
) -> dict[str, Tensor]:
    """Compute 1 / (P sigma) * sum_n weights_n * perturbation_n without materializing a member.

    This is an estimate of the gradient of the expected (shaped) fitness with respect to the mean weights: Flipout paper
    (Wen et al. 2018), equation 5, summed layer by layer as B * (R^T diag(u) S).

    Args:
        population: the members that were evaluated.
        weights: ``(P,)``, such as centered ranks; higher is better.
        weighted_sum: computes what :meth:`Population.weighted_sum` does, for example in other processes.

    Returns:
        The gradient of every parameter, by its name in the module.
    """
    scale = 1 / (population.size * population.sigma)
    return {name: total * scale for name, total in weighted_sum(population, weights).items()}
