"""``bench rollout``: environment steps per second of training against bare physics and Gymnasium's async vectorization.

- ``physics``: ``mujoco.batch.Batch`` alone, with the model, options, threads and number of simulations of the training
  run. It replays the start states and actions of a generation, so that it steps through the same contacts, but has no
  policy, observations or rewards.
- ``training``: :meth:`Trainer.generation` as ``es-flipout train`` runs it (ask, play, tell; no scoring), with a
  learning rate so small that the policies, and therefore the physics, stay the same from round to round.
- ``gymnasium``: ``gymnasium.make_vec(..., "async")`` with the same policy network in torch; the better of 2 and 32
  environments.

Ant, Humanoid and HumanoidStandup need contact forces, which ``mj_step`` does not compute; ``physics_and_forces`` is the
bare physics with them (``mj_rnePostConstraint`` after each step, as in Gymnasium).

With ``--preset``, training with the preset of the environment (its population, policy and segments of episodes) is measured, too:
episodes have full length, and a measurement is as many generations as fit.

Otherwise, episode length is chosen to fit the duration of a measurement, up to the environment's own limit. If episodes ended
early, training and bare physics would do different work, so falling does not end the episodes of walkers and humanoids
(``terminate_when_unhealthy=False``).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import gymnasium
import numpy as np
import torch
import tyro
from mujoco.batch import Batch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from es_flipout.bench.timing import Measure, Measured, Record, interleave, measured_points, repeated, timed
from es_flipout.config import TrainConfig
from es_flipout.envs import make_env
from es_flipout.envs.mujoco_contact import ContactForceBatch
from es_flipout.envs.mujoco_cpu import MujocoBatchEnv, usable_cores
from es_flipout.envs.native import ArrayOutcome
from es_flipout.errors import UserError
from es_flipout.policies.agent import Agent
from es_flipout.presets import preset
from es_flipout.rollout.players import LocalPlayer
from es_flipout.training.setup import make_trainer
from es_flipout.training.trainer import Trainer

_WALKERS = ("Hopper-v5", "Walker2d-v5", "Ant-v5", "Humanoid-v5")
_NEVER_END: Mapping[str, Mapping[str, Any]] = {name: {"terminate_when_unhealthy": False} for name in _WALKERS}
_GYMNASIUM_ENVS = (2, 32)
_OTHERS = ("physics", "physics_and_forces", "gymnasium")
_CAPTION = "Ratios: median over rounds (smallest-largest). Physics replays the states and actions of training."


@dataclass(frozen=True, kw_only=True)
class RolloutBench:
    """Compare the environment steps per second of training with those of bare physics."""

    env_ids: tuple[str, ...] = ("HalfCheetah-v5", "Humanoid-v5")
    """MuJoCo environments."""
    populations: tuple[int, ...] = (128, 256, 512)
    """Population sizes."""
    preset: bool = False
    """Also measure training with the preset of each environment."""
    rounds: int = 5
    """Number of rounds; medians over rounds are shown."""
    seconds: float = 3.0
    """Target duration of one measurement; episodes are shortened to fit."""
    shortest_episode: int = 100
    """Minimum number of steps of the shortened episodes."""
    threads: int | None = None
    """Physics threads; by default one per core."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to train; cuda compares with bare mujoco-warp, one world per member (es_flipout.bench.rollout_gpu)."""
    gymnasium: bool = False
    """Also measure gymnasium.make_vec(..., "async")."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the result to this file, after every point."""
    resume: bool = False
    """Keep the points that this file already holds, and measure the others."""


def run(options: RolloutBench, console: Console) -> dict[str, Any]:
    """Measure, print a table, and return the JSON-serializable result.

    Raises:
        UserError: an environment is not a native MuJoCo environment, or ends episodes early.
    """
    record = Record("bench rollout", asdict(options), ("rollout",), options.json, options.resume)
    results: list[dict[str, Any]] = []
    for env_id in options.env_ids:
        if options.preset:
            with console.status(f"{env_id}, preset"):
                sizes = {"env_id": env_id, "population": preset(env_id).strategy.population_size, "preset": True}
                results.append(record.point("rollout", sizes, partial(_measure_preset, options, env_id)))
        for population in options.populations:
            with console.status(f"{env_id}, population {population}"):
                sizes = {"env_id": env_id, "population": population, "preset": False}
                results.append(record.point("rollout", sizes, partial(_measure_point, options, env_id, population)))
    console.print(_table(results))
    return record.write()


def _measure_point(options: RolloutBench, env_id: str, population: int) -> dict[str, Any]:
    kwargs = dict(_NEVER_END.get(env_id, {}))
    if options.device == "cuda":
        from es_flipout.bench.rollout_gpu import measure_point  # imports warp, an optional dependency

        return measure_point(
            _gpu_config(env_id, population, kwargs), options.seconds, options.shortest_episode, options.rounds
        )
    kwargs["max_episode_steps"] = _episode_steps(options, env_id, population, kwargs)
    config = TrainConfig.of(
        env_id,
        env_kwargs=json.dumps(kwargs),
        population_size=population,
        hidden=(64, 64),
        learning_rate=1e-12,
        generations=2**31,
        threads=options.threads,
    )
    return _measure(options, config)


