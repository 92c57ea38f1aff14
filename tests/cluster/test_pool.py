"""The pool: a chunk is processed again if its worker dies, and only then."""

import math
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from es_flipout.cluster.connect import Connection
from es_flipout.cluster.pool import Pool, WorkersLostError
from es_flipout.errors import UserError
from es_flipout.rollout.episodes import RolloutInterrupted


def worker_class() -> type:
    """Return a class that is defined in a function, because workers cannot import this file."""

    class Worker:
        """Squares numbers; a number in ``deadly`` kills it the first time, after which a file with its name exists.

        Before that it waits until the pool has all its results: a result that is still on its way is lost with the process,
        and its chunk is rightly processed again. On a busy machine that happens.
        """

        def __init__(self, folder: Path, deadly: tuple[int, ...] = (), broken: bool = False) -> None:
            if broken or (folder / "broken").exists():
                raise ValueError("cannot be built")
            self.folder, self.deadly = folder, deadly
            self.finished: list[int] = []

        def ready(self) -> int:
            return os.getpid()

        def square(self, number: int) -> int:
            (self.folder / f"{number}.{time.monotonic_ns()}").touch()
            if number in self.deadly:
                mark = self.folder / f"died_{number}"
                if not mark.exists():
                    mark.touch()
                    while not all((self.folder / f"has_{each}").exists() for each in self.finished):
                        time.sleep(0.01)
                    os.kill(os.getpid(), signal.SIGKILL)
            if number == -1:
                raise MemoryError
            if number == -2:
                raise KeyError("of the user's own")
            if number == -3:
                os.kill(os.getpid(), signal.SIGKILL)
            if number == -4:
                time.sleep(60)
            self.finished.append(number)
            return number * number

    return Worker


MakePool = Callable[..., Pool]


@pytest.fixture
def make_pool(connection: Connection, tmp_path: Path, request: pytest.FixtureRequest) -> MakePool:
    def make(*arguments: Any, count: int = 2, start_s: float = 120.0) -> Pool:
        actor = connection.ray.remote(num_cpus=1)(worker_class())
        pool = Pool(connection, lambda: actor.remote(tmp_path, *arguments), count, start_s)
        note(pool, tmp_path)
        request.addfinalizer(pool.close)
        return pool

    return make


def note(pool: Pool, folder: Path) -> None:
    """Make a file for every result that arrives."""

    def put(call: Any) -> None:
        if call.exception() is None and isinstance(call.result(), int):
            (folder / f"has_{math.isqrt(call.result())}").touch()
        arrived.put(call)

    arrived = pool._arrived
    pool._arrived = SimpleNamespace(put=put, get=arrived.get)  # pyright: ignore[reportAttributeAccessIssue]


def square(actor: Any, number: int) -> Any:
    return actor.square.remote(number)


def test_results_are_in_the_order_of_the_chunks(make_pool: MakePool) -> None:
    pool = make_pool()
    assert len(set(pool.answers)) == 2
    assert pool.work(range(9), square) == [n * n for n in range(9)]
    assert pool.work([], square) == []
    assert pool.replaced == 0


def test_the_chunks_of_a_dead_worker_are_done_elsewhere(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool((2, 5))
    assert pool.work(range(8), square) == [n * n for n in range(8)]
    assert pool.replaced == 2
    # Finished chunks were not processed again.
    times = [sum(path.name.split(".")[0] == str(n) for path in tmp_path.iterdir()) for n in range(8)]
    assert times[2] == times[5] == 2
    assert max(times) == 2
    assert pool.work(range(8), square) == [n * n for n in range(8)]
    assert len(pool) + len(pool._starting) == 2


def test_a_chunk_that_kills_every_worker(make_pool: MakePool) -> None:
    pool = make_pool()
    with pytest.raises(WorkersLostError, match=r"3 workers in a row died while processing the same chunk.*memory"):
        pool.work([1, -3, 2], square)


def test_no_worker_left(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool((1,), count=1)
    (tmp_path / "broken").touch()  # no other worker can start
    with pytest.raises(WorkersLostError, match=r"no worker is left, and none can be started: .*"):
        pool.work([0, 1, 2], square)


def test_no_worker_left_and_no_room_for_another(make_pool: MakePool, connection: Connection) -> None:
    actor = connection.ray.remote(num_cpus=1000)(worker_class())
    pool = make_pool((1,), count=1, start_s=30.0)
    pool._make = lambda: actor.remote(Path())
    pool._start_s = 1.0
    with pytest.raises(WorkersLostError, match="none could be started within 1 s"):
        pool.work([0, 1, 2], square)


def test_what_the_work_raises(make_pool: MakePool) -> None:
    pool = make_pool(count=1)
    with pytest.raises(UserError, match="out of memory"):
        pool.work([1, -1], square)
    with pytest.raises(KeyError, match="of the user's own"):
        pool.work([1, -2], square)
    assert pool.work([3], square) == [9]


def test_what_ray_raises(make_pool: MakePool, connection: Connection) -> None:
    pool, failed = make_pool(count=1), Future[int]()
    failed.set_exception(connection.ray.exceptions.ObjectLostError("00" * 28, None, ""))
    with pytest.raises(WorkersLostError, match="Ray failed: Failed to retrieve object"):
        pool.work([1], lambda actor, number: SimpleNamespace(future=lambda: failed))


def test_interruption(make_pool: MakePool) -> None:
    with pytest.raises(RolloutInterrupted):
        make_pool(count=1).work([-4], square, should_stop=lambda: True)


def test_workers_that_cannot_be_built(make_pool: MakePool) -> None:
    with pytest.raises(UserError, match="cannot be built"):
        make_pool((), True, count=1)


def test_more_workers_than_there_is_room_for(connection: Connection) -> None:
    actor = connection.ray.remote(num_cpus=3)(worker_class())
    with pytest.raises(UserError, match=r"only 1 of 2 workers started within 5 s.*4 cores"):
        Pool(connection, lambda: actor.remote(Path()), 2, start_s=5.0)
