"""The engine with kernels, compared with dense members and with the engine without kernels."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from populations import population_of

from es_flipout.cli import main
from es_flipout.errors import UserError
from es_flipout.kernels import Precision, chosen, interpreted
from es_flipout.perturbations import Dense, Family, Flipout, LowRank
from es_flipout.perturbations.flipout import FlipoutPerturbation, PackedSigns
from es_flipout.policies.networks import MLP, Linear, Recurrent
from es_flipout.strategy.estimator import estimate_gradient
from es_flipout.strategy.evolution_strategy import EvolutionStrategy
from es_flipout.strategy.fused import FusedSelection, Network
from es_flipout.strategy.population import Population
from es_flipout.strategy.selection import Selection

DEVICE = torch.device("cpu" if interpreted() else "cuda")


def with_kernels(module: nn.Module, family: Family | None = None, size: int = 12, **settings: Any) -> Population:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    settings = {"kernels": "triton", "row_block": None, **settings}
    return population_of(module.to(DEVICE), family or Flipout(), size, **settings)


def assert_members(population: Population, x: Tensor, found: Tensor) -> None:
    for n in range(population.size):
        assert torch.allclose(found[n], population.member(n)(x[n]), atol=2e-5)


MODULES = {
    "mlp": lambda: MLP(7, 3, (20, 33)),
    "relu": lambda: MLP(7, 3, (20,), "relu"),
    "linear": lambda: Linear(7, 3),
    "no bias": lambda: Linear(7, 3, bias=False),
    "sequential": lambda: nn.Sequential(nn.Linear(7, 20), nn.SiLU(), nn.Linear(20, 9), nn.Linear(9, 3), nn.GELU()),
    "alone": lambda: nn.Linear(7, 3),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("antithetic", [True, False])
def test_population_is_its_members(name: str, antithetic: bool) -> None:
    population = with_kernels(MODULES[name](), antithetic=antithetic)
    assert isinstance(population._network, Network)
    assert population._network.in_one_kernel
    for shape in ((12, 7), (12, 2, 7)):
        x = torch.randn(shape, device=DEVICE)
        assert_members(population, x, population(x))


@pytest.mark.parametrize(
    ("family", "precision", "dtype"),
    [
        (Flipout(), "ieee", torch.bfloat16),
        (Flipout(), "tf32x3", torch.bfloat16),
        (Flipout(), "tf32", torch.float32),
        (Flipout(), "bf16", torch.bfloat16),
        (Flipout(base="gaussian"), "ieee", torch.float32),
    ],
)
def test_bases_of_signs_are_bf16_numbers(family: Family, precision: Precision, dtype: torch.dtype) -> None:
    population = with_kernels(MLP(7, 3, (20,)), family, precision=precision)
    assert population._network is not None
    assert {layer.base.dtype for layer in population._network.layers} == {dtype}


def test_kernels_change_no_member() -> None:
    module = MLP(7, 3, (20, 33))
    chained = with_kernels(module)
    without = population_of(module, Flipout(), 12, row_block=None, kernels="torch")
    for n in range(12):
        for a, b in zip(chained.member(n).parameters(), without.member(n).parameters(), strict=True):
            assert torch.equal(a, b)
    u = torch.randn(12, device=DEVICE)
    expected = estimate_gradient(without, u)
    for key, value in estimate_gradient(chained, u).items():
        assert torch.allclose(value, expected[key], atol=1e-4)


@pytest.mark.parametrize(
    "family", [Flipout(bases=3), Flipout(base="gaussian"), Flipout(base="gaussian", bases=3), LowRank(2)]
)
def test_other_families(family: Family) -> None:
    population = with_kernels(MLP(7, 3, (20,)), family)
    x = torch.randn(12, 7, device=DEVICE)
    assert_members(population, x, population(x))
    brute = {name: torch.zeros_like(p) for name, p in population._module.named_parameters()}
    u = torch.randn(12, device=DEVICE)
    for n in range(12):
        for name, parameter in population.member(n).named_parameters():
            brute[name] += u[n] * (parameter - population._module.get_parameter(name)) / 0.3
    for name, found in population.weighted_sum(u).items():
        assert torch.allclose(found, brute[name], atol=1e-4)


def test_layers_too_wide_for_one_kernel() -> None:
    population = with_kernels(MLP(7, 3, (260,)), size=4)
    assert population._network is not None
    assert not population._network.in_one_kernel
    x = torch.randn(4, 7, device=DEVICE)
    assert_members(population, x, population(x))


class Branches(nn.Module):
    """Not a chain of layers: kernels are used for its linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.norm = nn.Linear(7, 20), nn.Linear(7, 20), nn.LayerNorm(20)
        self.embedding = nn.Embedding(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.one(x) * self.other(x)) + self.one(self.embedding(torch.tensor(3, device=x.device)))


def test_any_other_module_uses_the_kernels_for_its_layers() -> None:
    population = with_kernels(Branches())
    assert population._network is None
    assert isinstance(population.select(torch.arange(3, device=DEVICE)), Selection)
    x = torch.randn(12, 2, 7, device=DEVICE)
    assert_members(population, x, population(x))


