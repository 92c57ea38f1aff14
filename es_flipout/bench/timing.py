"""Interleaved timing: contenders are measured in turn (A B C A B C ...), and ratios are taken within a round.

A busy or throttled machine slows down consecutive measurements alike, so a ratio within a round varies much less than
the rates themselves.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from es_flipout.errors import UserError
from es_flipout.runinfo import environment
from es_flipout.training.checkpoint import atomic_write


class Measured(NamedTuple):
    """Completed work (calls, steps) and the seconds it took."""

    work: float
    seconds: float

    @property
    def rate(self) -> float:
        """Work per second."""
        return self.work / self.seconds


Measure = Callable[[], Measured]


@dataclass(frozen=True)
class Spread:
    """Median, minimum and maximum over rounds."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Compute the spread of at least one value."""
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True)
class SideBySide:
    """Rates (work per second) by name; entry ``i`` of each sequence is from round ``i``."""

    rates: Mapping[str, Sequence[float]]

    def rate(self, name: str) -> Spread:
        """Return the spread of the rate of ``name``."""
        return Spread.of(self.rates[name])

    def ratio(self, name: str, to: str) -> Spread:
        """Return the spread of the rate of ``name`` divided by the rate of ``to`` in the same round."""
        return Spread.of([a / b for a, b in zip(self.rates[name], self.rates[to], strict=True)])


def interleave(
    measures: Mapping[str, Measure],
    rounds: int,
    warmup: int = 1,
    after_round: Callable[[SideBySide], object] | None = None,
) -> SideBySide:
    """Measure everything once per round, in the given order, after ``warmup`` rounds that are discarded.

    Args:
        measures: measurements by name.
        rounds: number of rounds that count.
        warmup: number of rounds before them.
        after_round: called after each round that counts, with the rates so far.

    Raises:
        ValueError: ``rounds`` < 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    rates: dict[str, list[float]] = {name: [] for name in measures}
    for number in range(-warmup, rounds):
        for name, measure in measures.items():
            measured = measure()
            if number >= 0:
                rates[name].append(measured.rate)
        if number >= 0 and after_round is not None:
            after_round(SideBySide(rates))
    return SideBySide(rates)


def timed(play: Callable[[], float]) -> Measured:
    """Time a call of a function that returns the work it has done."""
    started = time.perf_counter()
    work = play()
    return Measured(work, time.perf_counter() - started)


def repeated(call: Callable[[], object], seconds: float, clock: Callable[[], float] = time.perf_counter) -> Measure:
    """Return a measurement of calls per second, with at least one call and as many as take about ``seconds``.

    The number of calls is determined now, by a trial.
    """
    call()
    started, calls = clock(), 0
    while calls == 0 or clock() - started < seconds / 5:
        call()
        calls += 1
    count = max(1, round(calls * seconds / (clock() - started)))

    def measure() -> Measured:
        started = clock()
        for _ in range(count):
            call()
        return Measured(count, clock() - started)

    return measure


def repeated_on(device: torch.device, call: Callable[[], object], seconds: float) -> Measure:
    """Like :func:`repeated`, but on CUDA, events measure the time, and a measurement waits for all launched work."""
    if device.type != "cuda":
        return repeated(call, seconds)

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    count = round(repeated(call, seconds, clock)().work)

    def measure() -> Measured:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return Measured(count, start.elapsed_time(end) / 1e3)

    return measure


class Record:
    """The points of a benchmark; the file is written again whenever there is another one.

    A point is a dictionary that contains its sizes. Its measurement may fail: the point then has the sizes and an
    ``error``, and counts as one that is there.
    """

    def __init__(
        self, command: str, options: Mapping[str, Any], groups: Sequence[str], path: Path | None, resume: bool
    ) -> None:
        """Begin, with the points that the file holds if it is to be resumed.

        Args:
            command: name of the benchmark.
            options: its options.
            groups: names of lists of points.
            path: the file; None to write nothing.
            resume: whether to keep the points in the file.

        Raises:
            UserError: the file was measured with other options, or on another machine.
        """
        self._command, self._path = command, path
        self._options = {name: value for name, value in options.items() if name not in ("json", "resume")}
        self._points: dict[str, list[dict[str, Any]]] = {group: [] for group in groups}
        if resume and path is not None and path.exists():
            held = json.loads(path.read_text(encoding="utf-8"))
            self._check(held, path)
            self._points |= held["results"]

    def point(
        self, group: str, sizes: Mapping[str, object], measure: Callable[[], Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Return the point of these sizes: the one in the file, or one that is measured and written now."""
        for held in self._points[group]:
            if all(held.get(name) == value for name, value in sizes.items()):
                return held
        try:
            found = {**sizes, **measure()}
        except Exception as error:
            self._points[group].append({**sizes, "error": reason(error)})
            self.write()
            raise
        self._points[group].append(found)
        self.write()
        return found

    def write(self) -> dict[str, Any]:
        """Write the file, and return the JSON-serializable result."""
        return report(self._command, self._options, self._points, self._path)

    def _check(self, held: Mapping[str, Any], path: Path) -> None:
        own = json.loads(json.dumps(self._options, default=str))
        if (held["command"], held["options"]) != (self._command, own):
            raise UserError(f"{path} was measured with other options; choose another --json, or omit --resume")
        if held["environment"]["hardware"] != environment()["hardware"]:
            raise UserError(f"{path} was measured on another machine; choose another --json, or omit --resume")


def measured_points(points: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the points whose measurement did not fail."""
    return [point for point in points if "error" not in point]


def reason(error: Exception) -> str:
    """Return an error in one line; the type of an error that is not the user's is named."""
    said = " ".join(str(error).split())[:300]
    return said if isinstance(error, UserError) else f"{type(error).__name__}: {said}"


def report(command: str, options: Mapping[str, Any], results: Mapping[str, Any], path: Path | None) -> dict[str, Any]:
    """Return the JSON-serializable result of a benchmark, and write it to ``path`` if one is given."""
    whole = {"command": command, "options": dict(options), "environment": environment(), "results": dict(results)}
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(whole, indent=2, default=str) + "\n")
    return whole
