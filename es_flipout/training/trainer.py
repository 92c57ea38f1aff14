"""The training loop: ask, play and tell, with checkpoints, metrics and scores."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from es_flipout.config import TrainConfig
from es_flipout.envs import EnvironmentFailureError
from es_flipout.errors import UserError
from es_flipout.policies.agent import Agent, check_fit
from es_flipout.policies.observation_norm import ObservationNorm
from es_flipout.randomness import Address, Stream, integers
from es_flipout.rollout.builder import Parts
from es_flipout.rollout.episodes import MOMENT_JOBS, Episodes, Rollout, RolloutInterrupted, start_seeds
from es_flipout.strategy.population import Population
from es_flipout.strategy.unperturbed import Unperturbed
from es_flipout.training import run_directory
from es_flipout.training.checkpoint import Progress, save_checkpoint
from es_flipout.training.frontier import Frontier
from es_flipout.training.metrics import Metrics, MetricsLog, Reporter, Silent
from es_flipout.training.run_directory import Which
from es_flipout.training.signals import stop_on_signals
from es_flipout.training.starts import Starts
from es_flipout.training.tracking import Tracking

_PARTS = {"module", "optimizer", "observation_norm", "frontier", "starts", "best"}  # of a checkpoint
_SCORE_GENERATION = 2**32 - 1  # a generation that training never reaches


class StageSeconds(NamedTuple):
    """Seconds of the stages of one generation."""

    ask: float
    play: float
    tell: float


class Trainer:
    """One training run; :func:`es_flipout.training.setup.make_trainer` creates one from a configuration alone.

    Attributes:
        config: configuration of the run.
        agent, strategy, player: the parts of the run.
        run_dir: directory for all output; None to write nothing.
        tracking: the trackers of the run.
        progress: progress of the run.
        frontier: where the episodes continue, if the configuration has a horizon.
        starts: the independent starts, if the configuration has several.
        interrupted: whether the run was requested to stop before its end.
        seconds: times of the last generation.
    """

    def __init__(
        self,
        config: TrainConfig,
        parts: Parts,
        run_dir: Path | None = None,
        reporter: Reporter | None = None,
        tracking: Tracking | None = None,
    ) -> None:
        """Store the parts of the run; nothing is written yet."""
        self.config = config
        self.agent, self.strategy, self.player = parts
        self.run_dir = run_dir
        self.reporter = reporter if reporter is not None else Silent()
        self.tracking = tracking if tracking is not None else Tracking({}, self.reporter.say)
        self.progress = Progress(generation=0, env_steps=0, wall_s=0.0, score=None)
        self.frontier = Frontier()
        self.interrupted = False
        self.seconds = StageSeconds(0.0, 0.0, 0.0)
        score_members = torch.arange(config.logging.score_episodes)
        address = Address(config.schedule.seed, _SCORE_GENERATION)
        self._score_episodes = Episodes(integers(address, Stream.START_STATE, score_members))
        self.starts = Starts(config.schedule, self._state())
        self._best: dict[str, Tensor] | None = None  # of an agent, as Agent.state_dict returns them
        self._warned_nan = self._warned_diverged = False

    @property
    def finished(self) -> bool:
        """Whether the run has reached its end."""
        return self._fraction() >= 1.0

    def train(self, final_scores: Callable[[], Mapping[str, float]] | None = None) -> None:
        """Train to the end of the run or until interrupted, and save everything.

        Args:
            final_scores: called at the end of the run (not if it was interrupted), when the player is closed; the trackers
                get what it returns.
        """
        state, scores = "failed", {}
        try:
            self._train()
            state = "interrupted" if self.interrupted else "finished"
            if final_scores is not None and not self.interrupted:
                self.player.close()  # scoring needs no workers, and may take longer than they live
                scores = final_scores()
        finally:
            self.tracking.finish(state, scores)

    def _train(self) -> None:
        log = None if self.run_dir is None else MetricsLog(self.run_dir, self.progress.generation)
        with stop_on_signals(lambda _: self.interrupt()), self.reporter:
            try:
                if self.run_dir is not None:
                    self.tracking.start(self.run_dir, self.config, self.progress.generation)
                while not (self.finished or self.interrupted):
                    before = self.progress.generation
                    try:
                        metrics = self.step()
                    except (EnvironmentFailureError, UserError):
                        if self.progress.generation == before:  # not while scoring: the generation has no row yet
                            self.save()
                        raise
                    if log is not None:
                        log.write(metrics)
                    self.tracking.log(metrics)
                    if self.finished or metrics.generation % self.config.logging.checkpoint_every == 0:
                        self.save()
                    self.reporter.show(metrics, self._fraction())
            except RolloutInterrupted:
                pass
            finally:
                if log is not None:
                    log.close()
            if self.interrupted:
                self.save()

    def step(self) -> Metrics:
        """Run one generation, count it, and score the mean policy if that is due."""
        started = time.perf_counter()
        rollout = self.generation()
        return self._account(rollout, time.perf_counter() - started, started)

    def generation(self) -> Rollout:
        """Run one generation: ask, play, tell."""
        began = time.perf_counter()
        strategy = self.strategy
        fraction = self.config.schedule.annealed(self.progress.generation, self.progress.env_steps)
        strategy.sigma = self.config.strategy.sigma_at(fraction)
        strategy.learning_rate = self.config.strategy.learning_rate_at(fraction)
        population = strategy.ask(draw=self.player.needs_noise)
        episodes = self._episodes(population, fraction)
        asked = time.perf_counter()
        self.player.draw_ahead(lambda: self._seeds(population, ahead=1))
        rollout = self.player.play(population, episodes, lambda: self.interrupted)
        played = time.perf_counter()
        strategy.tell(rollout.fitness, partial(self.player.weighted_sum, should_stop=lambda: self.interrupted))
        if episodes.segments is not None and rollout.ends is not None:
            self.frontier.update(population, episodes.segments, rollout.ends, rollout.lengths)
        if isinstance(self.agent.norm, ObservationNorm):
            self.agent.norm.update(rollout.moments)
        self.seconds = StageSeconds(asked - began, played - asked, time.perf_counter() - played)
        return rollout

    def prepare(self) -> None:
        """Compile what the generations need, where the control step is compiled; nothing is played.

        Raises:
            es_flipout.rollout.compiled.CompilationError: that is not possible on this machine.
        """
        population = self.strategy.ask()
        self.player.prepare(population, self._episodes(population, fraction=0.0))

    def _seeds(self, population: Population, ahead: int = 0) -> Tensor:
        task = self.config.task
        return start_seeds(population, task.episodes, common=task.start_states == "generation", ahead=ahead)

    def _episodes(self, population: Population, fraction: float) -> Episodes:
        """Return the episodes of a generation, at a completed fraction of what changes during the run."""
        task = self.config.task
        return Episodes(
            self._seeds(population),
            step_cap=task.horizon or task.episode_cap_at(fraction, self.player.max_episode_steps),
            remove_alive_bonus=task.remove_alive_bonus,
            moment_jobs=MOMENT_JOBS if isinstance(self.agent.norm, ObservationNorm) else 0,
            segments=None if task.horizon is None else self.frontier.segments(population, task.episodes),
        )

    def score(self) -> float:
        """Return the mean return of the mean policy over the scoring episodes, whose start states never change."""
        mean = self.strategy.mean_module()
        population = Unperturbed(mean, len(self._score_episodes.seeds), self.strategy.forward.row_block)
        return float(self.player.play(population, self._score_episodes).returns.mean())

    def trained_agent(self, which: Which = "best") -> Agent:
        """Return the best mean policy so far, or the last one, as an agent on the CPU."""
        agent = copy.deepcopy(self.agent)
        agent.load_state_dict(self._policy() if which == "last" or self._best is None else self._best)
        return agent

    def interrupt(self) -> None:
        """Request the run to stop as soon as possible; the current generation is discarded."""
        self.interrupted = True

    def close(self) -> None:
        """Release environments, processes and connections."""
        self.player.close()

    def create(self) -> None:
        """Create the run directory, with an initial checkpoint.

        Raises:
            UserError: the directory exists and is not empty.
        """
        if self.run_dir is not None:
            run_directory.create(self.run_dir, self.config)
            self.save()

    def save(self) -> None:
        """Write a checkpoint and the policies."""
        if self.run_dir is not None:
            keep = self.config.logging.keep_checkpoints
            save_checkpoint(self.run_dir / "checkpoints", self.tensors(), self.progress, keep)
            self.save_policies()

    def save_policies(self) -> None:
        """Write the last mean policy and the best one."""
        if self.run_dir is not None:
            run_directory.save_policy(self.run_dir, self._policy(), "last")
            if self._best is not None:
                run_directory.save_policy(self.run_dir, self._best, "best")

    def _policy(self) -> dict[str, Tensor]:
        """Return the tensors of the mean policy as it is now, as :meth:`Agent.state_dict` does."""
        tensors = self.agent.state_dict()
        mean = self.strategy.mean_module().state_dict()
        return tensors | {f"policy.{name}": value.detach().cpu() for name, value in mean.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors of the run's state in a flat dictionary."""
        tensors = self._state()
        tensors |= {f"starts.{name}": value for name, value in self.starts.state_dict().items()}
        return tensors | {f"best.{name}": value for name, value in (self._best or {}).items()}

    def _state(self) -> dict[str, Tensor]:
        """Return the tensors that determine how training continues, without those that are only kept."""
        state = self.strategy.state_dict()
        tensors = {f"module.{name}": value for name, value in state["module"].items()}
        for index, slot in state["optimizer"]["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in slot.items() if value is not None}
        if isinstance(self.agent.norm, ObservationNorm):
            tensors |= {f"observation_norm.{name}": value for name, value in self.agent.norm.state_dict().items()}
        return tensors | {f"frontier.{name}": value for name, value in self.frontier.state_dict().items()}

    def load(self, tensors: dict[str, Tensor], progress: Progress) -> None:
        """Restore the tensors and the progress of a checkpoint.

        Raises:
            UserError: the tensors do not fit the configuration.
        """
        parts = _by_part(tensors)
        try:
            self._check(parts)
            self._load_state(tensors, progress.generation)
            self.starts.load_state_dict(parts["starts"])
            self._best = parts["best"] or None
        except (RuntimeError, LookupError, ValueError) as error:
            message = " ".join(str(error).split())
            raise UserError(f"the checkpoint in {self.run_dir} does not fit its configuration: {message}") from None
        self.progress = progress

    def _check(self, parts: Mapping[str, dict[str, Tensor]]) -> None:
        """Raise ValueError unless the tensors of a checkpoint have the names, shapes and types of this run's."""
        if unknown := parts.keys() - _PARTS:
            raise ValueError(f"{', '.join(sorted(unknown))} is unknown")
        wanted = _by_part(self._state())
        for part in ("module", "observation_norm"):
            check_fit(parts[part], wanted[part])
        if parts["best"]:
            check_fit(parts["best"], self._policy())
        sizes = [value.shape for value in self.strategy.state_dict()["module"].values()]
        slots: dict[str, set[str]] = {}
        for name, value in parts["optimizer"].items():
            index, _, key = name.partition(".")
            slots.setdefault(index, set()).add(key)
            shape = torch.Size() if key == "step" else sizes[int(index)]
            if value.dtype != torch.float32 or value.shape != shape:
                raise ValueError(f"optimizer.{name} is of shape {tuple(value.shape)} and {value.dtype}")
        if len({frozenset(keys) for keys in slots.values()}) > 1 or len(slots) not in (0, len(sizes)):
            raise ValueError("tensors of the optimizer are missing or unknown")

    def _load_state(self, tensors: dict[str, Tensor], generation: int) -> None:
        parts, state = _by_part(tensors), self.strategy.state_dict()
        slots: dict[int, dict[str, Tensor]] = {}
        for name, value in parts["optimizer"].items():
            index, _, key = name.partition(".")
            slots.setdefault(int(index), {})[key] = value
        state["generation"] = generation
        state["module"] = parts["module"]
        state["optimizer"] = {**state["optimizer"], "state": slots}
        self.strategy.load_state_dict(state)
        if isinstance(self.agent.norm, ObservationNorm):
            self.agent.norm.load_state_dict(parts["observation_norm"])
        self.frontier.load_state_dict(parts["frontier"])

    def _account(self, rollout: Rollout, seconds: float, started: float) -> Metrics:
        """Update the progress after a generation, score the mean policy if it is due, and return the metrics."""
        before = self.progress
        generation, env_steps = before.generation + 1, before.env_steps + rollout.env_steps
        wall_s = before.wall_s + seconds
        self.progress = dataclasses.replace(before, generation=generation, env_steps=env_steps, wall_s=wall_s)
        score = None
        start_over = self.starts.due(self.config.schedule.annealed(generation, env_steps))
        if start_over or generation % self.config.logging.score_every == 0 or self.finished:
            score = self._score_and_keep_the_best()
        if start_over and score is not None:
            self._load_state(self.starts.finish(score, self._state()), generation)
            self.reporter.say(str(self.starts))
        wall_s = before.wall_s + time.perf_counter() - started
        self.progress = dataclasses.replace(self.progress, wall_s=wall_s)
        self._warn(rollout, generation)
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

    def _warn(self, rollout: Rollout, generation: int) -> None:
        """Tell once about returns that are NaN and about episodes that ended with a state that is not finite."""
        members, episodes = len(rollout.returns), rollout.lengths.numel()
        if rollout.nan_returns and not self._warned_nan:
            self._warned_nan = True
            found = f"{rollout.nan_returns} of {members} members had a NaN return in generation {generation}"
            follows = (
                "nothing can be learned from this; check the environment's rewards"
                if rollout.nan_returns == members
                else "they rank worst, and the column nan_returns of metrics.csv counts them"
            )
            self.reporter.say(f"warning: {found}; {follows}")
        if rollout.diverged == episodes and not self._warned_diverged:
            self._warned_diverged = True
            self.reporter.say(
                f"warning: all {episodes} episodes of generation {generation} ended with an observation or state that is "
                "not finite; check the environment (the column diverged of metrics.csv counts such episodes)"
            )

    def _score_and_keep_the_best(self) -> float:
        """Score the mean policy; the newest of equally good ones is the best, for it was trained longest."""
        score, best = self.score(), self.progress.best_score
        self.progress = dataclasses.replace(self.progress, score=score)
        if math.isfinite(score) and (best is None or score >= best):
            generation = self.progress.generation
            self.progress = dataclasses.replace(self.progress, best_score=score, best_generation=generation)
            self._best = {name: value.clone() for name, value in self._policy().items()}
        return score

    def _fraction(self) -> float:
        return self.config.schedule.progress(self.progress.generation, self.progress.env_steps)


def _by_part(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of a checkpoint by what they belong to: the part of their names before the first dot."""
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = value
    return parts
