"""Environments with a part of their observations: the batch and the Gymnasium wrapper are equal."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch

from es_flipout.envs import SelectObservation, UnsupportedEnvironmentError, make_env
from es_flipout.envs.gymnasium_adapter import GymnasiumBatchEnv


@pytest.mark.parametrize(("env_id", "observed"), [("CartPole-v1", (2, 0)), ("InvertedPendulum-v5", (1,))])
def test_batch_and_wrapper_show_the_same(env_id: str, observed: tuple[int, ...]) -> None:
    batch = make_env(env_id, 3, observed=observed)
    env = SelectObservation(gymnasium.make(env_id), observed)
    assert batch.observation_space == env.observation_space
    assert batch.observation_shape == env.observation_space.shape == (len(observed),)
    seeds = torch.tensor([3, 4, 5])
    shown = batch.reset(seeds)
    expected, _ = env.reset(seed=4)
    np.testing.assert_array_equal(shown[1].numpy(), expected)
    action = torch.ones(3, dtype=torch.int64) if env_id == "CartPole-v1" else torch.full((3, 1), 0.5)
    for _ in range(4):
        shown, reward, terminated, truncated = batch.step(action)
        expected, own_reward, own_terminated, _, _ = env.step(action[1].numpy())
        np.testing.assert_allclose(shown[1].numpy(), expected, rtol=1e-6)
        assert (float(reward[1]), bool(terminated[1]), bool(truncated[1])) == (own_reward, own_terminated, False)
    whole, _ = env.unwrapped.reset(seed=4)
    np.testing.assert_array_equal(batch.reset(seeds)[1].numpy(), whole[list(observed)])
    assert not batch.diverged.any()
    batch.close()


@pytest.mark.parametrize(("observed", "got"), [((4,), "4"), ((0, -1), "-1"), ((), "none")])
def test_entries_that_do_not_exist(observed: tuple[int, ...], got: str) -> None:
    with pytest.raises(
        UnsupportedEnvironmentError, match=rf"CartPole-v1: observed entries must be in \[0, 4\), got {got}"
    ):
        make_env("CartPole-v1", 2, observed=observed)
    with pytest.raises(UnsupportedEnvironmentError, match=r"in \[0, 4\)"):
        SelectObservation(gymnasium.make("CartPole-v1"), observed)


def test_entries_of_a_space_without_entries() -> None:
    with pytest.raises(UnsupportedEnvironmentError, match="one-dimensional Box"):
        SelectObservation(gymnasium.make("FrozenLake-v1"), (0,))


@pytest.mark.parametrize(("env_id", "shape"), [("CartPole-v1", (4,)), ("Blackjack-v1", (45,)), ("Grid-v0", (3, 4))])
def test_shape_before_flattening(env_id: str, shape: tuple[int, ...]) -> None:
    class Grid(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(0, 255, (3, 4), np.uint8)
        action_space = gymnasium.spaces.Discrete(2)

    gymnasium.register("Grid-v0", entry_point=lambda **kwargs: Grid())
    try:
        assert GymnasiumBatchEnv(env_id, 1, {}).observation_shape == shape
    finally:
        del gymnasium.registry["Grid-v0"]
