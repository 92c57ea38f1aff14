"""Commands of ``es-flipout`` in forks of a process that has imported what they need, which saves the seconds of the imports."""

from __future__ import annotations

import atexit
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

import torch


class Forked:
    """A command in a fork of this process, with the part of the interface of ``subprocess.Popen`` that chaos.py uses.

    Attributes:
        pid: the process.
        returncode: its exit code, or minus the signal that killed it; None as long as nobody has seen its end.
    """

    def __init__(self, folder: Path, arguments: tuple[str, ...], variables: Mapping[str, str]) -> None:
        _import_commands()
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 (closed with the object)
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.dup2(self._out.fileno(), 1)
            os.dup2(self._err.fileno(), 2)
            sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8") for number in (1, 2))  # noqa: SIM115
            os.chdir(folder)
            os.environ.update(variables)
            _run(arguments)

    def poll(self) -> int | None:
        """Return the exit code if the process has ended."""
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal if the process runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End the process at once."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end, and return what the process wrote. Raises subprocess.TimeoutExpired."""
        until = time.monotonic() + (float("inf") if timeout is None else timeout)
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            time.sleep(0.005)
        said = []
        for file in (self._out, self._err):
            file.seek(0)
            said.append(file.read().decode())
            file.close()
        return said[0], said[1]


def _import_commands() -> None:
    """Import what training imports; a fork has it then."""
    for name in ("es_flipout.cli.train", "es_flipout.cli.resume", "torch.utils.tensorboard", "torch._dynamo"):
        importlib.import_module(name)
    torch.set_num_threads(1)  # the threads of OpenMP do not survive a fork


def _run(arguments: tuple[str, ...]) -> None:
    """Run a command, and end the process as the interpreter would."""
    from es_flipout.cli import main

    code = 1
    atexit._clear()  # what the parent registered, such as to delete its temporary folders, is not for a fork
    try:
        sys.argv = ["es-flipout", *arguments]
        code = main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
