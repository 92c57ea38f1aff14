"""What a search looks like: a live table on a terminal; elsewhere (files, pipes) a line for everything that ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table

from es_flipout.tuning.worker import RUNGS, Report


@dataclass(frozen=True)
class Row:
    """A trial or a confirmation.

    Attributes:
        name: what is trained.
        state: what it is doing.
        scores: newest score of every run.
        values: values of the search space.
    """

    name: str
    state: str
    scores: Sequence[float] = ()
    values: Mapping[str, Any] | None = None


class View:
    """The live table: a heading, the jobs that run, and the best so far.

    Attributes:
        heading: returns the line above the table.
        best: returns the rows below the jobs that run.
    """

    def __init__(self, console: Console, heading: Callable[[], str], best: Callable[[], Sequence[Row]]) -> None:
        self.heading, self.best = heading, best
        self._console = console
        self._running: dict[str, Row] = {}
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=2, transient=True)

    def __enter__(self) -> Self:
        """Show the table."""
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Remove the live table; :meth:`table` returns the last state."""
        self._live.stop()

    def started(self, key: str, values: Mapping[str, Any] | None = None) -> None:
        """Add a job."""
        self._running[key] = Row(key, "running", (), values)

    def reported(self, key: str, report: Report) -> None:
        """Show the newest scores of a job."""
        self._running[key] = Row(key, f"running {report.rung}/{RUNGS}", report.scores, self._running[key].values)

    def ended(self, key: str, line: str) -> None:
        """Remove a job; without a terminal, print a line."""
        self._running.pop(key, None)
        if not self._console.is_terminal:
            self.say(line)

    def say(self, line: str) -> None:
        """Print a line."""
        self._console.print(line, highlight=False, soft_wrap=True)

    def _render(self) -> RenderableType:
        return Group(self.heading(), table([*self._running.values(), *self.best()]))


def table(rows: Sequence[Row]) -> Table:
    """Return a table of trials."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "state"):
        shown.add_column(name, no_wrap=True)
    for name in ("score", "worst … best seed"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("values", overflow="fold")
    for row in rows:
        shown.add_row(row.name, row.state, *score_texts(row.scores), value_text(row.values or {}))
    return shown


def score_texts(scores: Sequence[float]) -> tuple[str, str]:
    """Return the mean of some scores, and the worst and the best of them."""
    if not scores:
        return "-", "-"
    return f"{sum(scores) / len(scores):,.1f}", f"{min(scores):,.1f} … {max(scores):,.1f}"


def value_text(values: Mapping[str, Any]) -> str:
    """Return values of the search space in one line, without those that turn an option off."""
    there = ((name, value) for name, value in values.items() if value is not None)
    shown = ((name, f"{value:.3g}" if isinstance(value, float) else value) for name, value in there)
    return " ".join(f"{name}={value}" if " " not in str(value) else f"{name}='{value}'" for name, value in shown)
