"""Who plays the episodes of a generation: :class:`Player`, and the one that plays them in environments of this process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import gymnasium
from torch import Tensor, nn

from es_flipout.config import TrainConfig
from es_flipout.envs import BatchEnv, make_env, native_env_ids
from es_flipout.envs.make import NAMESPACE
from es_flipout.envs.mujoco_cpu import usable_cores
from es_flipout.policies import ActionMap
from es_flipout.population import Population, Unperturbed, row_block_for
from es_flipout.rollout import MOMENT_JOBS, Rollout, run

_MOST_SLOTS = {"torch": 4096, "mujoco": 1024, "gymnasium": 32}


class Player(ABC):
    """Plays episodes of populations, wherever the environments are.

    Attributes:
        observation_space, action_space, observation_shape, max_episode_steps: of one environment, as in
            :class:`es_flipout.envs.BatchEnv`.
        warnings: what the user should know of this arrangement.
    """

    observation_space: gymnasium.spaces.Box
    action_space: gymnasium.spaces.Box | gymnasium.spaces.Discrete
    observation_shape: tuple[int, ...]
    max_episode_steps: int | None
    warnings: Sequence[str] = ()

    @abstractmethod
    def play(
        self,
        population: Population | Unperturbed,
        episodes: int = 1,
        *,
        observation_norm: Callable[[Tensor], Tensor],
        action_map: ActionMap,
        seeds: Tensor,
        max_episode_steps: int | None = None,
        remove_alive_bonus: bool = False,
        collect_moments: bool = True,
        moment_jobs: int = MOMENT_JOBS,
        should_stop: Callable[[], bool] | None = None,
    ) -> Rollout:
        """As :func:`es_flipout.rollout.run`; the result does not depend on who plays."""

    def close(self) -> None:  # noqa: B027 (not every player holds something)
        """Release environments, processes and connections."""

    def _describe(self, env: BatchEnv) -> None:
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self.observation_shape, self.max_episode_steps = env.observation_shape, env.max_episode_steps


class LocalPlayer(Player):
    """Plays in environments of this process.

    Attributes:
        envs: one batch of environments, or two that take turns.
    """

    def __init__(self, envs: Sequence[BatchEnv]) -> None:
        self.envs = list(envs)
        self._describe(self.envs[0])

    def play(
        self,
        population: Population | Unperturbed,
        episodes: int = 1,
        *,
        observation_norm: Callable[[Tensor], Tensor],
        action_map: ActionMap,
        seeds: Tensor,
        max_episode_steps: int | None = None,
        remove_alive_bonus: bool = False,
        collect_moments: bool = True,
        moment_jobs: int = MOMENT_JOBS,
        should_stop: Callable[[], bool] | None = None,
    ) -> Rollout:
        """See :meth:`Player.play`."""
        return run(
            population,
            self.envs,
            episodes,
            observation_norm=observation_norm,
            action_map=action_map,
            seeds=seeds,
            max_episode_steps=max_episode_steps,
            remove_alive_bonus=remove_alive_bonus,
            collect_moments=collect_moments,
            moment_jobs=moment_jobs,
            should_stop=should_stop,
        )

    def close(self) -> None:
        """See :meth:`Player.close`."""
        for env in self.envs:
            env.close()


def slots_for(config: TrainConfig) -> int:
    """Environments that one machine steps side by side for this run."""
    if config.slots is not None:
        return config.slots
    backend = native_env_ids().get(config.env_id.removeprefix(NAMESPACE), "gymnasium")
    return min(config.population_size * config.episodes, _MOST_SLOTS[backend])


def row_block_of(config: TrainConfig, module: nn.Module) -> int:
    """Rows of one policy computation of this run, whoever plays: of all slots, so that lanes and machines do not matter."""
    slots = slots_for(config)
    return config.row_block or (slots if config.device == "cuda" else row_block_for(module, slots))


def make_lanes(config: TrainConfig, slots: int) -> list[BatchEnv]:
    """The environments: two halves where physics and policy are to overlap, else one batch."""
    kwargs = config.parsed_env_kwargs()
    backend = native_env_ids().get(config.env_id.removeprefix(NAMESPACE), "gymnasium")
    cores = usable_cores()
    # With two cores and no GPU the policy only takes from the physics what the overlap gives (results/LOG.md).
    on_gpu = config.device == "cuda"
    overlap = config.overlap if config.overlap is not None else on_gpu or (cores > 2 and backend == "mujoco")
    if backend == "torch" or not overlap or slots < 2:
        return [make_env(config.env_id, slots, threads=config.threads, observed=config.observed, **kwargs)]
    # Each half has its share of the threads: two batches that compete for all cores wait for each other at every step.
    threads = config.threads if config.threads is not None else cores
    halves = [(slots - slots // 2, threads - threads // 2), (slots // 2, max(threads // 2, 1))]
    return [make_env(config.env_id, n, threads=share, observed=config.observed, **kwargs) for n, share in halves]
