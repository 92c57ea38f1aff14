"""A process that trains what the search sends it: some runs side by side, with a report whenever all have been scored."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import connection, parent_process
from typing import TYPE_CHECKING

from es_flipout.config import TrainConfig
from es_flipout.errors import UserError

if TYPE_CHECKING:
    from es_flipout.training.trainer import Trainer

RUNGS = 10
"""How often the runs of a trial are scored, at equal parts of their length."""


@dataclass(frozen=True)
class Job:
    """Runs to train in lockstep.

    Attributes:
        configs: a configuration for each run; all have the same length.
        evaluate: whether to also score the best policy of each run in the single Gymnasium environment, as
            ``es-flipout train`` does in the end.
    """

    configs: tuple[TrainConfig, ...]
    evaluate: bool = False


@dataclass(frozen=True)
class Report:
    """All runs have come to a rung, and the worker waits for an answer: whether to go on.

    Attributes:
        rung: 1 to :data:`RUNGS`.
        scores: score of the mean policy of each run.
    """

    rung: int
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Done:
    """A job is done; ``evaluations`` are the mean returns of the runs in Gymnasium, if they were asked for."""

    evaluations: tuple[float, ...] = ()


@dataclass(frozen=True)
class Failed:
    """A job cannot be done, for a reason that the user can remove."""

    message: str


def serve(pipe: connection.Connection) -> None:
    """Train one job after another, until the parent process closes the pipe or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent decides what it means
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        while True:
            _train(pipe, pipe.recv())
    except (EOFError, BrokenPipeError):
        return


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _train(pipe: connection.Connection, job: Job) -> None:
    from es_flipout.envs import EnvironmentFailureError, UnsupportedEnvironmentError
    from es_flipout.training.evaluate import evaluate

    try:
        with ExitStack() as stack:
            runs = [stack.enter_context(_Run(config)) for config in job.configs]
            for report in _reports(runs):
                pipe.send(report)
                if not pipe.recv():
                    return
            evaluations = ()
            if job.evaluate:
                episodes = [run.config.logging.evaluation_episodes for run in runs]
                played = (
                    evaluate(run.trainer.trained_agent(), run.config, n) for run, n in zip(runs, episodes, strict=True)
                )
                evaluations = tuple(each.mean_return for each in played)
    except (UserError, EnvironmentFailureError, UnsupportedEnvironmentError) as error:
        pipe.send(Failed(str(error)))
    else:
        pipe.send(Done(evaluations))


def _reports(runs: list[_Run]) -> Iterator[Report]:
    for rung in range(1, RUNGS + 1):
        yield Report(rung, tuple(run.score_at(rung / RUNGS) for run in runs))


class _Run:
    """A run that stops wherever its score is wanted."""

    def __init__(self, config: TrainConfig) -> None:
        from es_flipout.training.setup import make_trainer

        self.config = config
        self.trainer: Trainer = make_trainer(config)
        self._scored: int | None = None  # the generation of the newest score
        self._score = 0.0

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.trainer.close()

    def score_at(self, fraction: float) -> float:
        """Train up to a fraction of the run, and return the score of the mean policy."""
        trainer, schedule = self.trainer, self.config.schedule
        while (
            not trainer.finished
            and schedule.progress(trainer.progress.generation, trainer.progress.env_steps) < fraction
        ):
            trainer.step()
        if trainer.progress.generation != self._scored:
            final = trainer.progress.score if trainer.finished else None
            self._score = trainer.score() if final is None else final
            self._scored = trainer.progress.generation
        return self._score