def test_recurrent_policy() -> None:
    population = with_kernels(Recurrent(7, 3, (16,)))
    x, state = torch.randn(12, 7, device=DEVICE), torch.randn(12, 16, device=DEVICE)
    y, after = population(x, state)
    for n in range(12):
        expected, expected_after = population.member(n)(x[n : n + 1], state[n : n + 1])
        assert torch.allclose(y[n], expected[0], atol=2e-5)
        assert torch.allclose(after[n], expected_after[0], atol=2e-5)


def test_selection_and_replacement_of_rows() -> None:
    population = with_kernels(MLP(7, 3, (20,)))
    members = torch.tensor([5, 0, 0, 11, 2], device=DEVICE)
    selection = population.select(members)
    assert isinstance(selection, FusedSelection)
    x = torch.randn(12, 7, device=DEVICE)
    whole = population(x)
    assert torch.equal(selection(x[members]), whole[members])
    selection.replace(torch.tensor([1, 4], device=DEVICE), torch.tensor([7, 9], device=DEVICE))
    assert members.tolist() == [5, 0, 0, 11, 2]
    now = torch.tensor([5, 7, 0, 11, 9], device=DEVICE)
    assert torch.equal(selection(x[now]), whole[now])
    with pytest.raises(ValueError, match="5 rows"):
        selection(x)


def test_shares_of_a_population() -> None:
    module = MLP(7, 3, (20,))
    whole, x = with_kernels(module), torch.randn(12, 7, device=DEVICE)
    shard = population_of(module, Flipout(), 4, first=6, of=12, row_block=None, kernels="triton")
    assert torch.equal(shard(x[6:10]), whole(x)[6:10])


def test_hooks_and_still_parameters() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    module[1].register_forward_hook(lambda *_: None)
    assert with_kernels(module)._network is None
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    module[0].weight.requires_grad_(False)
    population = with_kernels(module)
    assert population._network is None
    x = torch.randn(12, 4, device=DEVICE)
    assert_members(population, x, population(x))
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    module[0].bias.requires_grad_(False)
    population = with_kernels(module)
    assert population._network is not None
    assert_members(population, x, population(x))


def test_signs_take_one_bit() -> None:
    population = with_kernels(MLP(7, 3, (40,)))
    weight = population.perturbations["layers.0.weight"]
    assert isinstance(weight, FlipoutPerturbation)
    assert isinstance(weight.r, PackedSigns)
    assert weight.r.words.shape == (6, 2)
    assert weight.r[torch.tensor([0], device=DEVICE)].dtype == torch.int8


def test_dense_has_no_kernel_and_works() -> None:
    population = with_kernels(MLP(7, 3, (8,)), Dense())
    assert population._network is None
    x = torch.randn(12, 7, device=DEVICE)
    assert_members(population, x, population(x))


def test_strategy_learns_with_kernels() -> None:
    module = nn.Linear(3, 1).to(DEVICE)
    strategy = EvolutionStrategy(module, 32, 0.1, learning_rate=0.2, kernels="triton")
    x = torch.randn(3, device=DEVICE).expand(32, 3)
    losses = []
    for _ in range(6):
        losses.append((strategy.ask()(x) - 2.0).square()[:, 0])
        strategy.tell(-losses[-1])
    assert losses[-1].mean() < 0.5 * losses[0].mean()


def test_auto_takes_torch_on_the_cpu() -> None:
    assert not chosen("auto", torch.device("cpu"), torch.float32)
    assert not chosen("torch", torch.device("cpu"), torch.float32)


def test_what_cannot_be_used_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="float32"):
        chosen("triton", DEVICE, torch.float64)
    with pytest.raises(UserError, match="one of auto, torch, triton"):
        EvolutionStrategy(nn.Linear(2, 1), 4, 0.1, kernels="cuda")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="precision must be one of"):
        EvolutionStrategy(nn.Linear(2, 1), 4, 0.1, precision="fp32")  # type: ignore[arg-type]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["train", "CartPole-v1", "--kernels", "triton", "--device", "cpu"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said == [
        "error: kernels triton cannot be used: they need a CUDA device, and the population is on cpu; use kernels auto or torch"
    ]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="package triton is not installed"):
        chosen("triton", DEVICE, torch.float32)
    assert not chosen("auto", torch.device("cuda"), torch.float32)


@pytest.mark.parametrize("precision", ["ieee", "bf16"])
@pytest.mark.parametrize("family", [Flipout(), LowRank()])
def test_a_fixed_copy_takes_over_other_numbers(family: Family, precision: Any) -> None:
    module, other = MLP(7, 3, (20,)), MLP(7, 3, (20,))
    first = with_kernels(module, family, precision=precision)
    nn.init.normal_(other.layers[0].weight)  # type: ignore[arg-type]
    settings = {"kernels": "triton", "precision": precision}
    second = population_of(other.to(DEVICE), family, 12, sigma=0.7, generation=3, row_block=None, **settings)
    x, members = torch.randn(12, 7, device=DEVICE), torch.arange(12, device=DEVICE)
    assert first.layout == second.layout
    copied = first.fixed_copy()
    selection = copied.select(members)
    assert torch.equal(selection(x), first(x))
    before = second(x)
    assert not torch.equal(before, first(x))
    copied.load_(second)
    selection.replace_where(torch.ones(12, dtype=torch.bool, device=DEVICE), members)
    assert torch.equal(selection(x), before)
    mask = members % 3 == 0
    selection.replace_where(mask, members.flip(0))
    now = torch.where(mask, members.flip(0), members)
    assert torch.equal(selection(x), second.select(now)(x))
