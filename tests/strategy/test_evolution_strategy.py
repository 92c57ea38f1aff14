"""Ask and tell: invariants, invalid arguments, exact resumption, and learning."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from es_flipout.errors import UserError
from es_flipout.layers import UnsupportedLayerError
from es_flipout.perturbations import Dense, Family, Flipout, LowRank
from es_flipout.policies.networks import MLP
from es_flipout.strategy.evolution_strategy import EvolutionStrategy

Optimizer = Literal["adam", "sgd", "clipup"]
OPTIMIZERS: tuple[Optimizer, ...] = ("adam", "sgd", "clipup")
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


class Scaled(nn.Module):
    """A class defined by the user."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4)
        self.outer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.outer(self.inner(x).tanh())


def same(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def play(strategy: EvolutionStrategy, generations: int) -> None:
    """Run some generations with returns that depend on the members."""
    x = torch.linspace(-1, 1, 3)
    for _ in range(generations):
        population = strategy.ask()
        strategy.tell(population(x.expand(len(population), 3)).sum(1))


def test_asking_twice_gives_the_same_population(family: Family) -> None:
    strategy = EvolutionStrategy(Scaled(), 8, 0.1, family)
    x = torch.randn(8, 3)
    one, other = strategy.ask(), strategy.ask()
    assert torch.equal(one(x), other(x))
    assert same(one.member(5), other.member(5))


def test_generations_have_members_of_their_own() -> None:
    strategy = EvolutionStrategy(Scaled(), 8, 0.1)
    x = torch.randn(8, 3)
    before = strategy.ask()(x)
    strategy.tell(torch.zeros(8))  # does not move the mean
    assert not torch.isclose(strategy.ask()(x), before).any()


def test_population_is_unaffected_by_a_later_tell(family: Family) -> None:
    strategy = EvolutionStrategy(Scaled(), 8, 0.1, family)
    x = torch.randn(8, 3)
    population = strategy.ask()
    y, member = population(x), population.member(3)
    strategy.tell(torch.arange(8.0))
    assert torch.equal(population(x), y)
    assert same(population.member(3), member)
    assert not same(strategy.mean_module(), Scaled())


def test_tell_needs_an_ask() -> None:
    strategy = EvolutionStrategy(Scaled(), 8, 0.1)
    with pytest.raises(RuntimeError, match="ask"):
        strategy.tell(torch.zeros(8))
    strategy.ask()
    strategy.tell(torch.zeros(8))
    with pytest.raises(RuntimeError, match="ask"):
        strategy.tell(torch.zeros(8))
    assert strategy.generation == 1


@pytest.mark.parametrize("shape", [(), (7,), (8, 1), (9,)])
def test_returns_of_wrong_shape_change_nothing(shape: tuple[int, ...]) -> None:
    strategy = EvolutionStrategy(Scaled(), 8, 0.1)
    before = strategy.mean_module()
    strategy.ask()
    with pytest.raises(ValueError, match=r"\(8,\)"):
        strategy.tell(torch.zeros(shape))
    assert strategy.generation == 0
    assert same(strategy.mean_module(), before)
    strategy.tell(torch.arange(8.0))
    assert strategy.generation == 1


@pytest.mark.parametrize("kind", [lambda values: values, np.array, torch.tensor])
def test_returns_may_be_any_sequence(kind: Callable[[list[float]], Any]) -> None:
    strategies = [EvolutionStrategy(nn.Linear(2, 1), 4, 0.1) for _ in range(2)]
    strategies[1].load_state_dict(copy.deepcopy(strategies[0].state_dict()))
    for strategy, returns in zip(strategies, (torch.tensor([1.0, 3.0, 2.0, 0.0]), kind([1, 3, 2, 0])), strict=True):
        strategy.ask()
        strategy.tell(returns)
    assert same(strategies[0].mean_module(), strategies[1].mean_module())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"population_size": 7}, "even.*got 7"),
        ({"population_size": 0}, "even.*got 0"),
        ({"population_size": 1, "antithetic": False}, "at least 2.*got 1"),
        ({"sigma": 0.0}, "sigma.*got 0"),
        ({"sigma": -0.1}, "sigma.*got -0.1"),
        ({"sigma": float("nan")}, "sigma.*got nan"),
        ({"learning_rate": 0.0}, "learning rate.*got 0"),
        ({"learning_rate": -1.0}, "learning rate.*got -1"),
    ],
    ids=str,
)
def test_arguments_out_of_range(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EvolutionStrategy(Scaled(), **{"population_size": 8, "sigma": 0.1} | wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"row_block": 0}, "row"),
        ({"momentum": 1.5, "optimizer": "clipup"}, "momentum"),
        ({"perturbation": "flipoff"}, "perturbation"),
        ({"optimizer": "lion"}, "optimizer"),
    ],
    ids=["negative-seed", "large-seed", "row-block", "momentum", "perturbation", "optimizer"],
)
def test_other_arguments_out_of_range(wrong: dict[str, Any], message: str) -> None:
    """The UserError is raised by the constructor, not by the first ask."""
    with pytest.raises(UserError, match=message):
        EvolutionStrategy(Scaled(), 8, 0.1, **wrong)


