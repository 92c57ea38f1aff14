"""The lock of a run directory, so that two processes never write to one run."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from es_flipout.errors import UserError

LOCK = ".lock"


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the lock of a run directory. The system releases it when the process ends, however it ends.

    Args:
        run_dir: an existing directory.

    Raises:
        UserError: another process holds the lock; the message says which.
    """
    if fcntl is None:
        yield
        return
    path = run_dir / LOCK
    file = _open(path)
    try:
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now().isoformat(" ", "seconds")}
        os.ftruncate(file, 0)
        with contextlib.suppress(OSError):  # on a full disk, the lock is held without a word on who holds it
            os.pwrite(file, json.dumps(holder).encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def is_locked(run_dir: Path) -> bool:
    """Return whether a process holds the lock of a run directory; always False where the system has no locks."""
    try:
        file = os.open(run_dir / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    finally:
        os.close(file)
    return False


def _open(path: Path) -> int:
    """Open and lock the file, and return its descriptor."""
    assert fcntl is not None
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _described(os.pread(file, 1000, 0))
            os.close(file)
            raise UserError(
                f"run directory {path.parent} is in use by {holder}: wait for it, or stop it and resume"
            ) from None
        except OSError:  # a file system without locks
            return file
        try:
            if os.path.samestat(os.fstat(file), path.stat()):
                return file
        except FileNotFoundError:
            pass
        os.close(file)  # the holder removed the file between the two calls


def _described(text: bytes) -> str:
    try:
        holder = json.loads(text)
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
