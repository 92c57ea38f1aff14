"""All trackers of a run together: their ids are kept for a resume, and a failing tracker does not stop the training."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from es_flipout.config import TrainConfig
from es_flipout.errors import UserError
from es_flipout.training.checkpoint import atomic_write
from es_flipout.training.metrics import Metrics
from es_flipout.training.trackers import Outcome, State, TrackedRun, Tracker

_IDS = "tracking.json"
_FILES = ("*.json", "*.csv", "*.safetensors", "*.mp4", "*.gif")


class Tracking:
    """The trackers of a run by their names; there may be none."""

    def __init__(self, trackers: Mapping[str, Tracker], say: Callable[[str], None]) -> None:
        """Store the trackers; nothing is started yet.

        Args:
            trackers: the trackers by name.
            say: shows a message to the user.
        """
        self._trackers = dict(trackers)
        self._started: dict[str, Tracker] = {}
        self._say = say
        self._run_dir: Path | None = None

    def start(self, run_dir: Path, config: TrainConfig, generation: int) -> None:
        """Start all trackers, with the ids that they returned when the run was new.

        Raises:
            UserError: a tracker could not be started.
            OSError: the disk is full.
        """
        self._run_dir, path = run_dir, run_dir / _IDS
        ids: dict[str, str] = _read_ids(path)
        for name, tracker in self._trackers.items():
            try:
                own = tracker.start(TrackedRun(run_dir, config, generation, ids.get(name)))
            except Exception as error:
                if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                    raise OSError(errno.ENOSPC, error.strerror, error.filename or str(run_dir / name)) from error
                raise UserError(f"tracker {name} could not be started: {_line(error)}") from error
            self._started[name] = tracker
            if own is not None and own != ids.get(name):
                ids[name] = own
                atomic_write(path, json.dumps(ids, indent=2) + "\n")

    def log(self, metrics: Metrics) -> None:
        """Log a generation to all trackers."""
        self._each(lambda tracker: tracker.log(metrics))

    def finish(self, state: State, scores: Mapping[str, float]) -> None:
        """Hand the final scores and the files of the run directory to all trackers, and close them."""
        if self._run_dir is None:
            return
        files = sorted(path for pattern in _FILES for path in self._run_dir.glob(pattern) if path.name != _IDS)
        self._each(lambda tracker: tracker.finish(Outcome(state, scores, files)))
        self._started.clear()

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._started.items()):
            try:
                call(tracker)
            except Exception as error:
                del self._started[name]
                self._say(f"warning: nothing more is sent to tracker {name}, which failed: {_line(error)}")


def _read_ids(path: Path) -> dict[str, str]:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); remove it to start new tracked runs") from None


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
