"""Training: the loop, and a run directory that can be continued to the bit."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from es_flipout.agent import Agent
from es_flipout.arrangement import local_player, resolve
from es_flipout.checkpoint import Progress, atomic_write, load_checkpoint, load_tensors, save_checkpoint, save_tensors
from es_flipout.cluster.classic import ClassicPlayer, ClassicStrategy
from es_flipout.cluster.pool import WorkersLostError
from es_flipout.cluster.sharded import ShardedPlayer
from es_flipout.config import TrainConfig
from es_flipout.envs import EnvironmentFailureError, make_env
from es_flipout.errors import UserError
from es_flipout.evaluate import Evaluation
from es_flipout.metrics import Metrics, MetricsLog, Reporter, Silent
from es_flipout.observation_norm import ObservationNorm
from es_flipout.perturbations import family_of
from es_flipout.player import Player, row_block_of
from es_flipout.population import Unperturbed
from es_flipout.randomness import Address, Stream, integers
from es_flipout.rollout import Rollout, RolloutInterrupted, start_seeds
from es_flipout.runinfo import environment
from es_flipout.strategy import EvolutionStrategy

_SCORE_GENERATION = 2**32 - 1  # an address that training never reaches


class Trainer:
    """One training run and its directory.

    Attributes:
        config: what is trained and how.
        run_dir: where everything is written; None writes nothing.
        interrupted: whether the run was asked to stop before its end.
    """

    def __init__(self, config: TrainConfig, run_dir: Path | None = None, reporter: Reporter | None = None) -> None:
        """Set up environments, policy and strategy; nothing is written yet.

        Raises:
            UserError: the environment, a space or a device is not supported.
        """
        self.run_dir = run_dir
        self.reporter = reporter if reporter is not None else Silent()
        self.interrupted = False
        if config.generations is None and config.env_steps is None:
            raise UserError("give the run an end: generations or env-steps")
        # Small layers stall with more than one intra-op thread, and the cores belong to the physics.
        torch.set_num_threads(1)
        self.config = config = resolve(config, self.reporter.say)
        self.device = torch.device(config.device)
        self.player = make_player(config, self.reporter.say)
        player = self.player
        for warning in player.warnings:
            self.reporter.say(warning)
        self.agent = Agent(config, player.observation_space, player.action_space, player.observation_shape)
        self.row_block = row_block_of(config, self.agent.module)
        strategy = ClassicStrategy if config.worker_kind == "classic" else EvolutionStrategy
        self.strategy = strategy(
            self.agent.module,
            config.population_size,
            config.sigma,
            perturbation=family_of(config),
            learning_rate=config.learning_rate,
            optimizer=config.optimizer,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            antithetic=config.antithetic,
            seed=config.seed,
            device=self.device,
            row_block=self.row_block,
            kernels=config.kernels,
            precision=config.precision,
        )
        score_members = torch.arange(config.score_episodes)
        self._score_seeds = integers(Address(config.seed, _SCORE_GENERATION), Stream.START_STATE, score_members)
        self._progress = Progress(generation=0, env_steps=0, wall_s=0.0, score=None)
        self._warned_nan = False

    @property
    def progress(self) -> Progress:
        """How far the run has come."""
        return self._progress

    @property
    def finished(self) -> bool:
        """Whether the run has reached its end."""
        return self._fraction() >= 1.0

    def train(self) -> None:
        """Train to the end of the run or until interrupted; then everything is on disk."""
        log = None if self.run_dir is None else MetricsLog(self.run_dir, self._progress.generation)
        with _signals(self._stop), self.reporter:
            try:
                while not (self.finished or self.interrupted):
                    started = time.perf_counter()
                    try:
                        rollout = self.generation()
                    except (EnvironmentFailureError, WorkersLostError):
                        self.save()
                        raise
                    seconds = time.perf_counter() - started
                    metrics = self._account(rollout, seconds, started)
                    if log is not None:
                        log.write(metrics)
                    if self.finished or metrics.generation % self.config.checkpoint_every == 0:
                        self.save()
                    self.reporter.show(metrics, self._fraction())
            except RolloutInterrupted:
                pass
            finally:
                if log is not None:
                    log.close()
            if self.interrupted:
                self.save()

    def generation(self) -> Rollout:
        """One generation: ask, play, tell."""
        config, strategy, fraction = self.config, self.strategy, self._fraction()
        strategy.sigma = config.sigma_at(fraction)
        strategy.learning_rate = config.learning_rate_at(fraction)
        population = strategy.ask()
        rollout = self.player.play(
            population,
            config.episodes,
            observation_norm=self.agent.norm,
            action_map=self.agent.action_map,
            seeds=start_seeds(population, config.episodes, common=config.start_states == "generation"),
            max_episode_steps=config.episode_cap_at(fraction, self.player.max_episode_steps),
            remove_alive_bonus=config.remove_alive_bonus,
            collect_moments=isinstance(self.agent.norm, ObservationNorm),
            should_stop=lambda: self.interrupted,
        )
        strategy.tell(rollout.fitness)
        if isinstance(self.agent.norm, ObservationNorm):
            self.agent.norm.update(rollout.moments)
        return rollout

    def score(self) -> float:
        """Mean return of the mean policy over the scoring episodes, whose start states are the same every time."""
        rollout = self.player.play(
            Unperturbed(self.strategy.mean_module(), self.config.score_episodes, self.row_block),
            observation_norm=self.agent.norm,
            action_map=self.agent.action_map,
            seeds=self._score_seeds,
            collect_moments=False,
        )
        return float(rollout.returns.mean())

    def trained_agent(self) -> Agent:
        """The mean policy as an agent on the CPU."""
        self.agent.module.load_state_dict(self.strategy.mean_module().state_dict())
        return self.agent

    def close(self) -> None:
        """Release environments, processes and connections."""
        self.player.close()

    def _account(self, rollout: Rollout, seconds: float, started: float) -> Metrics:
        """Count a generation, and score the mean policy when it is time."""
        before, config = self._progress, self.config
        generation, env_steps = before.generation + 1, before.env_steps + rollout.env_steps
        self._progress = Progress(generation, env_steps, before.wall_s + seconds, before.score)
        score = None
        if generation % config.score_every == 0 or self.finished:
            score = self.score()
        wall_s = before.wall_s + time.perf_counter() - started
        self._progress = Progress(generation, env_steps, wall_s, before.score if score is None else score)
        if rollout.nan_returns and not self._warned_nan:
            self._warned_nan = True
            self.reporter.say(
                f"warning: {rollout.nan_returns} of {config.population_size} members had a NaN return in generation "
                f"{generation}; they rank worst, and the column nan_returns of metrics.csv counts them"
            )
        returns = rollout.returns[~rollout.returns.isnan()]
        return Metrics(
            generation=generation,
            env_steps=env_steps,
            env_steps_per_s=rollout.env_steps / seconds,
            wall_s=wall_s,
            mean_return=float(returns.mean()) if len(returns) else math.nan,
            best_return=float(returns.max()) if len(returns) else math.nan,
            score=score,
            mean_length=float(rollout.lengths.to(torch.float64).mean()),
            sigma=self.strategy.sigma,
            learning_rate=self.strategy.learning_rate,
            diverged=rollout.diverged,
            nan_returns=rollout.nan_returns,
        )

    def _fraction(self) -> float:
        return self.config.progress(self._progress.generation, self._progress.env_steps)

    def _stop(self) -> None:
        self.interrupted = True

    # The run directory.

    def create(self) -> None:
        """Make the run directory with ``config.json``, ``environment.json`` and a first checkpoint.

        Raises:
            UserError: the directory exists and is not empty.
        """
        if self.run_dir is None:
            return
        if self.run_dir.exists() and (not self.run_dir.is_dir() or any(self.run_dir.iterdir())):
            raise UserError(
                f"run directory {self.run_dir} exists: choose another with --run-dir, or continue it with "
                f"`es-flipout resume {self.run_dir}`"
            )
        self.run_dir.mkdir(parents=True, exist_ok=True)
        atomic_write(self.run_dir / "config.json", self.config.to_json())
        atomic_write(self.run_dir / "environment.json", json.dumps(environment(), indent=2) + "\n")
        self.save()

    def save(self) -> None:
        """Write a checkpoint and ``policy.safetensors``."""
        if self.run_dir is None:
            return
        tensors = self._tensors()
        save_checkpoint(self.run_dir / "checkpoints", tensors, self._progress, self.config.keep_checkpoints)
        self._save_policy(self.run_dir)

    def _save_policy(self, run_dir: Path) -> None:
        save_tensors(run_dir / "policy.safetensors", self.trained_agent().state_dict())

    @classmethod
    def resume(
        cls, run_dir: Path, reporter: Reporter | None = None, changes: Mapping[str, Any] | None = None
    ) -> Trainer:
        """The run in ``run_dir``, as it was at its newest checkpoint.

        Args:
            run_dir: its directory.
            reporter: told what happens.
            changes: fields of the configuration that say where to compute, and not what; they change no result.

        Raises:
            UserError: the directory is missing or incomplete, or was made by another version.
        """
        config = dataclasses.replace(read_config(run_dir), **(changes or {}))
        tensors, progress = load_checkpoint(run_dir / "checkpoints")
        trainer = cls(config, run_dir, reporter)
        trainer._load(tensors, progress)
        trainer._save_policy(run_dir)  # the run may have died between its checkpoint and its policy
        return trainer

    def _tensors(self) -> dict[str, Tensor]:
        """All tensors of the run's state, flat, by name."""
        state = self.strategy.state_dict()
        tensors = {f"module.{name}": value for name, value in state["module"].items()}
        for index, slot in state["optimizer"]["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in slot.items() if value is not None}
        if isinstance(self.agent.norm, ObservationNorm):
            tensors |= {f"observation_norm.{name}": value for name, value in self.agent.norm.state_dict().items()}
        return tensors

    def _load(self, tensors: dict[str, Tensor], progress: Progress) -> None:
        state = self.strategy.state_dict()
        optimizer: dict[int, dict[str, Tensor]] = {}
        module: dict[str, Tensor] = {}
        norm: dict[str, Tensor] = {}
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "optimizer":
                index, _, key = rest.partition(".")
                optimizer.setdefault(int(index), {})[key] = value
            else:
                (module if kind == "module" else norm)[rest] = value
        state["generation"] = progress.generation
        state["module"] = module
        state["optimizer"] = {**state["optimizer"], "state": optimizer}
        try:
            self.strategy.load_state_dict(state)
            if isinstance(self.agent.norm, ObservationNorm):
                self.agent.norm.load_state_dict(norm)
        except (RuntimeError, KeyError, ValueError) as error:
            message = " ".join(str(error).split())
            raise UserError(f"the checkpoint in {self.run_dir} does not fit its configuration: {message}") from None
        self._progress = progress


def read_config(run_dir: Path) -> TrainConfig:
    """The configuration of a run directory.

    Raises:
        UserError: the directory is missing, holds no run, or was made by another version.
    """
    if not run_dir.is_dir():
        raise UserError(f"run directory {run_dir} does not exist")
    path = run_dir / "config.json"
    if not path.exists():
        raise UserError(f"{run_dir} is not a run directory: it has no config.json")
    try:
        return TrainConfig.from_json(path.read_text(encoding="utf-8"))
    except (UserError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}") from None


def load_agent(run_dir: Path) -> tuple[Agent, TrainConfig]:
    """The trained agent of a run directory, and the configuration of the run.

    Raises:
        UserError: the directory is missing or incomplete.
    """
    config = read_config(run_dir)
    env = make_env(config.env_id, 1, observed=config.observed, **config.parsed_env_kwargs())
    agent = Agent(config, env.observation_space, env.action_space, env.observation_shape)
    env.close()
    agent.load_state_dict(load_tensors(run_dir / "policy.safetensors"))
    return agent, config


def write_evaluation(run_dir: Path, evaluation: Evaluation) -> None:
    """Write ``evaluation.json``."""
    atomic_write(run_dir / "evaluation.json", json.dumps(evaluation.to_dict(), indent=2) + "\n")


def make_player(config: TrainConfig, say: Callable[[str], None]) -> Player:
    """Who plays the episodes of this run."""
    if config.backend == "ray" and config.worker_kind == "classic":
        return ClassicPlayer(config)
    if config.backend == "ray":
        return ShardedPlayer(config)
    return local_player(config, say)


@contextmanager
def _signals(stop: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask the run to stop after what it is doing; a second Ctrl-C is not waited for."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: object) -> None:
        signal.signal(number, previous[signal.Signals(number)])
        stop()

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
