"""The contenders of ``bench compare``: trainers whose generations are timed from outside and by their own clocks."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import override

from es_flipout.bench.classic.player import ClassicPlayer
from es_flipout.bench.timing import Measure, timed
from es_flipout.envs import BatchEnv
from es_flipout.rollout.players import LocalPlayer
from es_flipout.training.trainer import Trainer

STAGES = ("physics", "policy", "communication", "update")


class TimedEnv(BatchEnv):
    """A batch of environments that accumulates the time of another one's steps and resets.

    Attributes:
        env: the timed batch.
        seconds: time spent in its steps and resets.
    """

    seconds = 0.0

    def __init__(self, env: BatchEnv) -> None:
        for name in BatchEnv.__annotations__:
            if name != "diverged":
                setattr(self, name, getattr(env, name))
        self.env = env

    @property
    def observation_shape(self) -> tuple[int, ...]:
        """See :class:`BatchEnv`."""
        return self.env.observation_shape

    @property
    def diverged(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See :class:`BatchEnv`."""
        return self.env.diverged

    @override
    def reset(self, seeds: Tensor, mask: Tensor | None = None) -> Tensor:
        started = time.perf_counter()
        obs = self.env.reset(seeds, mask)
        self.seconds += time.perf_counter() - started
        return obs

    @override
    def step(self, action: Tensor, live: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        started = time.perf_counter()
        outcome = self.env.step(action, live)
        self.seconds += time.perf_counter() - started
        return outcome

    @override
    def close(self) -> None:
        self.env.close()


@dataclass
class Contender:
    """One of the systems that are compared.

    Attributes:
        name: name in the report.
        trainer: the trainer that runs its generations.
        cores: number of CPU cores that it uses.
        workers: number of classic Ray workers; None for this engine.
        lengths: mean episode length of every measured generation.
    """

    name: str
    trainer: Trainer
    cores: int
    workers: int | None = None
    lengths: list[float] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        """Whether policies are computed on a GPU."""
        return self.trainer.strategy.device.type == "cuda"

    def measure(self, seconds: float) -> Measure:
        """Return a measurement of live environment steps over whole generations."""

        def play() -> int:
            self._choose_workers()
            started, steps = time.perf_counter(), 0
            while steps == 0 or time.perf_counter() - started < seconds:
                rollout = self.trainer.generation()
                steps += rollout.env_steps
                self.lengths.append(float(rollout.lengths.to(torch.float64).mean()))
            return steps

        return lambda: timed(play)

    def split(self) -> Mapping[str, float | None]:
        """Run one generation and return fractions of its time by stage; None for stages that cannot be separated."""
        self._choose_workers()
        player = self.trainer.player
        if isinstance(player, ClassicPlayer):
            player.profile = True
            try:
                self.trainer.generation()
            finally:
                player.profile = False
            times = player.times
            physics, busy = (times.step + times.reset) / player.active, times.busy / player.active
            return self._fractions(physics, busy - physics, self.trainer.seconds.play - busy)
        if isinstance(player, LocalPlayer) and not self.on_gpu:
            clocks = [env for env in player.envs if isinstance(env, TimedEnv)]
            before = sum(clock.seconds for clock in clocks)
            self.trainer.generation()
            playing = self.trainer.seconds.play
            # The physics of one half overlaps with the policy of the other; policy time is what physics does not hide.
            physics = min((sum(clock.seconds for clock in clocks) - before) / len(clocks), playing)
            return self._fractions(physics, playing - physics, 0.0)
        self.trainer.generation()
        return self._fractions(None, None, None)

    def _fractions(
        self, physics: float | None, policy: float | None, communication: float | None
    ) -> Mapping[str, float | None]:
        ask, play, tell = self.trainer.seconds
        seconds = (physics, policy, communication, ask + tell)
        whole = ask + play + tell
        return {name: None if value is None else value / whole for name, value in zip(STAGES, seconds, strict=True)}

    def _choose_workers(self) -> None:
        if self.workers is not None:
            assert isinstance(self.trainer.player, ClassicPlayer)
            self.trainer.player.active = self.workers
