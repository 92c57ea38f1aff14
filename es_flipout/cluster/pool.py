"""A pool of Ray actors that work off chunks; a chunk whose worker died is given to another."""

from __future__ import annotations

import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from es_flipout.cluster.connect import Connection
from es_flipout.errors import UserError
from es_flipout.rollout import RolloutInterrupted

Chunk = TypeVar("Chunk")

_START_S = 120.0  # for a worker to import torch and to build its environments
_LOOK_S = 0.2  # how often the caller's should_stop is asked
_QUEUED = 2  # chunks that a worker has at hand, so that it does not wait for the next one
_MOST_LOSSES = 3  # workers that one chunk may cost
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class WorkersLostError(UserError):
    """No worker is left, or one chunk kills every worker it is given to."""


@dataclass
class _Member:
    """One worker: its actor, and the numbers of the chunks it has at hand."""

    actor: Any
    at_hand: deque[int] = field(default_factory=deque)


class Pool:
    """``count`` actors of one kind.

    Attributes:
        replaced: workers that died and were replaced so far.
        active: workers that are given chunks; None for all.
    """

    def __init__(self, connection: Connection, make: Callable[[], Any], count: int, start_s: float = _START_S) -> None:
        """Start the actors and wait for them.

        Args:
            connection: where.
            make: starts one actor; its method ``ready`` returns when it can work, with what :attr:`answers` keeps.
            count: how many.
            start_s: seconds that they may take.

        Raises:
            UserError: not all of them started; the message repeats why.
        """
        self._ray = connection.ray
        self._make = make
        self._start_s = start_s
        self.replaced = 0
        self.active: int | None = None
        self._members = [_Member(make()) for _ in range(count)]
        self._starting: dict[Any, tuple[_Member, float]] = {}
        waiting = [member.actor.ready.remote() for member in self._members]
        done, late = self._ray.wait(waiting, num_returns=count, timeout=start_s)
        if late:
            self.close()
            raise UserError(
                f"only {len(done)} of {count} workers started within {start_s:.0f} s: the cluster has {connection.cores} "
                "cores, and others may use them; ask for fewer with --workers"
            )
        try:
            self.answers: list[Any] = self._ray.get(waiting)
        except self._ray.exceptions.RayError as error:
            self.close()
            raise self._why(error) from None

    def __len__(self) -> int:
        return len(self._members)

    def work(
        self,
        chunks: Sequence[Chunk],
        give: Callable[[Any, Chunk], Any],
        should_stop: Callable[[], bool] | None = None,
    ) -> list[Any]:
        """All chunks, done by whoever is free.

        Args:
            chunks: what there is to do.
            give: ``give(actor, chunk)`` calls a remote method of the actor and returns its reference.
            should_stop: asked several times a second; true ends it with :class:`RolloutInterrupted`.

        Returns:
            What the calls returned, in the order of the chunks.

        Raises:
            WorkersLostError: no worker is left and none can be started, or a chunk costs too many of them.
            RolloutInterrupted: ``should_stop`` said so.
            Exception: what a worker's own code raised.
        """
        results: dict[int, Any] = {}
        queue = deque(range(len(chunks)))
        losses: Counter[int] = Counter()
        calls: dict[Any, tuple[_Member, int]] = {}
        try:
            while len(results) < len(chunks):
                for depth in range(1, _QUEUED + 1):  # nobody gets a second one before everybody has one
                    for member in self._members[: self.active]:
                        if queue and len(member.at_hand) < depth:
                            number = queue.popleft()
                            member.at_hand.append(number)
                            calls[give(member.actor, chunks[number])] = member, number
                self._look_for_workers()
                done, _ = self._ray.wait([*calls, *self._starting], num_returns=1, timeout=_LOOK_S)
                if should_stop is not None and should_stop():
                    raise RolloutInterrupted
                for reference in done:
                    if reference in self._starting:
                        self._welcome(reference)
                        continue
                    if reference not in calls:
                        continue  # of a worker that was lost a moment ago
                    member, number = calls.pop(reference)
                    try:
                        results[number] = self._ray.get(reference)
                        member.at_hand.remove(number)
                    except self._deaths as error:
                        losses.update([member.at_hand[0]])
                        if losses[member.at_hand[0]] >= _MOST_LOSSES:
                            raise WorkersLostError(
                                f"{_MOST_LOSSES} workers died one after the other of the same work, the last with: "
                                f"{_reason(error)}; if they ran out of memory, --slots or --workers with smaller "
                                "numbers need less"
                            ) from None
                        queue.extendleft(reversed(member.at_hand))
                        for other in [key for key, (owner, _) in calls.items() if owner is member]:
                            del calls[other]
                        self._replace(member)
                    except self._ray.exceptions.RayTaskError as error:
                        raise self._why(error) from None
        except BaseException:
            self._forget(calls)
            raise
        return [results[number] for number in range(len(chunks))]

    def close(self) -> None:
        """End all workers."""
        for member in [*self._members, *(starting for starting, _ in self._starting.values())]:
            self._end(member)
        self._members, self._starting = [], {}

    @property
    def _deaths(self) -> tuple[type[Exception], ...]:
        """How Ray says that a worker, its memory or its node is gone."""
        errors = self._ray.exceptions
        return (errors.RayActorError, errors.OutOfMemoryError, errors.WorkerCrashedError, errors.NodeDiedError)

    def _replace(self, member: _Member) -> None:
        """Take a dead worker out and start another, on whatever node has room."""
        self._members.remove(member)
        self._end(member)
        self.replaced += 1
        new = _Member(self._make())
        self._starting[new.actor.ready.remote()] = new, time.monotonic()

    def _welcome(self, reference: Any) -> None:
        """Take in a worker that has started, or has failed to."""
        member, _ = self._starting.pop(reference)
        try:
            self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            if not self._members and not self._starting:
                raise WorkersLostError(f"no worker is left, and none can be started: {_reason(error)}") from None
        else:
            self._members.append(member)

    def _look_for_workers(self) -> None:
        """Complain when nobody works and nobody has come for too long."""
        if self._members:
            return
        first = min((since for _, since in self._starting.values()), default=None)
        if first is None or time.monotonic() - first > self._start_s:
            raise WorkersLostError(f"no worker is left, and none could be started within {self._start_s:.0f} s")

    def _forget(self, references: Iterable[Any]) -> None:
        """Give up what is under way."""
        for reference in references:
            self._ray.cancel(reference)
        for member in self._members:
            member.at_hand.clear()

    def _end(self, member: _Member) -> None:
        if self._ray.is_initialized():  # else somebody has ended Ray, and all its workers
            self._ray.kill(member.actor)

    def _why(self, error: Exception) -> Exception:
        """What a worker's own code raised."""
        cause = getattr(error, "cause", None)
        if isinstance(cause, MemoryError):
            return UserError("a worker ran out of memory; --slots or --workers with smaller numbers need less")
        if isinstance(cause, Exception):
            return cause
        return UserError(f"a worker failed: {_reason(error)}")


def _reason(error: Exception) -> str:
    """One line of what Ray says: the first, or the last of a traceback."""
    text = _COLOURS.sub("", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1] if "error raised in its creation task" in text else lines[0]
