"""Experiment trackers: TensorBoard, Weights & Biases, MLflow, Trackio, and the protocol for one's own.

Each class uses the tracker's own client. The packages are imported when a tracker is created; all but TensorBoard are extras.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from es_flipout.config import TrainConfig
from es_flipout.errors import UserError
from es_flipout.training.metrics import Metrics

_PROJECT = "es-flipout"
_VIDEOS = (".mp4", ".gif")

State = Literal["finished", "interrupted", "failed"]


@dataclass(frozen=True)
class TrackedRun:
    """A run that starts or continues.

    Attributes:
        run_dir: directory of the run; its name is the name of the run.
        config: configuration of the run.
        generation: number of completed generations; 0 for a new run.
        id: what :meth:`Tracker.start` returned when the run was new; None for a new run.
    """

    run_dir: Path
    config: TrainConfig
    generation: int
    id: str | None


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        state: whether it reached its end, was interrupted, or stopped with an error.
        scores: final scores by name, such as ``evaluation/mean_return``; empty unless the run is finished.
        files: configuration, metrics, policies, evaluations and videos of the run.
    """

    state: State
    scores: Mapping[str, float]
    files: Sequence[Path]


class Tracker(Protocol):
    """Receives what happens in a run. A class without required arguments can be named on the command line."""

    def start(self, run: TrackedRun) -> str | None:
        """Open a new tracked run, or continue the one with the id ``run.id``.

        Returns:
            The id of the tracked run, which is passed when the run is resumed; None if none is needed.
        """
        ...

    def log(self, metrics: Metrics) -> None:
        """Log a generation. Called after every generation, so it must return quickly.

        A resumed run repeats the generations since its last checkpoint, with the same values.
        """
        ...

    def finish(self, outcome: Outcome) -> None:
        """Store the final scores and files, and close the tracked run."""
        ...


class TensorBoard:
    """TensorBoard events in the directory ``tensorboard`` of the run."""

    def start(self, run: TrackedRun) -> None:
        """Open the event file; events of generations that are repeated are dropped."""
        from torch.utils.tensorboard import SummaryWriter

        self._step = run.generation
        self._excepthook = threading.excepthook
        threading.excepthook = self._in_thread  # first: the writer may fail as soon as it exists
        try:
            self._board = SummaryWriter(str(run.run_dir / "tensorboard"), purge_step=run.generation + 1)
            if run.generation == 0:
                lines = (f"| {name} | {value} |" for name, value in run.config.flat().items())
                self._board.add_text("config", "\n".join(("| option | value |", "|---|---|", *lines)), 0)
        except BaseException:
            threading.excepthook = self._excepthook
            raise

    def log(self, metrics: Metrics) -> None:
        """Add a scalar per metric."""
        self._step = metrics.generation
        for name, value in metrics.measured().items():
            self._board.add_scalar(name, value, self._step)

    def finish(self, outcome: Outcome) -> None:
        """Add the final scores and close the file."""
        try:
            for name, value in outcome.scores.items():
                self._board.add_scalar(name, value, self._step)
            self._board.close()
        finally:
            threading.excepthook = self._excepthook

    def _in_thread(self, failed: threading.ExceptHookArgs) -> None:
        # TensorBoard writes in a thread. If the disk is full, the main thread gets the same error, and reports it.
        if not issubclass(failed.exc_type, OSError):
            self._excepthook(failed)


class WeightsAndBiases:
    """Weights & Biases (wandb), in the directory ``wandb`` of the run; the variables ``WANDB_*`` select where to log."""

    def __init__(self) -> None:
        self._wandb = _import("wandb", "wandb")

    def start(self, run: TrackedRun) -> str:
        """Create or resume the W&B run."""
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            dir=run.run_dir,
            name=run.run_dir.name,
            id=run.id,
            resume=None if run.id is None else "allow",
            config=run.config.flat(),
            allow_val_change=True,  # a resumed run may be computed elsewhere
            reinit="create_new",
            settings=self._wandb.Settings(console="off"),  # its capture would garble the progress bar
        )
        return self._run.id

    def log(self, metrics: Metrics) -> None:
        """Log a step; W&B ignores the steps that it has already."""
        self._run.log(metrics.measured(), step=metrics.generation)

    def finish(self, outcome: Outcome) -> None:
        """Store the scores in the summary, and the files as an artifact."""
        self._run.summary.update(dict(outcome.scores))
        artifact = self._wandb.Artifact(f"run-{self._run.id}", type="run")
        for path in outcome.files:
            artifact.add_file(str(path))
            if path.suffix in _VIDEOS:
                self._run.log({path.stem: self._wandb.Video(str(path), format=path.suffix[1:])})
        self._run.log_artifact(artifact)
        self._run.finish(exit_code=int(outcome.state == "failed"))


