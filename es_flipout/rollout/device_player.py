"""The player for rollouts on a device: :class:`DevicePlayer`."""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor

from es_flipout.errors import UserError
from es_flipout.policies.agent import Agent
from es_flipout.rollout.device import DEFAULT_LAUNCH, DeviceEnv, DeviceRollout, LaunchOptions, is_out_of_memory, layout
from es_flipout.rollout.episodes import Episodes, Rollout, ShouldStop
from es_flipout.rollout.players import Player
from es_flipout.strategy.population import Population
from es_flipout.strategy.unperturbed import Unperturbed

Result = TypeVar("Result")

_KEPT = 2  # one layout for training and one for scoring


class DevicePlayer(Player):
    """Plays in environments on a device, with everything else there, too (see :mod:`es_flipout.rollout.device`).

    If the device runs out of memory, the number of slots is halved and the generation is played again.

    Attributes:
        slots: current number of environments stepped in parallel; fewer are used if there are fewer episodes.
    """

    def __init__(
        self,
        agent: Agent,
        make_env: Callable[[int], DeviceEnv],
        slots: int,
        say: Callable[[str], None] | None = None,
        launch: LaunchOptions = DEFAULT_LAUNCH,
    ) -> None:
        """Create the environments.

        Args:
            agent: see :class:`es_flipout.rollout.players.Player`.
            make_env: creates a batch of the given number of environments.
            slots: environments stepped in parallel.
            say: called with one-line messages for the user.
            launch: see :class:`es_flipout.rollout.device.DeviceRollout`.
        """
        self.agent = agent
        self._make_env, self._say, self._launch = make_env, say, launch
        self._envs: dict[int, DeviceEnv] = {}
        self._rollouts: dict[Hashable, DeviceRollout] = {}
        self._overflow_told = False
        self.slots = slots
        self.max_episode_steps = self._with_less_memory(lambda: self.env(self.slots)).max_episode_steps

    def play(
        self, population: Population | Unperturbed, episodes: Episodes, should_stop: ShouldStop | None = None
    ) -> Rollout:
        """See :meth:`es_flipout.rollout.players.Player.play`."""

        def play() -> Rollout:
            rollout = self._rollout(population, episodes)
            played = rollout.play(population, episodes, should_stop)
            self._tell_overflow(rollout.env)
            return played

        return self._with_less_memory(play)

    def draw_ahead(self, seeds: Callable[[], Tensor]) -> None:
        """See :meth:`es_flipout.rollout.players.Player.draw_ahead`; the device computes meanwhile."""
        drawn = seeds()
        env = self._with_less_memory(lambda: self.env(min(drawn.numel(), self.slots)))
        env.draw_ahead(drawn.flatten())

    def close(self) -> None:
        """See :meth:`es_flipout.rollout.players.Player.close`."""
        self._rollouts.clear()
        for env in self._envs.values():
            env.close()
        self._envs.clear()

    def env(self, slots: int) -> DeviceEnv:
        """Return the batch of ``slots`` environments, which is created once."""
        if slots not in self._envs:
            self._envs[slots] = self._make_env(slots)
        return self._envs[slots]

    def _rollout(self, population: Population | Unperturbed, episodes: Episodes) -> DeviceRollout:
        key = layout(population, episodes)
        rollout = self._rollouts.pop(key, None)
        if rollout is None:
            while len(self._rollouts) >= _KEPT:
                del self._rollouts[next(iter(self._rollouts))]
            env = self.env(min(episodes.jobs, self.slots))
            rollout = DeviceRollout(env, self.agent, population, episodes, self._launch)
        self._rollouts[key] = rollout  # moved to the end, as the most recently used one
        return rollout

    def _tell(self, message: str) -> None:
        if self._say is not None:
            self._say(message)

    def _with_less_memory(self, work: Callable[[], Result]) -> Result:
        """Return the result of ``work``; halve the slots and repeat it while the device runs out of memory."""
        while True:
            try:
                return work()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if self.slots == 1:
                    raise UserError("the device has too little memory even for one environment") from None
            # Outside of the handler, the exception no longer keeps tensors alive.
            before, self.slots = self.slots, self.slots // 2
            self.close()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._tell(
                f"warning: the device has too little memory for {before} parallel environments; continuing with "
                f"{self.slots}"
            )

    def _tell_overflow(self, env: DeviceEnv) -> None:
        """Warn once if environments exceeded the maximum number of contacts."""
        overflow = getattr(env, "overflow", None)
        if overflow is None or self._overflow_told:
            return
        slots = overflow()
        if slots:
            self._overflow_told = True
            self._tell(
                f"warning: {env.env_id}: {slots} of {env.num_envs} environments exceeded the maximum number of "
                "contacts, so their motion is not exact"
            )
