"""Centered ranks, compared with ranks counted by brute force, with ties, NaN and infinities."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from es_flipout.strategy.shaping import centered_ranks, pair_differences, shape

# few distinct values, so that ties are common
RETURNS = st.lists(
    st.one_of(st.sampled_from([-0.0, 0.0, 1.0, -2.5, math.nan, math.inf, -math.inf]), st.floats(width=32)),
    min_size=1,
    max_size=40,
)


def counted_ranks(returns: list[float]) -> list[float]:
    """Compute average ranks, from 0, by comparing all pairs; scaled to [-1/2, 1/2]."""
    ordered = [-math.inf if math.isnan(value) else value for value in returns]
    size = len(ordered)
    ranks = [sum(b < a for b in ordered) + (sum(b == a for b in ordered) - 1) / 2 for a in ordered]
    return [rank / (size - 1) - 0.5 if size > 1 else 0.0 for rank in ranks]


@given(returns=RETURNS, dtype=st.sampled_from([torch.float32, torch.float64]))
def test_equal_counted_ranks(returns: list[float], dtype: torch.dtype) -> None:
    shaped = centered_ranks(torch.tensor(returns, dtype=dtype))
    assert shaped.dtype == torch.float32
    torch.testing.assert_close(shaped, torch.tensor(counted_ranks(returns)), rtol=0, atol=1e-7)


@given(returns=RETURNS)
def test_sum_to_zero_within_bounds(returns: list[float]) -> None:
    shaped = centered_ranks(torch.tensor(returns, dtype=torch.float64))
    assert abs(float(shaped.double().sum())) < 1e-7 * len(returns)
    assert float(shaped.abs().max()) <= 0.5


def test_known_ranks() -> None:
    returns = torch.tensor([3.0, math.nan, 1.0, -math.inf, 1.0, math.inf])
    expected = torch.tensor([4.0, 0.5, 2.5, 0.5, 2.5, 5.0]) / 5 - 0.5
    torch.testing.assert_close(centered_ranks(returns), expected)
    assert centered_ranks(torch.tensor([1.0, 2.0])).tolist() == [-0.5, 0.5]


@pytest.mark.parametrize("value", [0.0, 0.1, -1e30, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("size", [1, 2, 3, 6, 7, 1000])
def test_all_equal_gives_exact_zeros(value: float, size: int) -> None:
    assert centered_ranks(torch.full((size,), value)).tolist() == [0.0] * size


def test_zeros_of_both_signs_tie() -> None:
    assert centered_ranks(torch.tensor([0.0, -0.0, 0.0, -0.0])).tolist() == [0.0] * 4


def test_nan_and_minus_infinity_share_the_worst_place() -> None:
    shaped = centered_ranks(torch.tensor([math.nan, -1e38, -math.inf, math.nan]))
    torch.testing.assert_close(shaped, torch.tensor([-1 / 6, 0.5, -1 / 6, -1 / 6]))


def test_scale_of_returns_does_not_matter() -> None:
    returns = torch.randn(101, dtype=torch.float64)
    assert torch.equal(centered_ranks(returns), centered_ranks(1e6 * returns.exp() - 5))


def test_argument_is_not_changed() -> None:
    returns = torch.tensor([1.0, math.nan, 0.0])
    centered_ranks(returns)
    assert returns.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("shape", [(), (0,), (2, 3), (3, 1)])
def test_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shape"):
        centered_ranks(torch.zeros(shape))


# Differences of antithetic partners.

PAIRS = st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6)), min_size=1, max_size=20)


@given(pairs=PAIRS)
def test_differences_are_scaled_to_unit_root_mean_square(pairs: list[tuple[float, float]]) -> None:
    returns = torch.tensor(pairs, dtype=torch.float64).flatten()
    shaped = pair_differences(returns)
    assert shaped.dtype == torch.float32
    assert torch.equal(shaped[0::2], -shaped[1::2])
    difference = returns[0::2] - returns[1::2]
    folded = (shaped[0::2] - shaped[1::2]).double()
    root = math.sqrt(sum(float(d) ** 2 for d in difference) / len(pairs))
    if root == 0:
        assert not shaped.any()
    elif root > 1e-100:
        torch.testing.assert_close(folded, difference / root, rtol=1e-5, atol=1e-6)
        assert float(folded.square().mean().sqrt()) == pytest.approx(1, rel=1e-5)


def test_known_differences() -> None:
    returns = torch.tensor([5.0, 1.0, 100.0, 103.0, -7.0, -7.0])
    root = math.sqrt((16 + 9 + 0) / 3)
    expected = torch.tensor([4.0, -4.0, -3.0, 3.0, 0.0, 0.0]) / root / 2
    torch.testing.assert_close(pair_differences(returns), expected)
    assert torch.equal(shape(returns, "differences"), pair_differences(returns))
    assert torch.equal(shape(returns, "ranks"), centered_ranks(returns))


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_broken_partner_loses_by_the_largest_difference(bad: float) -> None:
    shaped = pair_differences(torch.tensor([5.0, 1.0, bad, 3.0, 2.0, bad, bad, bad]))
    one = float(shaped[0])
    assert shaped.tolist() == pytest.approx([one, -one, -one, one, one, -one, 0, 0])
    assert pair_differences(torch.tensor([bad, 3.0])).tolist() == [-0.5, 0.5]
    assert pair_differences(torch.tensor([math.inf, 3.0])).tolist() == [0.5, -0.5]


@pytest.mark.parametrize("shape_of_returns", [(3,), (0,), (2, 2)])
def test_differences_need_pairs(shape_of_returns: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="even P"):
        pair_differences(torch.zeros(shape_of_returns))