class MLflow:
    """MLflow, with the tracking URI of ``MLFLOW_TRACKING_URI``; values are sent every few seconds."""

    _EVERY_S = 2.0
    _STATUS: Mapping[State, str] = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}

    def __init__(self) -> None:
        _import("mlflow", "mlflow")
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]  (an extra)
        from mlflow.entities import Metric, Param  # pyright: ignore[reportMissingImports]  (an extra)

        self._client, self._metric, self._param = MlflowClient(), Metric, Param
        self._waiting: list[Any] = []
        self._sent_at = time.monotonic()

    def start(self, run: TrackedRun) -> str:
        """Create or continue the MLflow run, in the experiment of ``MLFLOW_EXPERIMENT_NAME``."""
        client = self._client
        if run.id is not None:
            self._id = run.id
            client.update_run(self._id, status="RUNNING")
            steps = [each.step for each in client.get_metric_history(self._id, "env_steps")]
            self._step = max(steps, default=0)
            return self._id
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        found = client.get_experiment_by_name(name)
        experiment = client.create_experiment(name) if found is None else found.experiment_id
        self._id, self._step = client.create_run(experiment, run_name=run.run_dir.name).info.run_id, 0
        client.log_batch(self._id, params=[self._param(k, str(v)) for k, v in run.config.flat().items()])
        return self._id

    def log(self, metrics: Metrics) -> None:
        """Log the metrics of a generation that MLflow does not have yet."""
        if metrics.generation <= self._step:
            return
        self._step = metrics.generation
        self._add(metrics.measured())
        if time.monotonic() - self._sent_at > self._EVERY_S:
            self._send()

    def finish(self, outcome: Outcome) -> None:
        """Log the final scores and the files, and set the status of the run."""
        self._add(outcome.scores)
        self._send()
        for path in outcome.files:
            self._client.log_artifact(self._id, str(path))
        self._client.set_terminated(self._id, self._STATUS[outcome.state])

    def _add(self, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self._waiting += [self._metric(name, float(value), now, self._step) for name, value in values.items()]

    def _send(self) -> None:
        for start in range(0, len(self._waiting), 1000):  # the most that MLflow accepts in one call
            self._client.log_batch(self._id, metrics=self._waiting[start : start + 1000])
        self._waiting, self._sent_at = [], time.monotonic()


class Trackio:
    """Trackio, in its local database; the variables ``TRACKIO_*`` select where to log."""

    def __init__(self) -> None:
        self._trackio = _import("trackio", "trackio")

    def start(self, run: TrackedRun) -> str:
        """Create or resume the Trackio run, whose name is its id."""
        name = run.id if run.id is not None else f"{run.run_dir.name}-{os.urandom(3).hex()}"
        self._step = run.generation
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
            self._run = self._trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", _PROJECT),
                name=name,
                config=run.config.flat(),
                resume="never" if run.id is None else "allow",
                embed=False,
            )
        return name

    def log(self, metrics: Metrics) -> None:
        """Log a step."""
        self._step = metrics.generation
        self._run.log(metrics.measured(), step=self._step)

    def finish(self, outcome: Outcome) -> None:
        """Log the final scores, and the files as an artifact."""
        with contextlib.redirect_stdout(sys.stderr):
            videos = {path.stem: self._trackio.Video(path) for path in outcome.files if path.suffix in _VIDEOS}
            if outcome.scores or videos:
                self._run.log({**outcome.scores, **videos}, step=self._step)
            artifact = self._trackio.Artifact(f"run-{self._run.name}", type="run")
            for path in outcome.files:
                artifact.add_file(path)
            self._run.log_artifact(artifact)
            self._trackio.finish()


TRACKERS: Mapping[str, Callable[[], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
    "trackio": Trackio,
}


def make_tracker(name: str) -> Tracker:
    """Create a tracker by its name, or of one's own class by ``module:Class``.

    Raises:
        UserError: there is no such tracker, or its package is not installed.
    """
    if name in TRACKERS:
        return TRACKERS[name]()
    module, _, kind = name.partition(":")
    if not kind:
        near = difflib.get_close_matches(name, TRACKERS, n=1)
        hint = (
            f"did you mean {near[0]}?" if near else f"choose from {', '.join(TRACKERS)}, or module:Class for your own"
        )
        raise UserError(f"unknown tracker {name!r}: {hint}")
    try:
        return getattr(importlib.import_module(module), kind)()
    except (ImportError, AttributeError) as error:
        raise UserError(f"tracker {name} cannot be created: {error}") from None


def _import(package: str, extra: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"tracking with {package} needs it installed: pip install 'es-flipout[{extra}]' ({error})"
        ) from None
