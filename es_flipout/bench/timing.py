"""Side-by-side timing: what is compared runs in turns (A B C A B C ...), and ratios are taken round by round.

A busy or throttled machine slows neighbours in time alike, so a ratio within a round is far steadier than either rate.
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

from es_flipout.checkpoint import atomic_write
from es_flipout.runinfo import environment


class Measured(NamedTuple):
    """Work that was done (calls, steps) and the seconds it took."""

    work: float
    seconds: float

    @property
    def rate(self) -> float:
        """Work per second."""
        return self.work / self.seconds


Measure = Callable[[], Measured]


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of the rounds."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True)
class SideBySide:
    """Rates (work per second) by name; entry ``i`` of each is from round ``i``."""

    rates: Mapping[str, Sequence[float]]

    def rate(self, name: str) -> Spread:
        """Rate of one of them."""
        return Spread.of(self.rates[name])

    def ratio(self, name: str, to: str) -> Spread:
        """Rate of ``name`` divided by the rate of ``to`` in the same round."""
        return Spread.of([a / b for a, b in zip(self.rates[name], self.rates[to], strict=True)])


def interleave(measures: Mapping[str, Measure], rounds: int, warmup: int = 1) -> SideBySide:
    """Measure everything once in every round, in the given order, after ``warmup`` rounds that do not count.

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
    """Call something that returns the work it has done."""
    started = time.perf_counter()
    work = play()
    return Measured(work, time.perf_counter() - started)


def repeated(call: Callable[[], object], seconds: float, clock: Callable[[], float] = time.perf_counter) -> Measure:
    """Measures calls per second, with as many calls as fill about ``seconds`` (found out now) and at least one."""
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
    """As :func:`repeated`; on CUDA the device's own events measure, and every measurement waits for what was started."""
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
    """The JSON-ready result of a benchmark, written to ``path`` where one is given."""
    whole = {"command": command, "options": dict(options), "environment": environment(), "results": dict(results)}
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(whole, indent=2, default=str) + "\n")
    return whole
