"""The runs in a directory, and the state of each: what ``es-flipout runs`` lists."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from es_flipout.config import TrainConfig
from es_flipout.errors import UserError
from es_flipout.training.checkpoint import Progress, load_progress
from es_flipout.training.lock import is_locked
from es_flipout.training.run_directory import read_config

State = Literal["finished", "training", "stopped", "unreadable"]


@dataclass(frozen=True)
class RunState:
    """One run.

    Attributes:
        run_dir: its directory.
        env_id: the environment; None for a run that cannot be read.
        seed: seed of the run.
        generation, env_steps: progress at the newest checkpoint.
        score: the final score in Gymnasium; before that, the best score of training; None before the first one.
        state: ``finished`` (trained and scored), ``training`` (a process is at work), ``stopped`` or ``unreadable``.
        updated: local time of the last change, ISO 8601.
        error: why the run cannot be read.
    """

    run_dir: str
    env_id: str | None
    seed: int | None
    generation: int | None
    env_steps: int | None
    score: float | None
    state: State
    updated: str
    error: str | None = None


def list_runs(folder: Path) -> list[RunState]:
    """Return the runs in a directory, by environment and seed; the directory may be a run itself.

    Raises:
        UserError: the directory does not exist.
    """
    if not folder.is_dir():
        raise UserError(f"directory {folder} does not exist")
    found = [_state(run_dir) for run_dir in run_dirs(folder)]
    return sorted(found, key=lambda run: (run.env_id or "~", -1 if run.seed is None else run.seed, run.run_dir))


def run_dirs(folder: Path) -> Iterator[Path]:
    """Yield the run directories in a directory, at any depth; what is inside of a run is skipped."""
    if (folder / "config.json").is_file() and (folder / "environment.json").is_file():
        yield folder
        return
    for child in sorted(folder.iterdir()):
        if child.is_dir() and not child.is_symlink() and not child.name.startswith("."):
            yield from run_dirs(child)


def _state(run_dir: Path) -> RunState:
    changed = [run_dir / "config.json", run_dir / "metrics.csv", run_dir / "evaluation.json"]
    newest = max(path.stat().st_mtime for path in changed if path.exists())
    updated = datetime.fromtimestamp(newest).isoformat(" ", "seconds")
    try:
        config = read_config(run_dir, trust=True)  # nothing is imported here
        progress = load_progress(run_dir / "checkpoints")
        score = _final_score(run_dir)
    except (UserError, OSError, ValueError) as error:
        return RunState(str(run_dir), None, None, None, None, None, "unreadable", updated, str(error))
    at = progress if progress is not None else Progress(0, 0, 0.0, None)
    state: State = "finished" if score is not None or _finished(config, at, run_dir) else "stopped"
    return RunState(
        str(run_dir),
        config.task.env_id,
        config.schedule.seed,
        at.generation,
        at.env_steps,
        score if score is not None else at.best_score,
        "training" if is_locked(run_dir) else state,
        updated,
    )


def _final_score(run_dir: Path) -> float | None:
    path = run_dir / "evaluation.json"
    if not path.exists():
        return None
    return json.loads(path.read_text(encoding="utf-8"))["mean_return"]


def _finished(config: TrainConfig, at: Progress, run_dir: Path) -> bool:
    """Whether a run ended with a score that is not finite, which its file has as null."""
    return (run_dir / "evaluation.json").exists() and config.schedule.progress(at.generation, at.env_steps) >= 1
