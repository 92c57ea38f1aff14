"""Worker processes: who has which job, and what they report."""

from __future__ import annotations

import contextlib
import multiprocessing
from multiprocessing import connection
from types import TracebackType
from typing import NamedTuple, Self

from es_flipout.tuning.worker import Done, Failed, Job, Report, serve


class Died(NamedTuple):
    """The process of a job has ended on its own; ``exit_code`` is negative for a signal."""

    exit_code: int | None


class Event(NamedTuple):
    """Something that happened to a job, by its key."""

    key: str
    what: Report | Done | Failed | Died


class _Worker:
    """A process and the key of its job; None if it is idle."""

    def __init__(self) -> None:
        # Not forked: the parent has threads, and may have used a GPU.
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other,), daemon=True)
        self.process.start()
        other.close()
        self.key: str | None = None


class Pool:
    """Up to ``size`` worker processes, started when needed; leaving the context kills them."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._workers: list[_Worker] = []

    def __enter__(self) -> Self:
        """Do nothing; processes start with their first job."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Kill all processes: they hold nothing that must be saved."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()
        self._workers.clear()

    @property
    def busy(self) -> int:
        """Number of jobs that are running."""
        return sum(worker.key is not None for worker in self._workers)

    @property
    def has_room(self) -> bool:
        """Whether another job can start at once."""
        return self.busy < self._size

    def submit(self, key: str, job: Job) -> None:
        """Start a job; :attr:`has_room` must be true."""
        self._workers = [worker for worker in self._workers if worker.key is not None or worker.process.is_alive()]
        idle = [worker for worker in self._workers if worker.key is None]
        if not idle:
            idle.append(_Worker())
            self._workers.append(idle[0])
        idle[0].key = key
        idle[0].pipe.send(job)

    def events(self, timeout: float) -> list[Event]:
        """Wait for up to ``timeout`` seconds for something to happen."""
        busy = {worker.pipe: worker for worker in self._workers if worker.key is not None}
        ready = connection.wait(list(busy), timeout)
        return [self._event(worker) for pipe, worker in busy.items() if pipe in ready]

    def answer(self, key: str, go_on: bool) -> None:
        """Answer the report of a job: whether to go on with it."""
        (worker,) = (worker for worker in self._workers if worker.key == key)
        with contextlib.suppress(OSError):  # if its process has ended, that is the next event
            worker.pipe.send(go_on)
        if not go_on:
            worker.key = None

    def _event(self, worker: _Worker) -> Event:
        assert worker.key is not None
        key = worker.key
        try:
            what = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join()
            worker.pipe.close()
            self._workers.remove(worker)
            return Event(key, Died(worker.process.exitcode))
        if not isinstance(what, Report):
            worker.key = None
        return Event(key, what)
