"""The gradient estimate, compared with a sum over dense members, and its expectation."""

from __future__ import annotations

import pytest
import torch
from populations import population_of
from torch import Tensor, nn

from es_flipout.perturbations import Family, Flipout
from es_flipout.policies.networks import MLP
from es_flipout.strategy.estimator import estimate_gradient
from es_flipout.strategy.population import Population

CPU = torch.device("cpu")


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("sigma", [0.01, 0.5])
def test_equals_the_sum_over_members(family: Family, sigma: float, antithetic: bool) -> None:
    """g = 1 / (P sigma) * sum of u_n (W_n - W) / sigma, with the dense weights of every member."""
    size = 18
    module = MLP(3, 2, hidden=(4,)).double()
    population = population_of(module, family, size, sigma=sigma, antithetic=antithetic)
    u = torch.randn(size, dtype=torch.float64)
    expected = {name: torch.zeros_like(mean) for name, mean in module.named_parameters()}
    for n in range(size):
        own = dict(population.member(n).named_parameters())
        for name, mean in module.named_parameters():
            expected[name] += u[n] * (own[name] - mean).detach() / sigma / (size * sigma)
    gradient = estimate_gradient(population, u)
    assert gradient.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(gradient[name], value, rtol=1e-9, atol=1e-9)


def test_float32_weights_and_names_without_bias(family: Family) -> None:
    module = nn.Linear(3, 2, bias=False)
    population = population_of(module, family, 10, sigma=0.1)
    u = torch.randn(10, dtype=torch.float64)
    gradient = estimate_gradient(population, u)
    assert list(gradient) == ["weight"]
    assert gradient["weight"].dtype == torch.float32
    noise = torch.stack([(population.member(n).get_parameter("weight") - module.weight) / 0.1 for n in range(10)])
    expected = torch.einsum("n,noi->oi", u.float(), noise.detach()) / (10 * 0.1)
    torch.testing.assert_close(gradient["weight"], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("antithetic", [True, False])
def test_zero_weights_give_exactly_zero(family: Family, antithetic: bool) -> None:
    population = population_of(MLP(3, 2, hidden=(4,)), family, 12, sigma=0.1, antithetic=antithetic)
    assert all(not value.any() for value in estimate_gradient(population, torch.zeros(12)).values())


def test_equal_weights_cancel_between_antithetic_partners(family: Family) -> None:
    population = population_of(MLP(3, 2, hidden=(4,)), family, 12, sigma=0.1)
    assert all(not value.any() for value in estimate_gradient(population, torch.full((12,), 0.37)).values())


def probed(population: Population) -> Tensor:
    """Reconstruct weights and biases of all members of a linear layer, ``(P, out * in + out)``, from outputs."""
    inputs = torch.cat([torch.eye(3), torch.zeros(1, 3)]).double()
    y = population(inputs.expand(population.size, 4, 3))
    bias = y[:, 3]
    weight = (y[:, :3] - bias[:, None]).transpose(1, 2)
    return torch.cat([weight.flatten(1), bias], dim=1)


@pytest.mark.parametrize("objective", ["linear", "quadratic"])
def test_expectation_is_the_true_gradient(family: Family, objective: str) -> None:
    """Averaged over many generations; the measured standard error must be small for the test to be meaningful."""
    check_expectation(family, objective, antithetic=True)


def test_expectation_is_the_true_gradient_without_antithetic_pairs() -> None:
    check_expectation(Flipout(), "linear", antithetic=False)


def check_expectation(family: Family, objective: str, antithetic: bool) -> None:
    size, generations = 64, 100
    module = nn.Linear(3, 2).double()
    mean = torch.cat([module.weight.flatten(), module.bias]).detach()
    other = torch.randn(8, dtype=torch.float64)
    true = other if objective == "linear" else -2 * (mean - other)
    estimates = []
    for generation in range(generations):
        population = population_of(module, family, size, seed=7, generation=generation, antithetic=antithetic)
        theta = probed(population)
        fitness = theta @ other if objective == "linear" else -(theta - other).square().sum(1)
        gradient = estimate_gradient(population, fitness)
        estimates.append(torch.cat([gradient["weight"].flatten(), gradient["bias"]]))
    drawn = torch.stack(estimates)
    along = drawn @ true / true.square().sum()
    along_error = along.std() / generations**0.5
    assert along_error < 0.1
    assert (along.mean() - 1).abs() < 4 * along_error, "wrong scale"
    error = drawn.std(0) / generations**0.5
    assert error.max() < 0.2 * true.norm()
    assert ((drawn.mean(0) - true) / error).abs().max() < 4.5, "wrong direction"


def test_one_gaussian_base_has_an_error_floor_and_signs_have_none() -> None:
    """The relative squared error with M Gaussian bases does not fall below 2 / M."""

    def error(family: Family) -> float:
        target = torch.randn(10, 10, dtype=torch.float64)
        module = nn.Linear(10, 10, bias=False).double()
        total = 0.0
        for generation in range(3):
            population = population_of(module, family, 8000, sigma=1.0, seed=7, generation=generation, antithetic=False)
            fitness = torch.einsum("noi,oi->n", signed_noise(population), target)
            total += float((estimate_gradient(population, fitness)["weight"] - target).square().sum())
        return total / 3 / float(target.square().sum())

    assert error(Flipout()) < 0.02
    assert 1.2 < error(Flipout(base="gaussian")) < 3.0
    assert 0.15 < error(Flipout(base="gaussian", bases=8)) < 0.4


def signed_noise(population: Population) -> Tensor:
    """Return the weight noise of all members of a single layer, ``(P, out, in)``, from outputs for unit vectors."""
    size = population._module.get_parameter("weight").shape[1]
    y = population(torch.eye(size).double().expand(population.size, size, size))
    return y.transpose(1, 2) - population._module.get_parameter("weight").detach()
