"""All workers of a node behind one Ray actor, so that messages grow with the number of nodes, not of cores."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import repeat
from typing import Any

from es_flipout.cluster.worker import Arrays, Outcome, ShardWorker, packed, unpacked
from es_flipout.config import TrainConfig

_worker: ShardWorker | Exception  # of a process of a crew


class Crew:
    """Splits every shard into shards for its workers, which are processes on the same machine.

    It has the methods of :class:`ShardWorker` that the training process calls, and can play two shards at a time, so that
    its workers need not wait for each other at the end of the first.
    """

    def __init__(self, config: TrainConfig, size: int, threads: int, workers: int) -> None:
        """Start the processes.

        Args:
            config: configuration of the run.
            size: members per shard of a worker.
            threads: number of physics threads of a worker.
            workers: number of processes.
        """
        self._size, self._workers = size, workers
        spawn = multiprocessing.get_context("spawn")  # Ray's threads do not survive a fork
        self._processes = ProcessPoolExecutor(workers, spawn, _start, (config, size, threads))

    def ready(self) -> dict[str, str]:
        """Return the workers' package versions when all of them have started."""
        return self._results(ShardWorker.ready, [()] * self._workers)[0]

    def play_packed(self, message: bytes, weights: Arrays) -> bytes:
        """See :meth:`ShardWorker.play_packed`."""
        generation, shard = unpacked(message)
        parts = [(generation, part, weights) for part in shard.split(self._size)]
        return packed(Outcome.join(self._results(ShardWorker.play, parts)))

    def sum_packed(self, message: bytes) -> bytes:
        """See :meth:`ShardWorker.sum_packed`."""
        return self._results(ShardWorker.sum_packed, [(message,)])[0]

    def _results(self, method: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a method of the workers with every tuple of arguments, and return the results in order.

        If a process has died, this one ends too, so that another crew does its work.
        """
        try:
            return list(self._processes.map(_call, repeat(method), calls))
        except BrokenProcessPool:
            os._exit(1)


def _start(config: TrainConfig, size: int, threads: int) -> None:
    """Start a worker in this process, which ends with its parent."""
    global _worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _worker = ShardWorker(config, size, threads)
    except Exception as error:  # raised by the first call: the pool itself would not pass it on
        _worker = error


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(method: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Call a method of the worker in this process."""
    if isinstance(_worker, Exception):
        raise _worker
    return method(_worker, *arguments)
