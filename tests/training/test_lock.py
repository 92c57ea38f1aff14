"""One process at a time writes to a run directory; locks of dead processes do not count."""

import multiprocessing
import os
import signal
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from es_flipout.errors import UserError
from es_flipout.training.lock import LOCK, locked


def hold(run_dir: Path, held: Event) -> None:
    with locked(run_dir):
        held.set()
        signal.pause()


def test_the_second_one_is_told_who_holds_it(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    held = spawn.Event()
    first = spawn.Process(target=hold, args=(tmp_path, held))
    first.start()
    try:
        assert held.wait(60)
        with (
            pytest.raises(UserError, match=rf"{tmp_path} is in use by process {first.pid} on .* since 2"),
            locked(tmp_path),
        ):
            pass
        assert (tmp_path / LOCK).exists()
        assert first.pid is not None
        os.kill(first.pid, signal.SIGKILL)
        first.join()
        assert (tmp_path / LOCK).exists(), "a stale lock"
        with locked(tmp_path):
            assert str(os.getpid()) in (tmp_path / LOCK).read_text(encoding="utf-8")
        assert not list(tmp_path.iterdir())
    finally:
        first.kill()
        first.join()


def test_a_file_of_something_else_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("not JSON", encoding="utf-8")
    with locked(tmp_path), pytest.raises(UserError, match="in use by process"), locked(tmp_path):
        pass
