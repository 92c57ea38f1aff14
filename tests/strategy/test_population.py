"""The batched forward of a population: each row is its member's network, and its bits are independent of other rows."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from populations import population_of
from torch import Tensor, nn

from es_flipout.layers import convert
from es_flipout.perturbations import Dense, Family, Flipout, LowRank
from es_flipout.perturbations.base import SOURCES_PER_BLOCK
from es_flipout.perturbations.flipout import FlipoutPerturbation
from es_flipout.policies.networks import MLP, Linear
from es_flipout.strategy.population import Population
from es_flipout.strategy.unperturbed import Unperturbed

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 5e-5, torch.float64: 1e-12}


class Branches(nn.Module):
    """Nested layers, one used twice, one without bias, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.ModuleDict({"first": nn.Linear(3, 4), "again": nn.Sequential(nn.Linear(4, 4, bias=False))})
        self.out = nn.Linear(4, 2)
        self.register_buffer("offset", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inside["first"](x).relu() + self.get_buffer("offset").to(x.dtype)
        return self.out(self.inside["again"](self.inside["again"](hidden).tanh()) + hidden)


class SameTwice(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 3)
        self.two = self.one

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).tanh())


MODULES = {
    "root": lambda: nn.Linear(3, 2),
    "root-no-bias": lambda: nn.Linear(3, 2, bias=False),
    "mlp": lambda: MLP(3, 2, hidden=(5, 4), output_gain=1.0),
    "branches": Branches,
    "same-twice": SameTwice,
    "norm": lambda: nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 2)),
}


