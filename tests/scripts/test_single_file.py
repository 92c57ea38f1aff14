"""``scripts/examples/single_file.py`` learns, and its numbers are those of the engine."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from es_flipout import EvolutionStrategy
from es_flipout.perturbations import Flipout
from es_flipout.perturbations.flipout import FlipoutPerturbation
from es_flipout.perturbations.independent import Independent
from es_flipout.policies.networks import MLP
from es_flipout.strategy.estimator import estimate_gradient
from es_flipout.strategy.population import Population
from es_flipout.strategy.shaping import centered_ranks
from scripts.examples import single_file
from scripts.examples.single_file import Layer, Noise

MEMBERS, SIGMA, RATE = 64, 0.1, 0.05


@pytest.fixture
def strategy() -> EvolutionStrategy:
    network = MLP(4, 2, (16, 8), "tanh")
    family = Flipout(base="rademacher", bases=1)
    return EvolutionStrategy(network, MEMBERS, SIGMA, family, learning_rate=RATE, optimizer="adam", kernels="torch")


def layers_of(module: nn.Module) -> list[Layer]:
    linears = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    return [Layer(layer.weight.detach().clone(), layer.bias.detach().clone()) for layer in linears]


def noise_of(population: Population, module: nn.Module) -> list[Noise]:
    """The engine's signs, bases and bias noise."""
    noise = []
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            weight, bias = (population.perturbations[f"{name}.{kind}"] for kind in ("weight", "bias"))
            assert isinstance(weight, FlipoutPerturbation)
            assert isinstance(bias, Independent)
            assert isinstance(weight.r, torch.Tensor)
            assert isinstance(weight.s, torch.Tensor)
            r, s = single_file.antithetic(weight.r.float()), single_file.antithetic(weight.s.float(), sign=1)
            noise.append(Noise(weight.base[0], r, s, single_file.antithetic(bias.stored)))
    return noise


def test_forward_of_all_members(strategy: EvolutionStrategy) -> None:
    population, module = strategy.ask(), strategy.mean_module()
    layers, noise, x = layers_of(module), noise_of(population, module), torch.randn(MEMBERS, 4)
    torch.testing.assert_close(
        single_file.population_forward(layers, noise, SIGMA, x), population(x), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(single_file.forward(layers, x), module(x).detach(), rtol=1e-6, atol=1e-6)


def test_ranks() -> None:
    returns = torch.tensor([3.0, 1.0, 3.0, 2.0, 3.0, 0.0])
    torch.testing.assert_close(single_file.centered_ranks(returns), centered_ranks(returns), rtol=0, atol=1e-7)


def test_gradient_and_update(strategy: EvolutionStrategy) -> None:
    population, module = strategy.ask(), strategy.mean_module()
    returns = torch.randint(20, (MEMBERS,)).float()  # with ties
    utilities = single_file.centered_ranks(returns)
    estimate = single_file.gradient(noise_of(population, module), utilities, SIGMA)
    own = [tensor for layer in estimate for tensor in layer]
    engine = estimate_gradient(population, utilities)
    for (name, _), tensor in zip(module.named_parameters(), own, strict=True):
        torch.testing.assert_close(tensor, engine[name], rtol=1e-5, atol=1e-6)

    parameters = [tensor for layer in layers_of(module) for tensor in layer]
    optimizer = torch.optim.Adam(parameters, lr=RATE, maximize=True)
    for parameter, tensor in zip(parameters, own, strict=True):
        parameter.grad = tensor
    optimizer.step()
    strategy.tell(returns)
    for parameter, updated in zip(parameters, strategy.mean_module().parameters(), strict=True):
        torch.testing.assert_close(parameter, updated.detach(), rtol=1e-5, atol=1e-6)


def test_partners_are_opposite_and_members_differ() -> None:
    (noise,) = single_file.draw([Layer(torch.zeros(3, 5), torch.zeros(3))], pairs=10)
    perturbations = noise.base * noise.r[:, :, None] * noise.s[:, None]
    assert torch.equal(perturbations[0::2], -perturbations[1::2])
    assert torch.equal(noise.bias[0::2], -noise.bias[1::2])
    assert len(perturbations.unique(dim=0)) == 20
    assert set(noise.base.unique().tolist()) == {-1.0, 1.0}


def test_plays_one_episode_each(capsys: pytest.CaptureFixture[str]) -> None:
    score = single_file.main(generations=2, pairs=4)
    assert 8 <= score <= 500
    assert "generation 2: " in capsys.readouterr().out


@pytest.mark.slow
def test_learns_cartpole() -> None:
    assert single_file.main() >= 475
