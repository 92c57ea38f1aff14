"""Plays the episodes of a generation on a device that the host never waits for: :class:`DevicePlayer`."""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor

from es_flipout.device_rollout import STEPS_PER_LAUNCH, DeviceEnv, DeviceRollout, is_out_of_memory, layout
from es_flipout.errors import UserError
from es_flipout.player import Player
from es_flipout.policies import ActionMap
from es_flipout.population import Population, Unperturbed
from es_flipout.rollout import MOMENT_JOBS, Rollout

Result = TypeVar("Result")

_KEPT = 2  # training and scoring have a layout each


class DevicePlayer(Player):
    """Plays in environments on a device, with everything else there too (see :mod:`es_flipout.device_rollout`).

    Where the memory of the device is too small, the slots are halved and the generation is played again.

    Args:
        make_env: makes a batch of so many environments.
        slots: environments stepped side by side; fewer where there are fewer episodes.
        say: called with a line when something has to be told.
        steps_per_launch: see :class:`es_flipout.device_rollout.DeviceRollout`.

    Attributes:
        slots: as they are now.
    """

    def __init__(
        self,
        make_env: Callable[[int], DeviceEnv],
        slots: int,
        say: Callable[[str], None] = lambda message: None,
        steps_per_launch: int = STEPS_PER_LAUNCH,
    ) -> None:
        self._make_env, self._say, self._steps_per_launch = make_env, say, steps_per_launch
        self._envs: dict[int, DeviceEnv] = {}
        self._rollouts: dict[Hashable, DeviceRollout] = {}
        self._overflow_told = False
        self.slots = slots
        env = self._with_less_memory(lambda: self._env(self.slots))
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self.observation_shape, self.max_episode_steps = env.observation_shape, env.max_episode_steps

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
        """See :meth:`es_flipout.player.Player.play`."""

        def play() -> Rollout:
            jobs = moment_jobs if collect_moments else 0
            device_rollout = self._rollout(population, episodes, observation_norm, action_map, jobs)
            played = device_rollout.play(
                population, observation_norm, seeds, max_episode_steps, remove_alive_bonus, should_stop
            )
            self._tell_overflow(device_rollout.env)
            return played

        return self._with_less_memory(play)

    def close(self) -> None:
        """See :meth:`es_flipout.player.Player.close`."""
        self._rollouts.clear()
        for env in self._envs.values():
            env.close()
        self._envs.clear()

    def _env(self, slots: int) -> DeviceEnv:
        if slots not in self._envs:
            self._envs[slots] = self._make_env(slots)
        return self._envs[slots]

    def _rollout(
        self,
        population: Population | Unperturbed,
        episodes: int,
        norm: Callable[[Tensor], Tensor],
        action_map: ActionMap,
        moment_jobs: int,
    ) -> DeviceRollout:
        key = layout(population, episodes, norm, action_map, moment_jobs)
        rollout = self._rollouts.pop(key, None)
        if rollout is None:
            while len(self._rollouts) >= _KEPT:
                del self._rollouts[next(iter(self._rollouts))]
            env = self._env(min(population.size * episodes, self.slots))
            rollout = DeviceRollout(env, population, episodes, norm, action_map, moment_jobs, self._steps_per_launch)
        self._rollouts[key] = rollout  # last, for it was used last
        return rollout

    def _with_less_memory(self, work: Callable[[], Result]) -> Result:
        """The result of ``work``, with half the slots as often as memory is too small."""
        while True:
            try:
                return work()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if self.slots == 1:
                    raise UserError("the device has too little memory even for one environment") from None
            # Out here the error no longer holds on to what was being computed.
            before, self.slots = self.slots, self.slots // 2
            self.close()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._say(
                f"warning: the device has too little memory for {before} environments side by side; going on with "
                f"{self.slots}"
            )

    def _tell_overflow(self, env: DeviceEnv) -> None:
        """Say once that the physics had too little room."""
        overflow = getattr(env, "overflow", None)
        if overflow is None or self._overflow_told:
            return
        slots = overflow()
        if slots:
            self._overflow_told = True
            self._say(
                f"warning: {env.env_id}: {slots} of {env.num_envs} environments had more contacts than there was room "
                "for, so their motion is not exact"
            )
