"""The native environments as Gymnasium vector environments, compared with ``SyncVectorEnv``."""

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from es_flipout.envs import NativeVectorEnv

MODES = [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED]


def make_pair(env_id: str, num_envs: int, mode: AutoresetMode) -> tuple[NativeVectorEnv, gymnasium.vector.VectorEnv]:
    ours = gymnasium.make_vec(f"es_flipout/{env_id}", num_envs, autoreset_mode=mode)
    assert isinstance(ours, NativeVectorEnv)
    theirs = gymnasium.make_vec(env_id, num_envs, "sync", vector_kwargs={"autoreset_mode": mode})
    return ours, theirs


def assert_same_step(ours: tuple[Any, ...], theirs: tuple[Any, ...]) -> None:
    for a, b in zip(ours[:4], theirs[:4], strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-9 if a.ndim == 1 else 0)
    assert ("final_obs" in ours[4]) == ("final_obs" in theirs[4])
    if "final_obs" in ours[4]:
        np.testing.assert_array_equal(ours[4]["_final_obs"], theirs[4]["_final_obs"])
        np.testing.assert_array_equal(ours[4]["_final_info"], theirs[4]["_final_info"])
        for a, b in zip(ours[4]["final_obs"], theirs[4]["final_obs"], strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("env_id", "least_ended"), [("Hopper-v5", 250), ("CartPole-v1", 200), ("Pendulum-v1", 16)])
def test_equals_sync_vector_env(env_id: str, least_ended: int, mode: AutoresetMode) -> None:
    ours, theirs = make_pair(env_id, 16, mode)
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    ours.action_space.seed(3)
    np.testing.assert_array_equal(ours.reset(seed=5)[0], theirs.reset(seed=5)[0])
    ended = 0
    for _ in range(400):
        action = ours.action_space.sample()
        got, expected = ours.step(action), theirs.step(action)
        assert_same_step(got, expected)
        done = got[2] | got[3]
        ended += int(done.sum())
        if mode is AutoresetMode.DISABLED and done.any():
            observation = ours.reset(options={"reset_mask": done})[0]
            np.testing.assert_array_equal(observation, theirs.reset(options={"reset_mask": done.copy()})[0])
    assert ended >= least_ended


def test_generators_continue_over_resets() -> None:
    ours, theirs = make_pair("Reacher-v5", 3, AutoresetMode.NEXT_STEP)
    seeds: list[Any] = [1, None, [4, None, 6], None]
    for seed in seeds:
        np.testing.assert_array_equal(ours.reset(seed=seed)[0], theirs.reset(seed=seed)[0])


def test_unseeded_reset_is_random() -> None:
    env = gymnasium.make_vec("es_flipout/CartPole-v1", 2)
    assert not np.array_equal(env.reset()[0], gymnasium.make_vec("es_flipout/CartPole-v1", 2).reset()[0])


def test_stepping_an_ended_slot_without_autoreset_fails() -> None:
    env = gymnasium.make_vec("es_flipout/CartPole-v1", 2, max_episode_steps=1, autoreset_mode="Disabled")
    env.reset(seed=0)
    env.step(np.zeros(2, np.int64))
    with pytest.raises(AssertionError, match=r"slots \[0, 1\] have ended"):
        env.step(np.zeros(2, np.int64))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"low": 0.0}, ValueError),
        ({"reset_mask": [True, False]}, TypeError),
        ({"reset_mask": np.zeros(2, np.bool_)}, ValueError),
        ({"reset_mask": np.ones(3, np.bool_)}, ValueError),
    ],
)
def test_bad_reset_options(options: dict, error: type[Exception]) -> None:
    env = gymnasium.make_vec("es_flipout/CartPole-v1", 2)
    with pytest.raises(error):
        env.reset(options=options)


def test_keywords_pass_through() -> None:
    env = gymnasium.make_vec(
        "es_flipout/Ant-v5", 2, threads=1, include_cfrc_ext_in_observation=False, max_episode_steps=3
    )
    assert env.single_observation_space.shape == (27,)
    env.reset(seed=0)
    truncated = [env.step(np.zeros((2, 8), np.float32))[3].all() for _ in range(3)]
    assert truncated == [False, False, True]


def test_single_environment_is_gymnasiums() -> None:
    env = gymnasium.make("es_flipout/HalfCheetah-v5")
    expected = gymnasium.make("HalfCheetah-v5")
    np.testing.assert_array_equal(env.reset(seed=1)[0], expected.reset(seed=1)[0])
