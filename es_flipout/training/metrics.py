"""Metrics of a run: ``metrics.csv`` and terminal output."""

from __future__ import annotations

import contextlib
import csv
import io
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from es_flipout.training.checkpoint import atomic_write

_LINE_EVERY_S = 10.0


@dataclass(frozen=True)
class Metrics:
    """One generation; a row of ``metrics.csv``."""

    generation: int
    """Number of completed generations."""
    env_steps: int
    """Live environment steps of training so far (without scoring)."""
    env_steps_per_s: float
    """Live environment steps of this generation per second, including update and bookkeeping."""
    wall_s: float
    """Seconds of training and scoring so far."""
    mean_return: float
    """Mean return over the members (the environment's own reward)."""
    best_return: float
    """Return of the best member."""
    score: float | None
    """Mean return of the mean policy, if it was scored after this generation."""
    mean_length: float
    """Mean number of steps per episode."""
    sigma: float
    """Standard deviation of the perturbations."""
    learning_rate: float
    """Step size."""
    diverged: int
    """Number of episodes that ended because the state was no longer finite."""
    nan_returns: int
    """Number of members whose return is NaN (ranked worst)."""

    def measured(self) -> dict[str, float]:
        """Return what was measured in this generation, by name."""
        return {name: value for name, value in asdict(self).items() if name != "generation" and value is not None}


COLUMNS = tuple(field.name for field in fields(Metrics))


class MetricsLog:
    """Appends every generation to ``metrics.csv`` in the run directory."""

    def __init__(self, run_dir: Path, generation: int) -> None:
        """Open the file and drop rows after ``generation``, which a run wrote after its last checkpoint."""
        self._path = run_dir / "metrics.csv"
        rows = [",".join(COLUMNS)]
        if self._path.exists():
            lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)[1:]
            rows += [line.removesuffix("\n") for line in lines if _before(line, generation)]
        atomic_write(self._path, "\n".join(rows) + "\n")
        self._file = self._path.open("a", encoding="utf-8", newline="")

    def write(self, metrics: Metrics) -> None:
        """Append one generation."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow("" if v is None else v for v in asdict(metrics).values())
        with _naming(self._path):
            self._file.write(text.getvalue())
            self._file.flush()

    def close(self) -> None:
        """Flush and close."""
        with _naming(self._path):
            self._file.close()


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Add the name of a file to an error of writing to it, which the system does not name."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _before(line: str, generation: int) -> bool:
    first, complete = line.split(",")[0], line.endswith("\n") and line.count(",") == len(COLUMNS) - 1
    return complete and re.fullmatch(r"[0-9]{1,18}", first) is not None and int(first) <= generation


class Reporter(Protocol):
    """Shows the progress of a run to the user."""

    def __enter__(self) -> Self:
        """Start the display."""
        ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Stop the display."""
        ...

    def show(self, metrics: Metrics, progress: float) -> None:
        """Show a completed generation; ``progress`` of the run is in [0, 1]."""
        ...

    def say(self, message: str) -> None:
        """Show a one-line message."""
        ...


class Silent:
    """A reporter without output."""

    def __enter__(self) -> Self:
        """Do nothing."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Do nothing."""

    def show(self, metrics: Metrics, progress: float) -> None:
        """Do nothing."""

    def say(self, message: str) -> None:
        """Do nothing."""


class _TwoLines(Progress):
    """A progress bar with the field ``status`` of its task in a line below, so that neither displaces the other."""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Return both lines."""
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text(task.fields["status"], overflow="ellipsis", no_wrap=True)


class EpisodeBar:
    """A progress bar of episodes on a terminal; elsewhere one line every ten seconds."""

    def __init__(self, console: Console, title: str, episodes: int) -> None:
        self._console, self._title, self._episodes = console, title, episodes
        self._last_line = time.monotonic()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(24),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
        )
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self._task = self._bar.add_task(title, total=episodes)

    def __enter__(self) -> Self:
        """Start the bar."""
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Remove the bar."""
        self._bar.stop()

    def show(self, played: int) -> None:
        """Show the number of episodes played so far."""
        self._bar.update(self._task, completed=played)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._last_line > _LINE_EVERY_S:
            self._last_line = now
            self._console.print(
                f"{self._title}: {played} of {self._episodes} episodes", highlight=False, soft_wrap=True
            )


class TerminalReporter:
    """A live progress bar on a terminal; elsewhere (files, pipes) one line every ten seconds."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._score: float | None = None
        self._last_line = time.monotonic()
        self._bar = _TwoLines(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:3.0f}%"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=1.0, status="starting")

    def __enter__(self) -> Self:
        """Start the progress bar."""
        self._last_line = time.monotonic()
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Stop the bar and leave its last state on the screen."""
        with contextlib.suppress(OSError):
            self._bar.stop()

    def show(self, metrics: Metrics, progress: float) -> None:
        """Update the bar; without a terminal, print a line if the last one is older than ten seconds.

        A terminal that was closed, or a pipe that nobody reads any more, does not end the run.
        """
        if metrics.score is not None:
            self._score = metrics.score
        score = "-" if self._score is None else f"{self._score:,.1f}"
        status = (
            f"gen {metrics.generation}  mean {metrics.mean_return:,.1f}  best {metrics.best_return:,.1f}  "
            f"score {score}  {_short(metrics.env_steps)} steps  {_short(metrics.env_steps_per_s)}/s"
        )
        with contextlib.suppress(OSError):
            self._bar.update(self._task, completed=progress, status=status)
            now = time.monotonic()
            if not self._console.is_terminal and (now - self._last_line > _LINE_EVERY_S or progress >= 1):
                self._last_line = now
                self._console.print(f"{progress:4.0%}  {status}", highlight=False, soft_wrap=True)

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        with contextlib.suppress(OSError):
            self._console.print(message, highlight=False, soft_wrap=True)


def _short(count: float) -> str:
    """Format a number with three digits: 950, 85.2k, 1.25M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"
