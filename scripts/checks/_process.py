"""Run Python in a process of its own for a limited time."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_PR_SET_PDEATHSIG = 1


def run(arguments: list[str], log: Path, seconds: float) -> tuple[int, bool]:
    """Run ``python ARGUMENTS`` in the repository; returns the exit code, and whether the time was over.

    When it is over, the process is asked to stop and later killed. What it has started is killed in any case.
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "COLUMNS": "160"}
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=env,
            stdout=file,
            stderr=file,
            start_new_session=True,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        try:
            return process.wait(seconds), False
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            try:
                return process.wait(20), True
            except subprocess.TimeoutExpired:
                _kill(process.pid)
                return process.wait(), True
        finally:
            _kill(process.pid)


def _end_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies, which may be killed, too."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _kill(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def call(function: Callable[..., object], *arguments: Any) -> list[str]:
    """The interpreter's arguments that call a function of a module of this repository."""
    return ["-c", f"from {function.__module__} import {function.__name__} as f; f(*{arguments!r})"]


def last_line(log: Path) -> str:
    """The last line of a log that is not blank."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:160] if lines else "it printed nothing"
