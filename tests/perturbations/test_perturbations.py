"""Perturbation families layer by layer: distribution of the noise, and the batched forward against dense weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from es_flipout.perturbations import (
    Dense,
    Family,
    Fixed,
    Flipout,
    Independent,
    LowRank,
    Members,
    Perturbation,
    family_named,
)
from es_flipout.perturbations.flipout import FlipoutPerturbation
from es_flipout.randomness import Address

CPU = torch.device("cpu")
HERE = Address(seed=1, generation=2, layer=3)
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}


def members_of(size: int, antithetic: bool = True) -> Members:
    return Members(size, antithetic, CPU, size)


def layer(
    family: Family,
    members: Members,
    out_in: tuple[int, ...] = (4, 3),
    dtype: torch.dtype = torch.float64,
    address: Address = HERE,
    sigma: float = 0.3,
) -> Perturbation[Any]:
    mean = torch.randn(out_in, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return family.matrix(mean, sigma, members, address)


def bias_of(members: Members, size: int = 4, address: Address = HERE) -> Independent:
    return Independent(torch.randn(size, dtype=torch.float64), 0.3, members, address)


def noises(perturbation: Perturbation[Any]) -> Tensor:
    """Return the weight noise of all members, ``(P, out, in)``."""
    return torch.stack([perturbation.noise(n) for n in range(perturbation.members.size)])


@settings(max_examples=15)
@given(
    size=st.integers(1, 12),
    out_in=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    middle=st.sampled_from([(), (1,), (5,), (2, 3)]),
    bias=st.booleans(),
    antithetic=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**64 - 1),
)
def test_batched_forward_equals_dense_weights(
    family: Family,
    size: int,
    out_in: tuple[int, int],
    middle: tuple[int, ...],
    bias: bool,
    antithetic: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    members = members_of(2 * size if antithetic else size, antithetic)
    perturbation = layer(family, members, out_in, dtype, Address(seed))
    chosen = torch.randint(members.size, (7,))  # any members, possibly repeated
    rows = perturbation.select(chosen)
    x = torch.randn(7, *middle, out_in[1], dtype=dtype)
    biases = torch.randn(7, out_in[0], dtype=dtype) if bias else None
    y = perturbation.linear(x, rows, biases)
    assert (y.shape, y.dtype) == ((7, *middle, out_in[0]), dtype)
    part = slice(out_in[0] // 2, None)
    parts = perturbation.linear(x, rows, None if biases is None else biases[:, part], part)
    for i, n in enumerate(chosen.tolist()):
        expected = torch.nn.functional.linear(x[i], perturbation.member(n), None if biases is None else biases[i])
        torch.testing.assert_close(y[i], expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        torch.testing.assert_close(parts[i], expected[..., part], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        own = perturbation.values(rows)[i]
        torch.testing.assert_close(own, perturbation.member(n), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("antithetic", [True, False])
def test_put_is_as_good_as_select(family: Family, antithetic: bool) -> None:
    perturbation = layer(family, members_of(12, antithetic))
    rows = perturbation.select(torch.tensor([0, 1, 2, 3]))
    rows.put(torch.tensor([2, 0]), perturbation.select(torch.tensor([11, 8])))
    x = torch.randn(4, 3, dtype=torch.float64)
    expected = perturbation.linear(x, perturbation.select(torch.tensor([8, 1, 11, 3])))
    assert torch.equal(perturbation.linear(x, rows), expected)


def test_member_is_mean_plus_sigma_times_noise(family: Family) -> None:
    perturbation = layer(family, members_of(6), sigma=0.3)
    for n in range(6):
        torch.testing.assert_close(perturbation.member(n) - perturbation.mean, 0.3 * perturbation.noise(n))


@pytest.mark.parametrize("shape", [(), (5,), (3, 4)])
def test_independent_noise_of_any_shape(shape: tuple[int, ...]) -> None:
    """Biases, scales and bare parameters."""
    members = members_of(6)
    perturbation = Independent(torch.randn(shape, dtype=torch.float64), 0.3, members, HERE)
    rows = perturbation.select(torch.tensor([4, 1, 1]))
    for i, n in enumerate((4, 1, 1)):
        torch.testing.assert_close(perturbation.values(rows)[i], perturbation.mean + 0.3 * perturbation.noise(n))
    u = torch.randn(6, dtype=torch.float64)
    expected = torch.stack([u[n] * perturbation.noise(n) for n in range(6)]).sum(0)
    torch.testing.assert_close(perturbation.weighted_sum(u), expected)
    assert torch.equal(perturbation.noise(0), -perturbation.noise(1))


def test_fixed_parameters_have_no_noise() -> None:
    perturbation = Fixed(torch.randn(4, 3), 0.3, members_of(6), HERE)
    rows = perturbation.select(torch.tensor([4, 1, 1]))
    rows.put(torch.tensor([0]), perturbation.select(torch.tensor([2])))
    assert torch.equal(perturbation.values(rows), perturbation.mean.expand(3, 4, 3))
    assert torch.equal(perturbation.member(5), perturbation.mean)
    assert not perturbation.weighted_sum(torch.ones(6)).any()


@pytest.mark.parametrize("out_in", [(4, 3), (1, 5), (5, 1)])
def test_antithetic_partners_are_opposite_and_others_are_not(family: Family, out_in: tuple[int, int]) -> None:
    perturbation = layer(family, members_of(12), out_in)
    noise = noises(perturbation)
    assert torch.equal(noise[0::2], -noise[1::2])
    bias = bias_of(members_of(12))
    for source in range(6):
        for own in (perturbation, bias):
            one, other = own.member(2 * source), own.member(2 * source + 1)
            assert (one - own.mean).abs().max() > 0.01, "without a perturbation nothing is tested"
            torch.testing.assert_close((one + other) / 2, own.mean, rtol=0, atol=1e-15)


def test_without_antithetic_pairs_all_members_are_independent(family: Family) -> None:
    noise = noises(layer(family, members_of(64, antithetic=False), (16, 16))).flatten(1)
    cosine = torch.nn.functional.cosine_similarity(noise[:, None], noise[None], dim=-1)
    # Outer products of two vectors of length 16 can be similar by chance; a partner or a copy would give exactly 1.
    assert cosine.fill_diagonal_(0).abs().max() < 0.8
    assert cosine.mean().abs() < 0.05


@pytest.mark.parametrize("bases", [1, 3])
def test_flipout_partners_flip_r_and_not_s(bases: int) -> None:
    perturbation = layer(Flipout(bases=bases), members_of(12))
    even, odd = perturbation.select(torch.arange(0, 12, 2)), perturbation.select(torch.arange(1, 12, 2))
    assert torch.equal(even.sigma_r, -odd.sigma_r)
    assert torch.equal(even.s, odd.s)
    assert even.sigma_r.abs().unique().tolist() == [0.3]
    assert even.s.abs().unique().tolist() == [1.0]


def test_noise_has_zero_mean_and_unit_variance(family: Family) -> None:
    """Averaged over many generations, because members share bases; checked for every entry."""
    generations, size = 120, 8
    sums, squares = torch.zeros(3, 2, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)
    for generation in range(generations):
        noise = noises(layer(family, members_of(size, antithetic=False), (3, 2), address=Address(0, generation)))
        sums += noise.sum(0)
        squares += noise.square().sum(0)
    n = generations * size
    assert (sums / n).abs().max() < 5 / n**0.5
    # a product of normals has fourth moment 9; members that share a Gaussian base also share its magnitudes
    spread = (2 / generations) ** 0.5 if isinstance(family, Flipout) else (8 / n) ** 0.5
    assert (squares / n - 1).abs().max() < 5 * spread


def test_bias_noise_is_standard_normal_and_independent() -> None:
    noise = bias_of(members_of(4000, antithetic=False), 8).stored
    assert noise.mean().abs() < 4 / noise.numel() ** 0.5
    assert (noise.square().mean() - 1).abs() < 4 * (2 / noise.numel()) ** 0.5
    correlation = noise.T @ noise / len(noise)
    assert (correlation - torch.eye(8, dtype=torch.float64)).abs().max() < 6 / len(noise) ** 0.5


def test_rademacher_flipout_noise_is_signs() -> None:
    assert noises(layer(Flipout(bases=3), members_of(12))).unique().tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("base", ["rademacher", "gaussian"])
@pytest.mark.parametrize(("antithetic", "size"), [(True, 36), (False, 18)])
def test_flipout_members_of_one_base_differ_by_signs_of_rank_one(base: Any, antithetic: bool, size: int) -> None:
    """K = P / M consecutive members share a base, so their ratio is an outer product of signs."""
    noise = noises(layer(Flipout(base=base, bases=3), members_of(size, antithetic), (6, 6)))
    ratio = noise[:, None] / noise[None]
    same_base = torch.linalg.matrix_rank(ratio.round(decimals=9)) == 1
    expected = torch.block_diag(*[torch.ones(size // 3, size // 3)] * 3).bool()
    assert torch.equal(same_base, expected)
    shared = ratio[same_base]
    torch.testing.assert_close(shared.abs(), torch.ones_like(shared))


def test_more_bases_than_sources() -> None:
    perturbation = layer(Flipout(bases=5), members_of(4))
    x = torch.randn(4, 3, dtype=torch.float64)
    y = perturbation.linear(x, perturbation.select(torch.arange(4)))
    for n in range(4):
        torch.testing.assert_close(y[n], torch.nn.functional.linear(x[n], perturbation.member(n)))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_low_rank_noise_has_its_rank(rank: int) -> None:
    noise = noises(layer(LowRank(rank), members_of(10), (7, 5)))
    assert torch.linalg.matrix_rank(noise).tolist() == [rank] * 10


def test_dense_noise_has_full_rank_and_is_uncorrelated() -> None:
    noise = noises(layer(Dense(), members_of(200, antithetic=False), (6, 6)))
    assert torch.linalg.matrix_rank(noise).tolist() == [6] * 200
    flat = noise.flatten(1)
    correlation = flat @ flat.T / 36
    correlation.fill_diagonal_(0)
    assert correlation.abs().max() < 6 / 36**0.5
    between_entries = flat.T @ flat / 200
    assert (between_entries - torch.eye(36)).abs().max() < 6 * (2 / 200) ** 0.5


def test_flipout_signs_differ_between_members_beyond_the_base() -> None:
    noise = noises(layer(Flipout(), members_of(1000, antithetic=False), (16, 16))).flatten(1)
    assert len(noise.unique(dim=0)) == 1000


@pytest.mark.parametrize("part", ["seed", "generation", "layer"])
def test_every_part_of_the_address_matters(family: Family, part: str) -> None:
    here = {"seed": 1, "generation": 1, "layer": 1}
    one = layer(family, members_of(6), (8, 8), address=Address(**here))
    other = layer(family, members_of(6), (8, 8), address=Address(**here | {part: 2}))
    a, b = noises(one).flatten(1), noises(other).flatten(1)
    assert ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).abs().max() < 0.8
    one_bias = bias_of(members_of(6), address=Address(**here))
    other_bias = bias_of(members_of(6), address=Address(**here | {part: 2}))
    assert not torch.isclose(one_bias.stored, other_bias.stored).any()


@pytest.mark.parametrize("antithetic", [True, False])
def test_weighted_sum_equals_the_sum_over_dense_noise(family: Family, antithetic: bool) -> None:
    perturbation = layer(family, members_of(14, antithetic))
    u = torch.randn(14, dtype=torch.float64)
    torch.testing.assert_close(perturbation.weighted_sum(u), torch.einsum("p,poi->oi", u, noises(perturbation)))


def test_sum_in_blocks_equals_the_sum_at_once(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    perturbation = layer(family, members_of(22))
    u = torch.randn(22, dtype=torch.float64)
    whole = perturbation.weighted_sum(u)
    for module in ("base", "flipout"):
        monkeypatch.setattr(f"es_flipout.perturbations.{module}.SOURCES_PER_BLOCK", 3)
    parts = perturbation.weighted_sum(u)
    torch.testing.assert_close(parts, whole, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(parts, torch.einsum("p,poi->oi", u, noises(perturbation)))


@pytest.mark.parametrize("family_of_few", [Flipout(), Flipout(bases=2), LowRank()])
def test_no_weight_matrix_for_each_member_is_stored(family_of_few: Family) -> None:
    perturbation = layer(family_of_few, members_of(400), (20, 30))
    rows = perturbation.select(torch.arange(400))
    held = [value for holder in (perturbation, rows) for value in vars(holder).values() if isinstance(value, Tensor)]
    assert len(held) >= 5
    assert max(value.numel() for value in held) <= 400 * 30


def test_flipout_signs_take_one_byte() -> None:
    perturbation = layer(Flipout(), members_of(10))
    assert isinstance(perturbation, FlipoutPerturbation)
    assert isinstance(perturbation.r, torch.Tensor)
    assert isinstance(perturbation.s, torch.Tensor)
    assert perturbation.r.dtype == perturbation.s.dtype == torch.int8


@pytest.mark.parametrize("antithetic", [True, False])
def test_share_of_a_population_has_the_same_members(family: Family, antithetic: bool) -> None:
    whole = layer(family, members_of(24, antithetic))
    for first, size in ((0, 24), (0, 8), (8, 10), (18, 6)):
        share = layer(family, Members(24, antithetic, CPU, size, first))
        for n in range(size):
            assert torch.equal(share.member(n), whole.member(first + n))


@pytest.mark.parametrize(("name", "expected"), [("flipout", Flipout()), ("low_rank", LowRank()), ("dense", Dense())])
def test_family_named(name: str, expected: Family) -> None:
    assert family_named(name) == expected


def test_unknown_family_is_named() -> None:
    with pytest.raises(ValueError, match=r"flipout, low_rank, dense.*'flipoff'"):
        family_named("flipoff")


@pytest.mark.parametrize("count", [0, -1])
def test_settings_out_of_range(count: int) -> None:
    with pytest.raises(ValueError, match=f"bases must be at least 1, got {count}"):
        Flipout(bases=count)
    with pytest.raises(ValueError, match=f"rank must be at least 1, got {count}"):
        LowRank(rank=count)


def test_unknown_base_is_refused() -> None:
    with pytest.raises(ValueError, match="rademacher"):
        Flipout(base="rademacer")  # pyright: ignore[reportArgumentType]
