"""Steps a batch of environments and Gymnasium's own single environments, the oracle, in lockstep."""

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray

from es_flipout.envs import BatchEnv

Arrays = tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]


class Oracle:
    """One Gymnasium environment per slot, with the interface of a batch in NumPy."""

    def __init__(self, env_id: str, num_envs: int, **kwargs: Any) -> None:
        self.envs = [gymnasium.make(env_id, **kwargs) for _ in range(num_envs)]
        self.observation: NDArray[Any] = np.empty(0)

    def reset(self, seeds: NDArray[np.int64], mask: NDArray[np.bool_] | None = None) -> NDArray[Any]:
        rows = [
            env.reset(seed=int(seed))[0] if mask is None or mask[i] else self.observation[i]
            for i, (env, seed) in enumerate(zip(self.envs, seeds, strict=True))
        ]
        self.observation = np.stack(rows)
        return self.observation

    def step(self, action: NDArray[Any]) -> Arrays:
        results = [env.step(row)[:4] for env, row in zip(self.envs, action, strict=True)]
        observation, reward, terminated, truncated = (np.array(column) for column in zip(*results, strict=True))
        self.observation = observation
        return observation, reward.astype(np.float64), terminated, truncated


def random_action(env: BatchEnv, rng: np.random.Generator, dtype: type = np.float32) -> NDArray[Any]:
    """Draw actions of all slots; continuous ones exceed the bounds by up to a fifth."""
    space = env.action_space
    if isinstance(space, gymnasium.spaces.Discrete):
        return rng.integers(0, space.n, env.num_envs)
    assert isinstance(space, gymnasium.spaces.Box)
    scale = np.where(np.isfinite(space.high), space.high, 1.0)
    return (rng.uniform(-1.2, 1.2, (env.num_envs, *space.shape)) * scale).astype(dtype)


def check_against_gymnasium(
    env: BatchEnv,
    *,
    steps: int,
    action: Callable[[np.random.Generator], NDArray[Any]],
    reward_tolerance: float = 0.0,
) -> int:
    """Assert equality step by step, with new episodes when old ones end; return the number of finished episodes."""
    oracle = Oracle(env.env_id, env.num_envs, **env.kwargs)
    assert env.observation_space == oracle.envs[0].observation_space
    assert env.action_space == oracle.envs[0].action_space
    rng, ended = np.random.default_rng(7), 0
    seeds = np.arange(env.num_envs)
    np.testing.assert_array_equal(env.reset(torch.from_numpy(seeds)).numpy(), oracle.reset(seeds))
    for _ in range(steps):
        actions = action(rng)
        got = [value.numpy() for value in env.step(torch.from_numpy(actions))]
        expected = oracle.step(actions)
        assert got[0].dtype == env.observation_space.dtype
        assert got[1].dtype == np.float64
        np.testing.assert_array_equal(got[0], expected[0])
        np.testing.assert_allclose(got[1], expected[1], rtol=0, atol=reward_tolerance)
        np.testing.assert_array_equal(got[2], expected[2])
        np.testing.assert_array_equal(got[3], expected[3])
        done = got[2] | got[3]
        if done.any():
            ended += int(done.sum())
            seeds = seeds + env.num_envs
            observation = env.reset(torch.from_numpy(seeds), torch.from_numpy(done)).numpy()
            np.testing.assert_array_equal(observation, oracle.reset(seeds, done))
    assert not env.diverged.any()
    return ended
