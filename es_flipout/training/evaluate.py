"""The final score: the deterministic mean policy in the single Gymnasium environment."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.wrappers import FlattenObservation
from torch import Tensor

from es_flipout.config import TrainConfig
from es_flipout.envs.base import EnvironmentFailureError, described
from es_flipout.envs.make import NAMESPACE
from es_flipout.envs.observed import SelectObservation
from es_flipout.policies.agent import Agent
from es_flipout.runinfo import versions

FIRST_SEED = 1_000_000
"""Seed of the first start state of an evaluation, by default."""


@dataclass(frozen=True)
class Evaluation:
    """Undiscounted returns over ``episodes`` episodes with the seeds ``first_seed``, ``first_seed + 1``, ...

    Attributes:
        which: which mean policy of a run was scored, ``"best"`` or ``"last"``.
        generation: the generation that this policy is of, where that is known.
    """

    env_id: str
    env_kwargs: dict[str, Any]
    episodes: int
    mean_return: float
    std_return: float
    median_return: float
    min_return: float
    max_return: float
    mean_length: float
    first_seed: int
    versions: dict[str, str]
    which: str | None = None
    generation: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of ``evaluation.json``; non-finite values, which JSON does not support, become None."""
        values = asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def make_real_env(env_id: str, kwargs: dict[str, Any], observed: tuple[int, ...] | None = None) -> gymnasium.Env:
    """Create a single environment of Gymnasium itself, never a native one, with one-dimensional observations.

    Args:
        env_id: a Gymnasium id.
        kwargs: keyword arguments of ``gymnasium.make``.
        observed: entries of the observation to keep; by default all.
    """
    env = gymnasium.make(env_id.removeprefix(NAMESPACE), **kwargs)
    space = env.observation_space
    flat = isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 1
    env = env if flat else FlattenObservation(env)
    return env if observed is None else SelectObservation(env, observed)


def in_space(action: Tensor, space: gymnasium.Space) -> int | np.ndarray:
    """Convert an action of this package, where discrete actions start at 0 and all are flat, to one of Gymnasium."""
    if isinstance(space, gymnasium.spaces.Discrete):
        return int(action) + int(space.start)
    if isinstance(space, gymnasium.spaces.MultiDiscrete):
        return action.numpy().reshape(space.shape).astype(space.dtype) + space.start
    assert space.shape is not None
    return action.numpy().astype(space.dtype, copy=False).reshape(space.shape)


def evaluate(
    agent: Agent,
    config: TrainConfig,
    episodes: int,
    first_seed: int = FIRST_SEED,
    on_episode: Callable[[int], None] | None = None,
) -> Evaluation:
    """Play ``episodes`` episodes in sequence.

    Args:
        agent: the policy.
        config: configuration with the environment and its keyword arguments.
        episodes: number of episodes.
        first_seed: seed of the first start state.
        on_episode: called with the number of episodes played so far.

    Raises:
        EnvironmentFailureError: the environment's own code raised an exception.
    """
    task = config.task
    kwargs = task.parsed_env_kwargs()
    env = make_real_env(task.env_id, kwargs, task.observed)
    returns, lengths = np.zeros(episodes), np.zeros(episodes, np.int64)
    try:
        for episode in range(episodes):
            obs, _ = env.reset(seed=first_seed + episode)
            state, ended = agent.initial_state(1), False
            while not ended:
                action, state = agent.act(torch.as_tensor(np.asarray(obs))[None], state)
                obs, reward, terminated, truncated, _ = env.step(in_space(action[0], env.action_space))
                returns[episode] += float(reward)
                lengths[episode] += 1
                ended = terminated or truncated
            if on_episode is not None:
                on_episode(episode + 1)
    except (Exception, SystemExit) as error:
        raise EnvironmentFailureError(f"{task.env_id} failed: {described(error)}") from error
    finally:
        env.close()
    return Evaluation(
        env_id=task.env_id,
        env_kwargs=kwargs,
        episodes=episodes,
        mean_return=float(returns.mean()),
        std_return=float(returns.std()),
        median_return=float(np.median(returns)),
        min_return=float(returns.min()),
        max_return=float(returns.max()),
        mean_length=float(lengths.mean()),
        first_seed=first_seed,
        versions=versions(),
    )
