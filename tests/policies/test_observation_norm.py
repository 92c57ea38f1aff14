"""Observation statistics, compared with NumPy on all data at once, and their application."""

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from es_flipout.errors import UserError
from es_flipout.policies.observation_norm import BoundsNorm, Identity, Moments, ObservationNorm


def moments(data: NDArray[np.float64]) -> Moments:
    """Return sums over the rows of ``data`` ``(n, O)``."""
    return Moments(float(len(data)), torch.from_numpy(data.sum(0)), torch.from_numpy((data**2).sum(0)))


def fed(*pieces: NDArray[np.float64]) -> ObservationNorm:
    norm = ObservationNorm(pieces[0].shape[1])
    for piece in pieces:
        norm.update(moments(piece))
    return norm


def standardised(x: NDArray[np.float64], data: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute the documented normalization with NumPy in float64."""
    return np.clip((x - data.mean(0)) / np.maximum(data.std(0), 0.01), -10, 10)


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 1),
    scale=st.sampled_from([0.1, 1.0, 1e3]),
    mean=st.sampled_from([0.0, -3.0, 100.0]),
    seed=st.integers(0, 1000),
)
def test_merged_pieces_equal_numpy_over_all_data(sizes: list[int], scale: float, mean: float, seed: int) -> None:
    data = np.random.default_rng(seed).normal(mean, scale, (sum(sizes), 4))
    norm = fed(*np.split(data, np.cumsum(sizes)[:-1]))
    assert float(norm.count) == len(data)
    np.testing.assert_allclose(norm.mean.numpy(), data.mean(0), rtol=1e-12, atol=1e-12 * scale)
    np.testing.assert_allclose((norm.deviations / norm.count).numpy(), data.var(0), rtol=1e-7, atol=1e-10 * mean**2)
    x = torch.from_numpy(data[:10])
    np.testing.assert_allclose(norm(x).numpy(), standardised(data[:10], data), rtol=1e-3, atol=1e-3)


def test_drifting_mean_enters_the_variance() -> None:
    pieces = [np.random.default_rng(i).normal(10.0 * i, 1.0, (50, 2)) for i in range(5)]
    norm = fed(*pieces)
    np.testing.assert_allclose((norm.deviations / norm.count).numpy(), np.concatenate(pieces).var(0), rtol=1e-10)


def test_large_mean() -> None:
    rng = np.random.default_rng(0)
    data = np.stack([rng.normal(1e5, 1.0, 5000), rng.normal(-1e6, 10.0, 5000), rng.normal(1e4, 0.05, 5000)], axis=1)
    norm = fed(*np.split(data, 10))
    np.testing.assert_allclose((norm.deviations / norm.count).numpy(), data.var(0), rtol=1e-3)
    np.testing.assert_allclose(norm.mean.numpy(), data.mean(0), rtol=1e-12)


def test_large_mean_is_taken_off() -> None:
    data = np.random.default_rng(0).normal(1e4, 1.0, (2000, 1))  # float32 has steps of 0.001 here
    norm = fed(data)
    np.testing.assert_allclose(norm(torch.from_numpy(data)).numpy(), standardised(data, data), atol=2e-3)


def test_constant_entries_meet_the_floor() -> None:
    data = np.full((100, 2), 7.0)
    data[:, 1] += np.random.default_rng(0).normal(0, 1e-3, 100)  # varies less than the floor
    norm = fed(data)
    x = torch.tensor([[7.05, 7.05], [6.95, 6.95]], dtype=torch.float64)
    np.testing.assert_allclose(norm(x).numpy(), standardised(x.numpy(), data), atol=2e-3)
    assert float(norm(x)[0, 0]) == pytest.approx(5.0, abs=1e-3)


def test_clips_at_ten() -> None:
    norm = fed(np.random.default_rng(0).normal(0, 1, (500, 1)))
    out = norm(torch.tensor([[1e6], [-1e6], [torch.inf], [-torch.inf], [9.0]], dtype=torch.float64))
    assert out[:4, 0].tolist() == [10.0, -10.0, 10.0, -10.0]
    assert 8 < float(out[4, 0]) < 10


def test_before_any_data_only_clips() -> None:
    norm = ObservationNorm(2)
    x = torch.tensor([[0.25, -3.0]], dtype=torch.float64)
    assert norm(x).dtype == torch.float32
    assert norm(x).tolist() == [[0.25, -3.0]]


def test_a_single_observation_gives_no_deviation() -> None:
    norm = fed(np.array([[5.0, -1.0]]))
    assert norm(torch.tensor([[6.0, -1.0]])).tolist() == [[1.0, 0.0]]


def test_shapes_dtypes_and_argument() -> None:
    norm = fed(np.random.default_rng(0).normal(0, 2, (50, 3)))
    for dtype in (torch.float32, torch.float64):
        x = torch.ones(4, 5, 3, dtype=dtype)
        out = norm(x)
        assert (out.shape, out.dtype) == (x.shape, torch.float32)
        assert torch.equal(x, torch.ones_like(x)), "the caller's observations must not be modified"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_moments_that_are_not_finite_are_left_out(bad: float) -> None:
    data = np.random.default_rng(0).normal(0, 1, (50, 2))
    norm, other = fed(data), fed(data)
    spoiled = data.copy()
    spoiled[3, 1] = bad
    norm.update(moments(spoiled))
    norm.update(Moments(0.0, torch.zeros(2), torch.zeros(2)))
    assert same(norm.state_dict(), other.state_dict())


def test_update_changes_no_earlier_state() -> None:
    norm = fed(np.random.default_rng(0).normal(0, 1, (50, 2)))
    state = norm.state_dict()
    kept = {name: value.clone() for name, value in state.items()}
    norm.update(moments(np.ones((20, 2))))
    assert same(state, kept)
    assert not same(norm.state_dict(), kept)


def test_state_round_trip_continues_to_the_bit() -> None:
    first, second = np.random.default_rng(0).normal(3, 2, (2, 40, 3))
    norm = fed(first)
    other = ObservationNorm(3)
    other.load_state_dict(norm.state_dict())
    x = torch.from_numpy(second)
    assert torch.equal(norm(x), other(x))
    norm.update(moments(second))
    other.update(moments(second))
    assert same(norm.state_dict(), other.state_dict())
    assert torch.equal(norm(x), other(x))


def test_identity_only_converts() -> None:
    x = torch.tensor([[1e6, -0.1]], dtype=torch.float64)
    assert torch.equal(Identity()(x), x.float())


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_bounds_are_scaled_to_the_unit_interval() -> None:
    space = gymnasium.spaces.Box(np.array([0, -2, 5], np.float32), np.array([255, 2, 5], np.float32))
    norm = BoundsNorm(space)
    scaled = norm(torch.tensor([[0.0, -2.0, 5.0], [255.0, 0.0, 5.0]], dtype=torch.float64))
    assert scaled.dtype == torch.float32
    torch.testing.assert_close(scaled, torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.5, 0.0]]))
    booleans = BoundsNorm(gymnasium.spaces.Box(0, 1, (2,), np.bool_))  # pyright: ignore  (as in MinAtar)
    assert booleans(torch.tensor([[True, False]])).tolist() == [[1.0, 0.0]]


def test_images_need_finite_bounds() -> None:
    with pytest.raises(UserError, match="finite bounds"):
        BoundsNorm(gymnasium.spaces.Box(-np.inf, np.inf, (2,)))
