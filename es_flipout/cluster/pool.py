"""A pool of Ray actors that process chunks of work; if a worker dies, its chunks are given to other workers."""

from __future__ import annotations

import re
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from es_flipout.cluster.connect import Connection
from es_flipout.errors import UserError
from es_flipout.rollout.episodes import RolloutInterrupted, ShouldStop

Chunk = TypeVar("Chunk")

START_S = 120.0  # time limit for a worker to import torch and build its environments
_LOOK_S = 0.2  # longest interval between calls of the caller's should_stop
_QUEUED = 2  # chunks assigned to a worker at a time, so that it does not wait for the next one
_MOST_LOSSES = 3  # give up after this many workers died of one chunk
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class WorkersLostError(UserError):
    """No worker is left, or one chunk kills every worker that processes it."""


@dataclass
class _Worker:
    """One worker: its actor, and the numbers of the chunks assigned to it."""

    actor: Any
    at_hand: deque[int] = field(default_factory=deque)


class Pool:
    """A pool of ``count`` actors of one class.

    Attributes:
        replaced: number of workers that died and were replaced so far.
        active: number of workers that are given chunks; None for all.
    """

    def __init__(self, connection: Connection, make: Callable[[], Any], count: int, start_s: float = START_S) -> None:
        """Start the actors and wait for them.

        Args:
            connection: connection to Ray.
            make: starts one actor; its method ``ready`` returns once it can work, and :attr:`answers` keeps the
                results.
            count: number of actors.
            start_s: time limit for starting them, in seconds.

        Raises:
            UserError: not all actors started; the message gives the reason.
        """
        self._ray = connection.ray
        self._make = make
        self._start_s = start_s
        self.replaced = 0
        self.active: int | None = None
        self._workers = [_Worker(make()) for _ in range(count)]
        self._starting: dict[Any, tuple[_Worker, float]] = {}
        self._arrived: SimpleQueue[Any] = SimpleQueue()
        self._calls: dict[Any, tuple[_Worker, int, Any]] = {}
        waiting = [worker.actor.ready.remote() for worker in self._workers]
        done, late = self._ray.wait(waiting, num_returns=count, timeout=start_s)
        if late:
            self.close()
            raise UserError(
                f"only {len(done)} of {count} workers started within {start_s:.0f} s: the cluster has {connection.cores} "
                "cores, some of which may be in use; request fewer workers with --workers"
            )
        try:
            self.answers: list[Any] = self._ray.get(waiting)
        except self._ray.exceptions.RayError as error:
            self.close()
            raise self._why(error) from None

    def __len__(self) -> int:
        return len(self._workers)

    @property
    def actors(self) -> list[Any]:
        """The actors that are at work."""
        return [worker.actor for worker in self._workers]

    def work(
        self,
        chunks: Sequence[Chunk],
        give: Callable[[Any, Chunk], Any],
        should_stop: ShouldStop | None = None,
    ) -> list[Any]:
        """Process all chunks, each on the next free worker.

        Args:
            chunks: the work to do.
            give: ``give(actor, chunk)`` calls a remote method of the actor and returns its reference.
            should_stop: called several times per second; if it returns true, :class:`RolloutInterrupted` is raised.

        Returns:
            The results of the calls, in the order of the chunks.

        Raises:
            WorkersLostError: no worker is left and none can be started, too many workers died of one chunk, or Ray failed.
            RolloutInterrupted: ``should_stop`` returned true.
            Exception: an exception of a worker's own code is re-raised.
        """
        results: dict[int, Any] = {}
        losses: Counter[int] = Counter()
        self._chunks, self._give, self._queue = chunks, give, deque(range(len(chunks)))
        try:
            self._feed(self._workers[: self.active])
            while len(results) < len(chunks):
                self._look_for_workers()
                try:
                    call = self._arrived.get(timeout=_LOOK_S)
                except Empty:
                    call = None
                if should_stop is not None and should_stop():
                    raise RolloutInterrupted
                if call in self._starting:
                    self._welcome(call)
                    self._feed(self._workers[: self.active])
                    continue
                if call is None or call not in self._calls:
                    continue  # that of a worker that was just lost, or of work that was given up
                worker, number, _ = self._calls.pop(call)
                try:
                    results[number] = call.result()
                    worker.at_hand.remove(number)
                    self._feed((worker,))
                except self._deaths as error:
                    losses.update([worker.at_hand[0]])
                    if losses[worker.at_hand[0]] >= _MOST_LOSSES:
                        raise WorkersLostError(
                            f"{_MOST_LOSSES} workers in a row died while processing the same chunk, the last with: "
                            f"{_reason(error)}; if they ran out of memory, reduce --slots or --workers"
                        ) from None
                    self._queue.extendleft(reversed(worker.at_hand))
                    for other in [key for key, (owner, *_) in self._calls.items() if owner is worker]:
                        del self._calls[other]
                    self._replace(worker)
                    self._feed(self._workers[: self.active])
                except self._ray.exceptions.RayTaskError as error:
                    raise self._why(error) from None
                except self._ray.exceptions.RayError as error:
                    raise WorkersLostError(f"Ray failed: {_reason(error)}") from None
        except BaseException:
            self._forget()
            raise
        return [results[number] for number in range(len(chunks))]

    def _feed(self, workers: Sequence[_Worker]) -> None:
        """Give chunks to workers that have less than they may; every one gets its first before any gets a second."""
        for depth in range(1, _QUEUED + 1):
            for worker in workers:
                if self._queue and len(worker.at_hand) < depth:
                    number = self._queue.popleft()
                    worker.at_hand.append(number)
                    reference = self._give(worker.actor, self._chunks[number])
                    self._calls[self._call(reference)] = worker, number, reference

    def _call(self, reference: Any) -> Any:
        """Return the future of a call; it is put into the queue of those that have arrived when it has.

        Ray's own ``wait`` looks at all references each time, which takes too long for hundreds of workers.
        """
        future = reference.future()
        future.add_done_callback(self._arrived.put)
        return future

    def close(self) -> None:
        """Stop all workers."""
        for worker in [*self._workers, *(starting for starting, _ in self._starting.values())]:
            self._end(worker)
        self._workers, self._starting = [], {}

    @property
    def _deaths(self) -> tuple[type[Exception], ...]:
        """Exceptions by which Ray reports that a worker, its memory or its node is gone."""
        errors = self._ray.exceptions
        return (errors.RayActorError, errors.OutOfMemoryError, errors.WorkerCrashedError, errors.NodeDiedError)

    def _replace(self, worker: _Worker) -> None:
        """Remove a dead worker and start another one, on any node with free resources."""
        self._workers.remove(worker)
        self._end(worker)
        self.replaced += 1
        new = _Worker(self._make())
        self._starting[self._call(new.actor.ready.remote())] = new, time.monotonic()

    def _welcome(self, call: Any) -> None:
        """Add a worker that has started, or drop one that failed to start."""
        worker, _ = self._starting.pop(call)
        try:
            call.result()
        except self._ray.exceptions.RayError as error:
            if not self._workers and not self._starting:
                raise WorkersLostError(f"no worker is left, and none can be started: {_reason(error)}") from None
        else:
            self._workers.append(worker)

    def _look_for_workers(self) -> None:
        """Raise :class:`WorkersLostError` if there is no worker and none has started within the time limit."""
        if self._workers:
            return
        first = min((since for _, since in self._starting.values()), default=None)
        if first is None or time.monotonic() - first > self._start_s:
            raise WorkersLostError(f"no worker is left, and none could be started within {self._start_s:.0f} s")

    def _forget(self) -> None:
        """Cancel pending calls."""
        for _, _, reference in self._calls.values():
            self._ray.cancel(reference)
        self._calls.clear()
        for worker in self._workers:
            worker.at_hand.clear()

    def _end(self, worker: _Worker) -> None:
        if self._ray.is_initialized():  # otherwise Ray has been shut down, and with it all workers
            self._ray.kill(worker.actor)

    def _why(self, error: Exception) -> Exception:
        """Return the exception that a worker's own code raised."""
        cause = getattr(error, "cause", None)
        if isinstance(cause, MemoryError):
            return UserError("a worker ran out of memory; reduce --slots or --workers")
        if isinstance(cause, Exception):
            return cause
        return UserError(f"a worker failed: {_reason(error)}")


def _reason(error: Exception) -> str:
    """Return one line of Ray's message: the first, or the last of a traceback."""
    text = _COLOURS.sub("", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1] if "error raised in its creation task" in text else lines[0]