def test_odd_population_without_antithetic_pairs() -> None:
    strategy = EvolutionStrategy(Scaled(), 7, 0.1, antithetic=False)
    before = strategy.mean_module()
    play(strategy, 1)
    assert not same(strategy.mean_module(), before)


def test_unsupported_leaf_is_named() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    with pytest.raises(UnsupportedLayerError, match=r"'1'.*BatchNorm1d") as caught:
        EvolutionStrategy(module, 8, 0.1)
    assert isinstance(caught.value, UserError)


class Point(nn.Module):
    """A bare parameter, the argument of a black-box function."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.full((2,), 3.0))

    def forward(self) -> Tensor:
        return self.position


def test_a_bare_parameter_finds_the_minimum() -> None:
    strategy = EvolutionStrategy(Point(), 20, 0.1, learning_rate=0.2)
    for _ in range(100):
        strategy.tell(-strategy.ask()().square().sum(1))
    mean = strategy.mean_module()
    assert isinstance(mean, Point)
    assert mean.position.norm() < 0.2


@pytest.mark.parametrize("module", [nn.Tanh(), nn.Sequential()])
def test_nothing_to_evolve(module: nn.Module) -> None:
    with pytest.raises(UserError, match="no parameters"):
        EvolutionStrategy(module, 8, 0.1)


@every_optimizer
def test_users_module_is_unchanged(optimizer: Optimizer) -> None:
    module = Scaled()
    before = copy.deepcopy(module)
    strategy = EvolutionStrategy(module, 8, 0.1, optimizer=optimizer)
    play(strategy, 3)
    assert same(module, before)
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not same(strategy.mean_module(), before)


def test_mean_module_is_a_copy_of_the_users_class() -> None:
    strategy = EvolutionStrategy(Scaled(), 8, 0.1)
    play(strategy, 1)
    mean = strategy.mean_module()
    assert type(mean) is Scaled
    assert all(parameter.grad is None for parameter in mean.parameters())
    with torch.no_grad():
        for parameter in mean.parameters():
            parameter.zero_()
    assert not same(strategy.mean_module(), mean)


@pytest.mark.parametrize("value", [0.0, -3.5, torch.nan, torch.inf])
@every_optimizer
def test_equal_returns_change_no_bit(family: Family, optimizer: Optimizer, value: float) -> None:
    strategy = EvolutionStrategy(Scaled(), 8, 0.1, family, optimizer=optimizer)
    before = strategy.mean_module()
    for generation in range(2):
        strategy.ask()
        strategy.tell(torch.full((8,), value))
        assert strategy.generation == generation + 1
    after = strategy.mean_module()
    for one, other in zip(before.parameters(), after.parameters(), strict=True):
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))


def test_nan_is_as_bad_as_the_worst() -> None:
    def moved(returns: list[float]) -> nn.Module:
        torch.manual_seed(0)
        strategy = EvolutionStrategy(Scaled(), 6, 0.1)
        strategy.ask()
        strategy.tell(torch.tensor(returns))
        return strategy.mean_module()

    nan = float("nan")
    assert same(moved([1, nan, 3, 4, nan, 2]), moved([1, -1e30, 3, 4, -1e30, 2]))
    assert all(parameter.isfinite().all() for parameter in moved([nan, 1, nan, nan, nan, nan]).parameters())


def test_weight_decay_shrinks_weights_and_leaves_biases() -> None:
    module = Scaled()
    strategy = EvolutionStrategy(module, 8, 0.1, learning_rate=0.5, weight_decay=0.1)
    strategy.ask()
    strategy.tell(torch.zeros(8))
    mean = strategy.mean_module()
    for name, before in module.named_parameters():
        expected = before * (1 - 0.5 * 0.1) if name.endswith("weight") else before
        torch.testing.assert_close(mean.get_parameter(name), expected)


def test_tell_is_one_optimizer_step_along_the_estimate() -> None:
    """Compared with ranks and dense members, with plain SGD."""
    module = Scaled().double()
    strategy = EvolutionStrategy(module, 6, 0.2, Dense(), learning_rate=0.3, optimizer="sgd", momentum=0.0, seed=4)
    population = strategy.ask()
    members = [dict(population.member(n).named_parameters()) for n in range(6)]
    strategy.tell(torch.tensor([5.0, 1.0, 3.0, 1.0, 9.0, -2.0]))
    ranks = torch.tensor([4.0, 1.5, 3.0, 1.5, 5.0, 0.0]) / 5 - 0.5
    mean = strategy.mean_module()
    for name, before in module.named_parameters():
        expected = before.detach().clone()
        for n in range(6):
            expected += 0.3 * float(ranks[n]) * (members[n][name] - before).detach() / (6 * 0.2**2)
        torch.testing.assert_close(mean.get_parameter(name).detach(), expected, rtol=1e-6, atol=1e-7)


def test_sigma_and_learning_rate_may_change() -> None:
    strategy = EvolutionStrategy(Scaled(), 8, 0.1, learning_rate=0.02)
    strategy.sigma = 1e-6
    x = torch.randn(3)
    y = strategy.ask()(x.expand(8, 3))
    torch.testing.assert_close(y, strategy.mean_module()(x).detach().expand(8, 2), rtol=0, atol=1e-4)
    before = strategy.mean_module()
    strategy.learning_rate = 1e-5
    assert strategy.learning_rate == 1e-5
    strategy.tell(torch.arange(8.0))
    for one, other in zip(before.parameters(), strategy.mean_module().parameters(), strict=True):
        assert 0 < (one - other).abs().max() < 2e-5  # Adam steps by the learning rate


def test_estimate_uses_the_sigma_of_the_ask() -> None:
    means = []
    for later in (0.1, 5.0):
        torch.manual_seed(0)
        strategy = EvolutionStrategy(Scaled(), 8, 0.1, optimizer="sgd")
        strategy.ask()
        strategy.sigma = later
        strategy.tell(torch.arange(8.0))
        means.append(strategy.mean_module())
    assert same(*means)


@every_optimizer
def test_state_dict_continues_to_the_bit(family: Family, optimizer: Optimizer) -> None:
    settings: dict[str, Any] = {"perturbation": family, "optimizer": optimizer, "weight_decay": 0.01, "seed": 3}
    strategy = EvolutionStrategy(Scaled(), 8, 0.1, learning_rate=0.05, **settings)
    play(strategy, 3)
    strategy.sigma, strategy.learning_rate = 0.07, 0.03
    file = io.BytesIO()
    torch.save(strategy.state_dict(), file)
    file.seek(0)
    resumed = EvolutionStrategy(Scaled(), 8, 0.1, learning_rate=0.05, **settings)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert (resumed.generation, resumed.sigma, resumed.learning_rate) == (3, 0.07, 0.03)
    for _ in range(3):
        play(strategy, 1)
        play(resumed, 1)
        assert same(strategy.mean_module(), resumed.mean_module())
    assert strategy.generation == resumed.generation == 6


def test_loading_forgets_an_open_ask() -> None:
    strategy = EvolutionStrategy(Scaled(), 8, 0.1)
    strategy.ask()
    strategy.load_state_dict(copy.deepcopy(strategy.state_dict()))
    with pytest.raises(RuntimeError, match="ask"):
        strategy.tell(torch.zeros(8))


def test_everything_follows_from_the_seed() -> None:
    def trained(seed: int, noise: int) -> nn.Module:
        torch.manual_seed(0)
        strategy = EvolutionStrategy(Scaled(), 8, 0.1, seed=seed)
        torch.manual_seed(noise)
        play(strategy, 3)
        return strategy.mean_module()

    assert same(trained(1, 2), trained(1, 3))
    assert not same(trained(1, 2), trained(2, 2))


@torch.no_grad()
def maximize_quadratic(strategy: EvolutionStrategy) -> float:
    """Return the squared distance of the outputs from a target after 60 generations, relative to the initial one."""
    target, x = torch.tensor([1.0, -2.0, 0.5, 3.0]), torch.tensor([1.0, -1.0])

    def distance(y: Tensor) -> Tensor:
        return (y - target).square().sum(-1)

    start = distance(strategy.mean_module()(x))
    assert start > 5
    for _ in range(60):
        population = strategy.ask()
        strategy.tell(-distance(population(x.expand(len(population), 2))))
    return float(distance(strategy.mean_module()(x)) / start)


@every_optimizer
def test_maximizes_a_quadratic(family: Family, optimizer: Optimizer) -> None:
    rate = {"adam": 0.1, "sgd": 0.005, "clipup": 0.1}[optimizer]
    strategy = EvolutionStrategy(nn.Linear(2, 4), 64, 0.1, family, learning_rate=rate, optimizer=optimizer)
    assert maximize_quadratic(strategy) < 0.02


def test_maximizes_a_quadratic_without_antithetic_pairs() -> None:
    strategy = EvolutionStrategy(nn.Linear(2, 4), 65, 0.1, learning_rate=0.1, antithetic=False)
    assert maximize_quadratic(strategy) < 0.02


@torch.no_grad()
def solve_regression(family: Family, optimizer: Optimizer, learning_rate: float) -> float:
    """Return the squared error of a fitted sine after 100 generations, relative to the initial one."""
    x = torch.linspace(-2, 2, 16)[:, None]
    target = torch.sin(2 * x)
    module = MLP(1, 1, hidden=(8,), output_gain=1.0, generator=torch.Generator().manual_seed(0))
    strategy = EvolutionStrategy(module, 64, 0.1, family, learning_rate=learning_rate, optimizer=optimizer)

    def loss(y: Tensor) -> Tensor:
        return (y - target).square().mean((-2, -1))

    start = loss(module(x))
    for _ in range(100):
        population = strategy.ask()
        strategy.tell(-loss(population(x.expand(64, 16, 1))))
    return float(loss(strategy.mean_module()(x)) / start)


@pytest.mark.parametrize(
    ("family_used", "optimizer", "learning_rate"),
    [
        (Flipout(), "adam", 0.1),
        (Flipout(), "sgd", 0.02),
        (Flipout(), "clipup", 0.1),
        (Flipout(base="gaussian", bases=3), "adam", 0.1),
        (LowRank(), "adam", 0.1),
        (Dense(), "adam", 0.1),
    ],
    ids=str,
)
def test_solves_a_small_regression(family_used: Family, optimizer: Optimizer, learning_rate: float) -> None:
    assert solve_regression(family_used, optimizer, learning_rate) < 0.1


def test_family_may_be_given_with_settings() -> None:
    strategy = EvolutionStrategy(nn.Linear(1, 1), 16, 0.1, Flipout(base="gaussian", bases=4))
    assert strategy.family == Flipout(base="gaussian", bases=4)
