"""``bench rollout --device cuda``: environment steps per second of training on a GPU against bare mujoco-warp.

- ``physics``: mujoco-warp alone, as one CUDA graph per control step, with the worlds, start states and actions of a
  generation of the training run: the same contacts, but no policy, observations, rewards or bookkeeping.
- ``training``: :meth:`Trainer.generation` as ``es-flipout train --device cuda`` runs it (ask, play, tell; no scoring),
  with one member per world, and a learning rate so small that the policies, and therefore the physics, stay the same.

Both measurements end when all work on the device has finished. Episodes have equal length, see
:mod:`es_flipout.bench.rollout`; the longer they are, the less the fixed cost of a generation matters (drawing members
and start states, the update).
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from es_flipout.bench.timing import Measured, interleave, timed
from es_flipout.config import TrainConfig
from es_flipout.envs.mujoco_gpu import MujocoWarpBatchEnv
from es_flipout.errors import UserError
from es_flipout.rollout.device import DeviceRollout, LaunchOptions
from es_flipout.rollout.device_player import DevicePlayer
from es_flipout.rollout.episodes import Episodes, start_seeds
from es_flipout.training.setup import make_trainer
from es_flipout.training.trainer import Trainer

_TRIAL_STEPS = 16


def measure_point(config: TrainConfig, seconds: float, shortest: int, rounds: int) -> dict[str, Any]:
    """Measure one environment with one world per member.

    Args:
        config: a configuration whose ``device`` and ``physics`` are decided.
        seconds: target duration of one measurement; episodes are shortened to fit.
        shortest: minimum number of steps of the shortened episodes.
        rounds: number of measurements of each.

    Raises:
        UserError: mujoco-warp does not support the environment, or it ends episodes early.
    """
    trainer = make_trainer(config)
    try:
        physics = _WarpPhysics(trainer)
        trial = physics.measured(_TRIAL_STEPS)  # compiles
        trial = physics.measured(_TRIAL_STEPS)
        limit = trainer.player.max_episode_steps or 1000
        steps = min(max(round(trial.rate * seconds / config.strategy.population_size), shortest), limit)
        # The cap grows with the progress of the run, which stays close to zero.
        trainer.config = config.replace(episode_cap=steps, episode_cap_until=1.0)
        physics.record(steps)
        timings = interleave(
            {
                "physics": lambda: physics.measured(steps),
                "training": lambda: timed(lambda: trainer.generation().env_steps),
            },
            rounds,
        )
    finally:
        trainer.close()
    return {
        "env_id": config.task.env_id,
        "env_kwargs": config.task.parsed_env_kwargs(),
        "population": config.strategy.population_size,
        "device": config.compute.device,
        "episode_steps": steps,
        "rounds": rounds,
        "steps_per_s": {name: asdict(timings.rate(name)) for name in timings.rates},
        "training_to": {"physics": asdict(timings.ratio("training", "physics"))},
    }


class _Recorder:
    """A batch of mujoco-warp environments that records the controls of every physics step."""

    def __init__(self, env: MujocoWarpBatchEnv) -> None:
        self._env = env
        self.controls: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def begin_step(self, action: Tensor, live: Tensor | None = None) -> None:
        """See :class:`MujocoWarpBatchEnv`."""
        self._env.begin_step(action, live)

    def end_step(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See :class:`MujocoWarpBatchEnv`."""
        return self._env.end_step()

    def run_physics(self) -> None:
        """See :class:`MujocoWarpBatchEnv`."""
        self.controls.append(self._env.controls.clone())
        self._env.run_physics()


class _WarpPhysics:
    """Bare physics with the start states and actions of one generation of a trainer."""

    def __init__(self, trainer: Trainer) -> None:
        player, config = trainer.player, trainer.config
        members = config.strategy.population_size
        env = player.env(members) if isinstance(player, DevicePlayer) else None
        if not isinstance(env, MujocoWarpBatchEnv):
            raise UserError(
                f"bench rollout --device cuda compares with mujoco-warp, which does not support {config.task.env_id}"
            )
        self._trainer, self._env = trainer, env
        self._starts = env.starts(torch.arange(members))
        self._actions: list[Tensor] = [torch.zeros_like(env.controls)]

    def record(self, steps: int) -> None:
        """Play a generation without graphs and record its start states and actions."""
        trainer, task, env = self._trainer, self._trainer.config.task, self._env
        population = trainer.strategy.ask()
        seeds = start_seeds(population, 1, common=task.start_states == "generation")
        episodes, recorder = Episodes(seeds, step_cap=steps), _Recorder(env)
        rollout = DeviceRollout(recorder, trainer.agent, population, episodes, LaunchOptions(captured=False))  # pyright: ignore[reportArgumentType]
        played = rollout.play(population, episodes)
        if int(played.lengths.min()) != steps:
            raise UserError(f"{task.env_id} ends episodes early, so physics and training would do different work")
        self._starts, self._actions = env.starts(seeds.flatten()), recorder.controls[:steps]

    def measured(self, steps: int) -> Measured:
        """Measure ``steps`` control steps of all worlds."""
        env, every = self._env, torch.ones(self._env.num_envs, dtype=torch.bool, device=self._env.device)
        env.restart_where(every, self._starts)
        synchronize = torch.cuda.synchronize if env.device.type == "cuda" else lambda: None
        synchronize()
        started = time.perf_counter()
        for number in range(steps):
            env.controls.copy_(self._actions[number % len(self._actions)])
            env.run_physics()
        synchronize()
        return Measured(steps * env.num_envs, time.perf_counter() - started)
