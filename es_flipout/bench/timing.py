"""Interleaved timing: contenders are measured in turn (A B C A B C ...), and ratios are taken within a round.

A busy or throttled machine slows down consecutive measurements alike, so a ratio within a round varies much less than
the rates themselves.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

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


def interleave(measures: Mapping[str, Measure], rounds: int, warmup: int = 1) -> SideBySide:
    """Measure everything once per round, in the given order, after ``warmup`` rounds that are discarded.

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


def report(command: str, options: Mapping[str, Any], results: Mapping[str, Any], path: Path | None) -> dict[str, Any]:
    """Return the JSON-serializable result of a benchmark, and write it to ``path`` if one is given."""
    whole = {"command": command, "options": dict(options), "environment": environment(), "results": dict(results)}
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(whole, indent=2, default=str) + "\n")
    return whole