def check_against_members(population: Population, x: Tensor) -> None:
    y = population(x)
    assert len(y) == len(x)
    assert y.dtype == x.dtype
    for n in range(population.size):
        expected = population.member(n)(x[n])
        torch.testing.assert_close(y[n], expected, rtol=TOLERANCE[x.dtype], atol=TOLERANCE[x.dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", MODULES)
def test_forward_equals_every_member(family: Family, name: str, dtype: torch.dtype) -> None:
    module = MODULES[name]().to(dtype)
    population = population_of(module, family, 22, row_block=8)  # 8 + 8 + 6
    check_against_members(population, torch.randn(22, 3, dtype=dtype))
    check_against_members(population, torch.randn(22, 5, 3, dtype=dtype))


@settings(max_examples=25)
@given(
    size=st.integers(1, 20),
    antithetic=st.booleans(),
    row_block=st.integers(1, 25),
    middle=st.sampled_from([(), (1,), (3,), (2, 2)]),
    family=st.sampled_from([Flipout(), Flipout(base="gaussian", bases=3), LowRank(2), Dense()]),
)
def test_forward_equals_every_member_for_any_size_and_block(
    size: int, antithetic: bool, row_block: int, middle: tuple[int, ...], family: Family
) -> None:
    size = 2 * size if antithetic else size
    population = population_of(MLP(3, 2, hidden=(4,)), family, size, row_block=row_block, antithetic=antithetic)
    check_against_members(population, torch.randn(size, *middle, 3))


def test_members_differ_from_each_other_and_from_the_mean(family: Family) -> None:
    module = MLP(3, 2, hidden=(8,), output_gain=1.0)
    population = population_of(module, family, 100)
    y = population(torch.randn(1, 3).expand(100, 3))
    assert len(y.unique(dim=0)) == 100
    assert not torch.isclose(y, module(torch.randn(1, 3))).all(1).any()


def test_antithetic_in_every_layer(family: Family) -> None:
    module = MLP(3, 2, hidden=(5, 4)).double()
    population = population_of(module, family, 8)
    means = dict(module.named_parameters())
    for pair in range(4):
        one = dict(population.member(2 * pair).named_parameters())
        other = dict(population.member(2 * pair + 1).named_parameters())
        for name, mean in means.items():
            assert (one[name] - mean).norm() > 1e-3, name
            torch.testing.assert_close((one[name] + other[name]) / 2, mean, rtol=0, atol=1e-15)


def test_layers_have_noise_of_their_own() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    member = population_of(module, Flipout(), 2).member(0)
    first, second = (
        member.get_submodule(name).get_parameter(kind) - module.get_submodule(name).get_parameter(kind)
        for name, kind in (("0", "weight"), ("1", "weight"))
    )
    assert not torch.isclose(first, second).all()
    assert not torch.isclose(first, -second).all()


def test_generation_and_seed_give_other_members(family: Family) -> None:
    module, x = MLP(3, 2, output_gain=1.0), torch.randn(6, 3)
    one = population_of(module, family, 6)(x)
    assert torch.equal(one, population_of(module, family, 6)(x))
    assert not torch.isclose(one, population_of(module, family, 6, generation=1)(x)).any()
    assert not torch.isclose(one, population_of(module, family, 6, seed=3)(x)).any()


def check_rows_keep_their_bits(population: Population, obs_dim: int, dtype: torch.dtype) -> None:
    """Check that a member's output depends neither on its row nor on the other rows."""
    size = population.size
    x = torch.randn(size, obs_dim, dtype=dtype)
    y = population(x)
    order = torch.randperm(size)
    assert torch.equal(population.select(order)(x[order]), y[order]), "another order"
    some = torch.randint(size, (size // 2 + 1,))
    assert torch.equal(population.select(some)(x[some]), y[some]), "some members, some twice"
    for n in (0, 1, size // 2, size - 1):
        assert torch.equal(population.select(torch.tensor([n]))(x[n : n + 1])[0], y[n]), "alone"
    spoiled = x.clone()
    spoiled[1::3] = torch.nan
    spoiled[2::3] = 1e30
    assert torch.equal(population(spoiled)[0::3], y[0::3]), "beside members whose state diverged"


def check_matrices_keep_their_bits(population: Population, obs_dim: int, dtype: torch.dtype) -> None:
    """Check the same for inputs with one more dimension."""
    x = torch.randn(population.size, 3, obs_dim, dtype=dtype)
    order = torch.randperm(population.size)
    assert torch.equal(population.select(order)(x[order]), population(x)[order])


@pytest.mark.parametrize("row_block", [8, 64, 256])
def test_rows_keep_their_bits(family: Family, row_block: int) -> None:
    population = population_of(MLP(16, 6, hidden=(32,), output_gain=1.0), family, 90, row_block=row_block)
    check_rows_keep_their_bits(population, 16, torch.float32)
    if not isinstance(family, Dense):  # one matrix per member: see test_matrices_of_odd_length
        check_matrices_keep_their_bits(population, 16, torch.float32)


def test_rows_keep_their_bits_in_float64(family: Family) -> None:
    population = population_of(MLP(16, 6, hidden=(32,), output_gain=1.0).double(), family, 90)
    check_rows_keep_their_bits(population, 16, torch.float64)
    if not isinstance(family, Dense):
        check_matrices_keep_their_bits(population, 16, torch.float64)


def test_rows_keep_their_bits_in_the_usual_policy(family: Family) -> None:
    check_rows_keep_their_bits(population_of(MLP(17, 6, output_gain=1.0), family, 90), 17, torch.float32)


UNALIGNED = {
    "linear-11-3": lambda: Linear(11, 3),  # Hopper
    "linear-17-6": lambda: Linear(17, 6),  # HalfCheetah, Walker2d
    "linear-105-8": lambda: Linear(105, 8),  # Ant
    "mlp-odd-width": lambda: MLP(3, 2, hidden=(15,), output_gain=1.0),
    "mlp-float64": lambda: MLP(17, 6).double(),
}


@pytest.mark.parametrize("name", UNALIGNED)
def test_rows_of_odd_length_keep_their_bits(name: str) -> None:
    """The rounding of some BLAS kernels depends on a row's alignment, which differs between rows of odd length."""
    module = UNALIGNED[name]()
    first = next(module.parameters())
    torch.nn.init.normal_(first)
    population = population_of(module, Flipout(), 90)
    check_rows_keep_their_bits(population, first.shape[1], first.dtype)


def test_matrices_of_odd_length_keep_their_bits(family: Family) -> None:
    check_matrices_keep_their_bits(population_of(MLP(17, 6, hidden=(32,)), family, 90), 17, torch.float32)


@settings(max_examples=15)
@given(
    bases=st.sampled_from([1, 3]),
    start=st.lists(st.integers(0, 29), min_size=1, max_size=40),
    data=st.data(),
)
def test_replaced_rows_equal_a_fresh_selection(bases: int, start: list[int], data: st.DataObject) -> None:
    population = population_of(MLP(4, 3, hidden=(8,)), Flipout(bases=bases), 30, row_block=16)
    model = list(start)
    selection = population.select(torch.tensor(start))
    x = torch.randn(len(start), 4)
    for _ in range(3):
        rows = data.draw(st.lists(st.integers(0, len(start) - 1), unique=True, min_size=1))
        members = data.draw(st.lists(st.integers(0, 29), min_size=len(rows), max_size=len(rows)))
        selection.replace(torch.tensor(rows), torch.tensor(members))
        for row, member in zip(rows, members, strict=True):
            model[row] = member
        assert torch.equal(selection(x), population.select(torch.tensor(model))(x))


def test_replaced_rows_keep_their_bits(family: Family) -> None:
    population = population_of(MLP(16, 4, hidden=(32,)), family, 40, row_block=32)
    x = torch.randn(40, 16)
    y = population(x)
    selection = population.select(torch.arange(40))
    selection.replace(torch.tensor([39, 0, 31, 32]), torch.tensor([1, 2, 38, 3]))
    now = torch.arange(40)
    now[torch.tensor([39, 0, 31, 32])] = torch.tensor([1, 2, 38, 3])
    assert torch.equal(selection(x[now]), y[now])
    assert torch.equal(population(x), y), "the population itself must not change"


@pytest.mark.parametrize("antithetic", [True, False])
def test_a_shard_has_the_same_members_to_the_bit(family: Family, antithetic: bool) -> None:
    module = MLP(16, 4, hidden=(8,), output_gain=1.0)
    whole = population_of(module, family, 36, antithetic=antithetic)
    x = torch.randn(36, 16)
    y = whole(x)
    u = torch.randn(36)
    sums: dict[str, Tensor] = {}
    for first, size in ((0, 10), (10, 24), (34, 2)):
        shard = population_of(module, family, size, first=first, of=36, antithetic=antithetic)
        assert len(shard) == size
        assert torch.equal(shard(x[first : first + size]), y[first : first + size])
        for n in (0, size - 1):
            for own, same in zip(shard.member(n).parameters(), whole.member(first + n).parameters(), strict=True):
                assert torch.equal(own, same)
        for name, part in shard.weighted_sum(u[first : first + size]).items():
            sums[name] = sums.get(name, torch.zeros(())) + part
    for name, total in whole.weighted_sum(u).items():
        torch.testing.assert_close(sums[name], total)


@pytest.mark.parametrize("antithetic", [True, False])
def test_sums_over_blocks_add_up_to_the_same_bits(family: Family, antithetic: bool) -> None:
    per_source = 2 if antithetic else 1
    size, step = (2 * SOURCES_PER_BLOCK + 50) * per_source, SOURCES_PER_BLOCK * per_source
    module = MLP(3, 2, hidden=(4,))
    whole = population_of(module, family, size, antithetic=antithetic)
    u = torch.randn(size)
    sums = [
        population_of(module, family, len(part), first=index * step, of=size, antithetic=antithetic).weighted_sum(part)
        for index, part in enumerate(u.split(step))
    ]
    assert len(sums) == len(whole.members.blocks) == 3
    for name, total in whole.weighted_sum(u).items():
        assert torch.equal(sums[0][name] + sums[1][name] + sums[2][name], total)


def test_population_stays_when_the_module_changes(family: Family) -> None:
    module, x = MLP(3, 2), torch.randn(6, 3)
    population = population_of(module, family, 6)
    y, member = population(x), population.member(4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    assert torch.equal(population(x), y)
    for now, before in zip(population.member(4).parameters(), member.parameters(), strict=True):
        assert torch.equal(now, before)


def test_module_is_left_alone(family: Family) -> None:
    module = Branches()
    before = copy.deepcopy(module.state_dict())
    population = population_of(module, family, 6)
    y = population(torch.randn(6, 3))
    assert not y.requires_grad
    member = population.member(3)
    assert type(member) is Branches
    assert member.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert type(module.out) is nn.Linear


def test_twin_holds_no_weights() -> None:
    module = Branches()
    conversion = convert(module)
    assert list(conversion.twin.parameters()) == []
    assert sorted(conversion.leaves.values(), key=lambda own: sorted(own.values())) == [
        {"weight": "inside.again.0.weight"},
        {"weight": "inside.first.weight", "bias": "inside.first.bias"},
        {"weight": "out.weight", "bias": "out.bias"},
    ]


def test_nothing_of_the_size_of_all_members_is_stored() -> None:
    population = population_of(nn.Linear(30, 20), Flipout(), 400)
    perturbation = population.perturbations["weight"]
    assert isinstance(perturbation, FlipoutPerturbation)
    assert max(value.numel() for value in vars(perturbation).values() if isinstance(value, Tensor)) <= 400 * 30


@pytest.mark.parametrize("shape", [(), (5, 3), (12, 3), (3, 6)])
def test_input_of_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"P = 6"):
        population_of(nn.Linear(3, 2), Flipout(), 6)(torch.randn(shape))


@pytest.mark.parametrize("rows", [2, 4])
def test_selection_refuses_another_number_of_rows(rows: int) -> None:
    selection = population_of(nn.Linear(3, 2), Flipout(), 6).select(torch.tensor([0, 5, 2]))
    assert selection(torch.randn(3, 3)).shape == (3, 2)
    with pytest.raises(ValueError, match="3"):
        selection(torch.randn(rows, 3))


@pytest.mark.parametrize("n", [-1, 6])
def test_no_such_member(n: int) -> None:
    with pytest.raises(IndexError, match=f"got {n}"):
        population_of(nn.Linear(3, 2), Flipout(), 6).member(n)


@pytest.mark.parametrize("shape", [(), (5,), (6, 1)])
def test_weights_of_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(6,\)"):
        population_of(nn.Linear(3, 2), Flipout(), 6).weighted_sum(torch.zeros(shape))


def test_unperturbed_is_the_module_in_every_row() -> None:
    module, x = MLP(3, 2, output_gain=1.0), torch.randn(5, 3)
    population = Unperturbed(module, 5)
    rows = population.select(torch.arange(5))
    rows.replace(torch.tensor([0]), torch.tensor([3]))
    torch.testing.assert_close(rows(x), module(x).detach())
    assert not rows(x).requires_grad
    assert (population.size, population.device) == (5, CPU)