def _measure_preset(options: RolloutBench, env_id: str) -> dict[str, Any]:
    if options.device == "cuda":
        raise UserError("--preset measures on the CPU; omit it, or --device cuda")
    kwargs = dict(_NEVER_END.get(env_id, {}))
    config = preset(env_id).replace(
        env_kwargs=json.dumps(kwargs),
        learning_rate=1e-12,
        learning_rate_final=None,
        weight_decay=0.0,
        generations=2**31,
        env_steps=None,
        starts=1,
        threads=options.threads,
    )
    population = config.strategy.population_size
    steps_per_s, limit = _physics_rate(options, env_id, population, kwargs)
    steps = population * config.task.episodes * (config.task.horizon or limit)
    return _measure(options, config, generations=max(round(steps_per_s * options.seconds / steps), 1))


def _measure(options: RolloutBench, config: TrainConfig, generations: int = 1) -> dict[str, Any]:
    """Measure so many generations of a run against the physics that they contain."""
    trainer = make_trainer(config)
    physics = _Physics(trainer, generations)
    measures: dict[str, Measure] = {
        "physics": physics.plain(),
        "training": lambda: timed(lambda: sum(trainer.generation().env_steps for _ in range(generations))),
    }
    if physics.has_forces:
        measures["physics_and_forces"] = physics.with_forces()
    vectors: dict[str, _AsyncGymnasium] = {}
    try:
        if options.gymnasium:
            vectors = {f"gymnasium_{n}": _AsyncGymnasium(config, n, options.seconds) for n in _GYMNASIUM_ENVS}
        timings = interleave({**measures, **vectors}, options.rounds)
    finally:
        for closing in (*vectors.values(), trainer.player, physics.env):
            closing.close()
    ratios = {name: timings.ratio("training", name) for name in timings.rates if name not in ("training", *vectors)}
    if vectors:
        best = max(vectors, key=lambda name: timings.rate(name).median)
        ratios["gymnasium"] = timings.ratio("training", best)
    return {
        "env_id": config.task.env_id,
        "env_kwargs": config.task.parsed_env_kwargs(),
        "population": config.strategy.population_size,
        "generations": generations,
        "threads": options.threads or usable_cores(),
        "rounds": options.rounds,
        "steps_per_s": {name: asdict(timings.rate(name)) for name in timings.rates},
        "training_to": {name: asdict(spread) for name, spread in ratios.items()},
    }


def _gpu_config(env_id: str, population: int, kwargs: Mapping[str, Any]) -> TrainConfig:
    return TrainConfig.of(
        env_id,
        env_kwargs=json.dumps(kwargs),
        population_size=population,
        hidden=(64, 64),
        learning_rate=1e-12,
        generations=2**31,
        device="cuda",
        physics="gpu",
        slots=population,
    )


def _episode_steps(options: RolloutBench, env_id: str, population: int, kwargs: Mapping[str, Any]) -> int:
    """Return the episode length with which one generation takes about ``options.seconds``."""
    steps_per_s, limit = _physics_rate(options, env_id, population, kwargs)
    return min(max(round(steps_per_s / population * options.seconds), options.shortest_episode), limit)


def _physics_rate(options: RolloutBench, env_id: str, population: int, kwargs: Mapping[str, Any]) -> tuple[float, int]:
    """Return environment steps per second of all slots with actions of zero, and the environment's time limit."""
    env = _mujoco_env(env_id, population, options.threads, kwargs)
    env.reset(torch.arange(population))
    action = torch.zeros(population, *env.action_space.shape or ())
    steps_per_s = repeated(lambda: env.step(action), options.seconds / 20)().rate * population
    env.close()
    return steps_per_s, env.max_episode_steps or 1000


@contextmanager
def _recorded(env: MujocoBatchEnv) -> Iterator[tuple[list[NDArray[np.float64]], list[Tensor]]]:
    """Record the starts and the actions that an environment receives."""
    begun: list[NDArray[np.float64]] = []
    actions: list[Tensor] = []
    restart, step = env.restart, env.step_arrays

    def recorded_restart(rows: NDArray[np.intp], starts: NDArray[np.float64]) -> Tensor:
        if len(rows):
            begun.append(starts.copy())
        return restart(rows, starts)

    def recorded_step(action: Tensor, live: Tensor | None = None) -> ArrayOutcome:
        actions.append(action.clone())
        return step(action, live)

    env.restart, env.step_arrays = recorded_restart, recorded_step
    try:
        yield begun, actions
    finally:
        del env.restart, env.step_arrays  # the methods of the class are visible again


