"""``bench rollout --device cuda``: environment steps per second of training on a GPU against bare mujoco-warp.

- ``physics``: mujoco-warp alone, as one CUDA graph for each control step, with the worlds, start states and actions of a
  generation of the training run: the same contacts, but no policy, observations, rewards or bookkeeping.
- ``training``: :meth:`Trainer.generation` as ``es-flipout train --device cuda`` runs it (ask, play, tell; no scoring), one member
  for each world, with a learning rate so small that the policies, and with them the physics, stay the same.

Both are measured to the end of all work on the device. Episodes have equal length, see :mod:`es_flipout.bench.rollout`; what a
generation costs beside its steps (drawing members and start states, the update) counts the less the longer they are.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from es_flipout.bench.timing import Measured, interleave, timed
from es_flipout.config import TrainConfig
from es_flipout.device_player import DevicePlayer
from es_flipout.device_rollout import DeviceRollout, SteppedInParts
from es_flipout.errors import UserError
from es_flipout.rollout import start_seeds
from es_flipout.trainer import Trainer

_TRIAL_STEPS = 16


def measure_point(config: TrainConfig, seconds: float, shortest: int, rounds: int) -> dict[str, Any]:
    """Measure one environment with one world for each member.

    Args:
        config: with ``device`` and ``physics`` decided.
        seconds: aim of one measurement: episodes are shortened to fit.
        shortest: episodes are not shortened to fewer steps than this.
        rounds: how often each is measured.

    Raises:
        UserError: the environment is not one of mujoco-warp's, or ends episodes early.
    """
    trainer = Trainer(config)
    try:
        physics = _WarpPhysics(trainer)
        trial = physics.measured(_TRIAL_STEPS)  # compiles
        trial = physics.measured(_TRIAL_STEPS)
        limit = trainer.player.max_episode_steps or 1000
        steps = min(max(round(trial.rate * seconds / config.population_size), shortest), limit)
        # The cap grows with the run's progress, of which there is as good as none.
        trainer.config = dataclasses.replace(config, episode_cap=steps, episode_cap_until=1.0)
        physics.record(steps)
        timings = interleave(
            {
                "physics": lambda: physics.measured(steps),
                "training": lambda: timed(lambda: trainer.generation().env_steps),
            },
            rounds,
        )
    finally:
        trainer.player.close()
    return {
        "env_id": config.env_id,
        "env_kwargs": config.parsed_env_kwargs(),
        "population": config.population_size,
        "device": config.device,
        "episode_steps": steps,
        "rounds": rounds,
        "steps_per_s": {name: asdict(timings.rate(name)) for name in timings.rates},
        "training_to": {"physics": asdict(timings.ratio("training", "physics"))},
    }


class _WarpPhysics:
    """Bare physics with the start states and actions of one generation of a trainer."""

    def __init__(self, trainer: Trainer) -> None:
        player, config = trainer.player, trainer.config
        if not isinstance(player, DevicePlayer):
            raise UserError(
                f"bench rollout --device cuda compares with mujoco-warp, on which {config.env_id} does not run"
            )
        self._trainer, self._env = trainer, player._env(config.population_size)
        if not isinstance(self._env, SteppedInParts) or not hasattr(self._env, "_fields"):
            raise UserError(
                f"bench rollout --device cuda compares with mujoco-warp, on which {config.env_id} does not run"
            )
        self._ctrl: Tensor = self._env._fields["ctrl"]  # pyright: ignore[reportAttributeAccessIssue]
        self._starts = self._env.starts(torch.arange(config.population_size))
        self._actions: list[Tensor] = [torch.zeros_like(self._ctrl)]

    def record(self, steps: int) -> None:
        """Play a generation without graphs and keep its start states and actions."""
        trainer, config, env = self._trainer, self._trainer.config, self._env
        population = trainer.strategy.ask()
        seeds = start_seeds(population, 1, common=config.start_states == "generation")
        norm, action_map = trainer.agent.norm, trainer.agent.action_map
        rollout = DeviceRollout(env, population, 1, norm, action_map, 0, captured=False)
        kept: list[Tensor] = []
        step = env.run_physics  # pyright: ignore[reportAttributeAccessIssue]

        def recording() -> None:
            kept.append(self._ctrl.clone())
            step()

        env.run_physics = recording  # pyright: ignore[reportAttributeAccessIssue]
        try:
            played = rollout.play(population, norm, seeds, steps)
        finally:
            del env.run_physics  # pyright: ignore[reportAttributeAccessIssue]
        if int(played.lengths.min()) != steps:
            raise UserError(f"{config.env_id} ends episodes early, so physics and training would do different work")
        self._starts, self._actions = env.starts(seeds.flatten()), kept[:steps]

    def measured(self, steps: int) -> Measured:
        """Measure so many control steps of all worlds."""
        env, every = self._env, torch.ones(self._env.num_envs, dtype=torch.bool, device=self._env.device)
        env.restart_where(every, self._starts)
        synchronize = torch.cuda.synchronize if env.device.type == "cuda" else lambda: None
        synchronize()
        started = time.perf_counter()
        for number in range(steps):
            self._ctrl.copy_(self._actions[number % len(self._actions)])
            env.run_physics()  # pyright: ignore[reportAttributeAccessIssue]
        synchronize()
        return Measured(steps * env.num_envs, time.perf_counter() - started)
