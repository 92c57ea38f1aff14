"""Perturbation families layer by layer: the noise they promise, and the batched forward against dense weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from es_flipout.perturbations import Dense, Family, Flipout, LinearPerturbation, LowRank, Members, family_named
from es_flipout.perturbations.flipout import FlipoutLinear
from es_flipout.randomness import Address

CPU = torch.device("cpu")
HERE = Address(seed=1, generation=2, layer=3)
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}


def members_of(size: int, antithetic: bool = True) -> Members:
    return Members(size, antithetic, CPU, size)


def layer(
    family: Family,
    members: Members,
    out_in: tuple[int, int] = (4, 3),
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    address: Address = HERE,
    sigma: float = 0.3,
) -> LinearPerturbation[Any]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_in, generator=generator, dtype=dtype)
    return family.linear(
        weight, torch.randn(out_in[0], generator=generator, dtype=dtype) if bias else None, sigma, members, address
    )


def noises(perturbation: LinearPerturbation[Any]) -> Tensor:
    """The weight noise of all members, ``(P, out, in)``."""
    return torch.stack([perturbation.weight_noise(n) for n in range(perturbation.members.size)])


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
    perturbation = layer(family, members, out_in, bias, dtype, Address(seed))
    chosen = torch.randint(members.size, (7,))  # any members, also one twice
    x = torch.randn(7, *middle, out_in[1], dtype=dtype)
    y = perturbation.linear(x, perturbation.select(chosen))
    assert (y.shape, y.dtype) == ((7, *middle, out_in[0]), dtype)
    for i, n in enumerate(chosen.tolist()):
        weight, own_bias = perturbation.member(n)
        assert (own_bias is not None) == bias
        expected = torch.nn.functional.linear(x[i], weight, own_bias)
        torch.testing.assert_close(y[i], expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


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
        weight, bias = perturbation.member(n)
        torch.testing.assert_close(weight - perturbation.weight, 0.3 * perturbation.weight_noise(n))
        assert bias is not None
        assert perturbation.bias is not None
        assert (bias - perturbation.bias).norm() > 0


@pytest.mark.parametrize("out_in", [(4, 3), (1, 5), (5, 1)])
def test_antithetic_partners_are_opposite_and_others_are_not(family: Family, out_in: tuple[int, int]) -> None:
    perturbation = layer(family, members_of(12), out_in)
    noise = noises(perturbation)
    assert torch.equal(noise[0::2], -noise[1::2])
    for source in range(6):
        weight, bias = perturbation.member(2 * source)
        other_weight, other_bias = perturbation.member(2 * source + 1)
        assert perturbation.bias is not None
        assert bias is not None
        assert other_bias is not None
        assert (weight - perturbation.weight).abs().max() > 0.01, "no perturbation, no test"
        torch.testing.assert_close((weight + other_weight) / 2, perturbation.weight, rtol=0, atol=1e-15)
        torch.testing.assert_close((bias + other_bias) / 2, perturbation.bias, rtol=0, atol=1e-15)


def test_without_antithetic_pairs_all_members_are_independent(family: Family) -> None:
    noise = noises(layer(family, members_of(64, antithetic=False), (16, 16))).flatten(1)
    cosine = torch.nn.functional.cosine_similarity(noise[:, None], noise[None], dim=-1)
    # A rank-one product of two vectors of 16 can be close to another's; a partner or a copy would give exactly 1.
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
    """Over many generations, because members share bases; every entry, and so on average every member."""
    generations, size = 120, 8
    sums, squares = torch.zeros(3, 2, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)
    for generation in range(generations):
        noise = noises(layer(family, members_of(size, antithetic=False), (3, 2), address=Address(0, generation)))
        sums += noise.sum(0)
        squares += noise.square().sum(0)
    n = generations * size
    assert (sums / n).abs().max() < 5 / n**0.5
    # a product of normals has fourth moment 9; members that share one Gaussian base also share its size
    spread = (2 / generations) ** 0.5 if isinstance(family, Flipout) else (8 / n) ** 0.5
    assert (squares / n - 1).abs().max() < 5 * spread


def test_bias_noise_is_standard_normal_and_independent(family: Family) -> None:
    members = members_of(4000, antithetic=False)
    noise = layer(family, members, (8, 1)).bias_noise
    assert noise is not None
    assert noise.mean().abs() < 4 / noise.numel() ** 0.5
    assert (noise.square().mean() - 1).abs() < 4 * (2 / noise.numel()) ** 0.5
    correlation = noise.T @ noise / len(noise)
    assert (correlation - torch.eye(8, dtype=torch.float64)).abs().max() < 6 / len(noise) ** 0.5


def test_rademacher_flipout_noise_is_signs() -> None:
    assert noises(layer(Flipout(bases=3), members_of(12))).unique().tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("base", ["rademacher", "gaussian"])
@pytest.mark.parametrize(("antithetic", "size"), [(True, 36), (False, 18)])
def test_flipout_members_of_one_base_differ_by_signs_of_rank_one(base: Any, antithetic: bool, size: int) -> None:
    """K = P / M consecutive members share a base: their ratio is an outer product of signs."""
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
        weight, bias = perturbation.member(n)
        torch.testing.assert_close(y[n], torch.nn.functional.linear(x[n], weight, bias))


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
    assert one.bias_noise is not None
    assert other.bias_noise is not None
    assert not torch.isclose(one.bias_noise, other.bias_noise).any()


@pytest.mark.parametrize("antithetic", [True, False])
def test_weighted_sum_equals_the_sum_over_dense_noise(family: Family, antithetic: bool) -> None:
    perturbation = layer(family, members_of(14, antithetic))
    u = torch.randn(14, dtype=torch.float64)
    weight, bias = perturbation.weighted_sum(u)
    torch.testing.assert_close(weight, torch.einsum("p,poi->oi", u, noises(perturbation)))
    biases = [perturbation.member(n)[1] for n in range(14)]
    expected = sum(u[n] * (own - perturbation.bias) / 0.3 for n, own in enumerate(biases))  # pyright: ignore
    torch.testing.assert_close(bias, expected)


def test_flipout_sum_in_parts_equals_the_sum_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    perturbation = layer(Flipout(bases=2), members_of(22))
    u = torch.randn(22, dtype=torch.float64)
    whole, _ = perturbation.weighted_sum(u)
    monkeypatch.setattr("es_flipout.perturbations.flipout._SOURCES_PER_SUM", 3)
    parts, _ = perturbation.weighted_sum(u)
    torch.testing.assert_close(parts, whole, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(parts, torch.einsum("p,poi->oi", u, noises(perturbation)))


@pytest.mark.parametrize("family_of_few", [Flipout(), Flipout(bases=2), LowRank()])
def test_no_weight_matrix_for_each_member_is_stored(family_of_few: Family) -> None:
    perturbation = layer(family_of_few, members_of(400), (20, 30))
    rows = perturbation.select(torch.arange(400))
    held = [value for holder in (perturbation, rows) for value in vars(holder).values() if isinstance(value, Tensor)]
    assert len(held) > 5
    assert max(value.numel() for value in held) <= 400 * 30


def test_flipout_signs_take_one_byte() -> None:
    perturbation = layer(Flipout(), members_of(10))
    assert isinstance(perturbation, FlipoutLinear)
    assert perturbation.r.dtype == perturbation.s.dtype == torch.int8


@pytest.mark.parametrize("antithetic", [True, False])
def test_share_of_a_population_has_the_same_members(family: Family, antithetic: bool) -> None:
    whole = layer(family, members_of(24, antithetic))
    for first, size in ((0, 24), (0, 8), (8, 10), (18, 6)):
        share = layer(family, Members(24, antithetic, CPU, size, first))
        for n in range(size):
            for own, same in zip(share.member(n), whole.member(first + n), strict=True):
                assert own is not None
                assert same is not None
                assert torch.equal(own, same)


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