class _Physics:
    """Bare physics with the start states and actions of some generations of a trainer.

    Attributes:
        env: all simulations, in one batch.
        has_forces: whether the environment computes contact forces after a step.
    """

    def __init__(self, trainer: Trainer, generations: int = 1) -> None:
        config, player = trainer.config, trainer.player
        population, env_id = config.strategy.population_size, config.task.env_id
        threads = config.compute.threads
        self.env = _mujoco_env(env_id, population, threads, config.task.parsed_env_kwargs())
        self._threads = min(threads or usable_cores(), population)
        self.has_forces = not isinstance(self.env.batch, Batch)
        assert isinstance(player, LocalPlayer)
        lanes = [env for env in player.envs if isinstance(env, MujocoBatchEnv)]
        # Per generation, the starts of all simulations and their actions in every step.
        self._played: list[tuple[NDArray[np.float64], list[NDArray[np.float64]]]] = []
        for _ in range(generations):
            with ExitStack() as stack:
                recorded = [stack.enter_context(_recorded(env)) for env in lanes]
                lengths = trainer.generation().lengths
            if int(lengths.min()) != int(lengths.max()) or len(lengths) != population:
                raise UserError(f"{env_id} ends episodes early, so physics and training would do different work")
            moments = zip(*(actions for _, actions in recorded), strict=True)
            steps = [torch.cat(parts).double().numpy() for parts in moments]
            self._played.append((np.concatenate([starts[0] for starts, _ in recorded]), steps))

    def plain(self) -> Measure:
        """Return a measurement of ``mujoco.batch.Batch``."""
        env, own = self.env, self.env.batch
        if isinstance(own, Batch):
            return self.with_forces()
        batch = Batch(own._model, env.num_envs, nthread=self._threads)
        qpos, qvel = batch.bind("qpos"), batch.bind("qvel")

        def start(states: NDArray[np.float64]) -> None:
            self._restart(states)
            batch.reset()
            qpos[...], qvel[...] = own.bind("qpos"), own.bind("qvel")
            batch.forward()

        return self._measure(batch, start)

    def with_forces(self) -> Measure:
        """Return a measurement of the environment's own batch."""
        return self._measure(self.env.batch, self._restart)

    def _restart(self, states: NDArray[np.float64]) -> None:
        self.env.restart(np.arange(self.env.num_envs), states)

    def _measure(self, batch: Batch | ContactForceBatch, start: Callable[[NDArray[np.float64]], object]) -> Measure:
        frame_skip, ctrl = self.env.frame_skip, batch.bind("ctrl")

        def step_all(actions: list[NDArray[np.float64]]) -> int:
            for action in actions:
                ctrl[...] = action
                batch.step(None, nstep=frame_skip)
            return len(actions) * self.env.num_envs

        def measure() -> Measured:
            parts = []
            for states, actions in self._played:
                start(states)
                parts.append(timed(partial(step_all, actions)))
            return Measured(sum(part.work for part in parts), sum(part.seconds for part in parts))

        return measure


class _AsyncGymnasium:
    """The policy network of a trainer in Gymnasium's own vector environment, one process per environment."""

    def __init__(self, config: TrainConfig, num_envs: int, seconds: float) -> None:
        torch.manual_seed(0)
        self._seconds = seconds
        self._vector = gymnasium.make_vec(
            config.task.env_id,
            num_envs=num_envs,
            vectorization_mode="async",
            # forking a process with threads (torch's, MuJoCo's) is not safe
            vector_kwargs={"context": "forkserver"},
            **config.task.parsed_env_kwargs(),
        )
        self._agent = Agent(config, self._vector.single_observation_space, self._vector.single_action_space)
        self._observation, _ = self._vector.reset(seed=0)

    def __call__(self) -> Measured:
        """Measure environment steps."""
        return timed(self._play)

    def _play(self) -> int:
        deadline, steps = time.perf_counter() + self._seconds, 0
        while time.perf_counter() < deadline:
            action, _ = self._agent.act(torch.from_numpy(self._observation), None)
            self._observation, *_ = self._vector.step(action.numpy())
            steps += len(self._observation)
        return steps

    def close(self) -> None:
        """Stop the processes."""
        self._vector.close()


def _mujoco_env(env_id: str, num_envs: int, threads: int | None, kwargs: Mapping[str, Any]) -> MujocoBatchEnv:
    env = make_env(env_id, num_envs, threads=threads, **kwargs)
    if not isinstance(env, MujocoBatchEnv):
        env.close()
        raise UserError(f"bench rollout compares with mujoco.batch, but {env_id} runs on the {env.backend} backend")
    return env


def _table(results: list[dict[str, Any]]) -> Table:
    table = Table(title="Environment steps per second", caption=_CAPTION)
    for name in ("environment", "population", "physics", "training", "ratio", "ratio with forces", "÷ gymnasium async"):
        table.add_column(name, justify="left" if name == "environment" else "right")
    for point in measured_points(results):
        rates, ratios = point["steps_per_s"], point["training_to"]
        table.add_row(
            point["env_id"],
            population_name(point),
            f"{rates['physics']['median']:,.0f}",
            f"{rates['training']['median']:,.0f}",
            *(_show(ratios[name]) if name in ratios else "-" for name in _OTHERS),
        )
    return table


def population_name(point: Mapping[str, Any]) -> str:
    """Return the population of a point as tables show it."""
    return f"{point['population']}{' (preset)' if point.get('preset') else ''}"


def _show(spread: Mapping[str, Any]) -> str:
    return f"{spread['median']:.3f} ({spread['min']:.3f}-{spread['max']:.3f})"
