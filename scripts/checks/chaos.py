"""Runs that are killed, signalled and resumed at random times, until they end; each end is compared with an undisturbed run.

    .venv/bin/python scripts/checks/chaos.py --minutes 30 --seed 0      (or: make chaos MINUTES=30)

An event is one of: ``kill`` (SIGKILL, at any time from the start of the process on), ``storm`` (two to six of SIGINT,
SIGTERM and SIGHUP within milliseconds), ``rival`` (a second ``resume`` of the same run, which must be refused), or
``none``. A process that is not killed must end with exit code 0, or with 128 plus the signal and one line, never with
a traceback. Most processes are forks of this one, which saves the seconds of the imports; some are started as a user
does, and some see a clock that is set back again and again (``clock``, which comes with any event). A
share ``--ray`` of the runs trains on Ray: there, ``ray`` kills one of Ray's processes (a worker, the raylet, one of
its agents, the GCS, a monitor). If the run cannot go on, it must end with one ``error:`` line that names the command
to continue. ``--full-disks`` runs write to a small tmpfs that is full at different writes (not done where mounting is
forbidden). The weights, the state of the optimizer, the statistics, the policies and the metrics (without times) of a
finished run must be bitwise those of the undisturbed one, on this machine without Ray. Counts are printed, and
written to the file ``--output``.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import tyro

from es_flipout.errors import UserError
from es_flipout.runinfo import environment
from es_flipout.training.checkpoint import atomic_write, load_checkpoint, load_tensors
from es_flipout.training.lock import LOCK
from scripts.checks._forked import Forked

Process = subprocess.Popen[str] | Forked
ROOT = Path(__file__).parents[2]
TASKS = {
    "CartPole-v1": ("--optimizer", "adam"),
    "Hopper-v5": ("--optimizer", "clipup", "--threads", "1"),
}
GENERATIONS = 400  # a run takes seconds, so that most kills come while it trains
OPTIONS = (
    *("--generations", str(GENERATIONS), "--env-steps", "None", "--population-size", "8", "--hidden", "8"),
    *("--score-every", "7", "--score-episodes", "2", "--evaluation-episodes", "10", "--checkpoint-every", "3"),
    *("--sigma", "0.1", "--sigma-final", "0.05", "--learning-rate", "0.05", "--learning-rate-final", "0.01"),
    *("--env-kwargs", '{"max_episode_steps": 40}'),
)
# A generation on Ray is long enough for Ray to notice within the run that a process has died.
ON_RAY = ("--backend", "ray", "--workers", "2", "--population-size", "64")
RAY_SETTINGS = {
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5"
}  # by default, Ray ends the run after a minute without GCS
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LONGEST_S = 300.0  # a process that takes longer hangs, even on a busy machine
# Imported by Python at its start: the clock that can be set (not the monotonic one) goes back an hour every third of a second.
CLOCK = """
import time
began, now, now_ns = time.monotonic(), time.time, time.time_ns
back = lambda: 3600 * int(3 * (time.monotonic() - began))
time.time = lambda: now() - back()
time.time_ns = lambda: now_ns() - back() * 10**9
"""
PAGE = 4096  # bytes that a file of a tmpfs takes at least


@dataclass
class Counts:
    """What happened.

    Attributes:
        events: number of events by kind.
        phases: number of kills by what the process was doing.
        ray: number of killed processes of Ray by kind.
        full: number of runs on a full disk by the file that could not be written.
        runs: finished runs.
        problems: differences, tracebacks, hangs and wrong exit codes, each with the seed of its run.
    """

    events: Counter[str] = field(default_factory=Counter)
    phases: Counter[str] = field(default_factory=Counter)
    ray: Counter[str] = field(default_factory=Counter)
    full: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    problems: list[str] = field(default_factory=list)

    def line(self) -> str:
        """Return the counts in one line."""
        kinds = {"events": self.events, "kills in": self.phases, "of Ray": self.ray, "disk full at": self.full}
        found = [
            f"{kind}: {', '.join(f'{count} {name}' for name, count in sorted(counter.items()))}"
            for kind, counter in kinds.items()
            if counter
        ]
        return f"{self.runs} runs; {'; '.join(found)}; {len(self.problems)} problems"


def start(folder: Path, *arguments: str, clock: bool = False, fork: bool = False) -> Process:
    """Start the command line in a process.

    Args:
        folder: its working directory.
        arguments: the command.
        clock: set its clock back again and again.
        fork: fork this process, which has imported torch, instead of starting Python.
    """
    if fork:
        return Forked(folder, arguments, {"OMP_NUM_THREADS": "1"})
    path = [str(ROOT)]
    if clock:
        (folder / "clock").mkdir(exist_ok=True)
        (folder / "clock" / "sitecustomize.py").write_text(CLOCK, encoding="utf-8")
        path.insert(0, str(folder / "clock"))
    return subprocess.Popen(
        [sys.executable, "-m", "es_flipout", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", **RAY_SETTINGS},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def command(folder: Path, env_id: str, seed: int, *more: str) -> list[str]:
    """Return the command that begins (with ``more`` options) or continues the run ``run`` in a folder."""
    if (folder / "run" / "config.json").exists():
        return ["resume", "run"]
    return ["train", env_id, *OPTIONS, *TASKS[env_id], *more, "--seed", str(seed), "--run-dir", "run"]


def contents(run_dir: Path) -> dict[str, Any]:
    """Return what must be the same for two runs."""
    tensors, progress = load_checkpoint(run_dir / "checkpoints")
    with (run_dir / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = [
            {k: v for k, v in row.items() if k not in ("env_steps_per_s", "wall_s")} for row in csv.DictReader(file)
        ]
    policies = {
        f"{name} {key}": value
        for name in ("policy", "best")
        for key, value in load_tensors(run_dir / f"{name}.safetensors").items()
    }
    return {**tensors, **policies, "rows": rows, "generation": progress.generation, "env_steps": progress.env_steps}


def difference(run_dir: Path, whole: Path) -> str | None:
    """Return the first difference between two runs; None if they are the same to the bit."""
    found, wanted = contents(run_dir), contents(whole)
    if found.keys() != wanted.keys():
        return f"other names: {sorted(found.keys() ^ wanted.keys())}"
    for name, value in wanted.items():
        same = torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value
        if not same:
            return f"{name} differs"
    return None


def ray_processes(process: Process) -> dict[str, list[int]]:
    """Return the processes of Ray that a process has started, by what they are (Linux)."""
    parents: dict[int, int] = {}
    commands: dict[int, str] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            commands[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    found: dict[str, list[int]] = {}
    for pid, said in commands.items():
        ancestor = pid
        while ancestor in parents and ancestor != process.pid:
            ancestor = parents[ancestor]
        program = Path(said.split(" ")[0]).name
        if ancestor != process.pid or pid == process.pid or not said:
            continue
        if program.startswith("ray::"):
            kind = program if program.endswith("Agent") else "ray::worker"
        elif program in ("raylet", "gcs_server"):
            kind = program
        else:
            kind = next((name for name in ("log_monitor", "monitor", "dashboard") if f"/{name}.py" in said), "")
        if kind:
            found.setdefault(kind, []).append(pid)
    return found


def rows_of(metrics: Path) -> int:
    """Return the number of generations that a file of metrics has."""
    return metrics.read_text(encoding="utf-8").count("\n") - 1


def holds(process: Process, run_dir: Path) -> bool:
    """Whether a process has the lock of a run; the file of a killed one stays."""
    try:
        return json.loads((run_dir / LOCK).read_text(encoding="utf-8"))["pid"] == process.pid
    except (OSError, ValueError):
        return False


def phase(process: Process, run_dir: Path) -> str:
    """Return what a process is doing, as far as its files tell."""
    if not holds(process, run_dir):
        return "start-up"
    if not (run_dir / "metrics.csv").exists():
        return "first checkpoint"
    temporary = any(run_dir.rglob(".*.tmp"))
    rows = rows_of(run_dir / "metrics.csv")
    return "writing" if temporary else "scoring" if rows >= GENERATIONS else "training"


def handles_signals(process: Process) -> bool:
    """Whether Python has begun to run the command, and handles SIGHUP."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        caught = int(status.split("SigCgt:")[1].split()[0], 16)
        return bool(caught >> (signal.SIGHUP - 1) & 1)
    return False


def said_what_to_do(said: str) -> bool:
    """Whether a process said in one line that it failed, and how to continue."""
    return said.count("error: ") == 1 and ("continue with: " in said or "training had not begun" in said)


def disturb(process: Process, folder: Path, event: str, dice: random.Random, counts: Counts) -> list[str]:
    """Let an event happen to a process, wait for its end, and return what went wrong."""
    problems: list[str] = []
    kind = doing = ""
    if event != "none":
        begun = folder / "run" / "metrics.csv"
        if dice.random() < 0.7:  # after the start-up, which takes most of the time of these short runs
            while process.poll() is None and not (begun.exists() and holds(process, folder / "run")):
                time.sleep(0.01)
            if event == "ray":  # starting Ray takes so long that a run which is always killed soon would never end
                wanted = rows_of(begun) + dice.randint(0, 200)
                while process.poll() is None and rows_of(begun) < wanted:
                    time.sleep(0.05)
        time.sleep(dice.uniform(0, dice.choice((0.3, 1.0, 4.0))))
    if event == "kill":
        doing = phase(process, folder / "run")
        process.kill()
    elif event == "storm":
        while process.poll() is None and not handles_signals(process):
            time.sleep(0.01)
        for _ in range(dice.randint(2, 6)):
            process.send_signal(dice.choice(SIGNALS))
            time.sleep(dice.choice((0.0, 0.0, 0.003, 0.05)))
    elif event == "ray":
        found = ray_processes(process)
        kind = dice.choice(sorted(found)) if found else "not started yet"
        counts.ray[kind] += 1
        with contextlib.suppress(ProcessLookupError):
            os.kill(dice.choice(found[kind]), signal.SIGKILL) if found else process.kill()
    elif event == "rival":
        while process.poll() is None and not holds(process, folder / "run"):
            time.sleep(0.01)
        rival = start(folder, "resume", "run")
        _, said = rival.communicate(timeout=LONGEST_S)
        held = "is in use by" in said and rival.returncode == 2
        if not held and (rival.returncode != 0 or "Traceback" in said):  # 0: the first one had ended before
            problems.append(f"rival: exit code {rival.returncode}, {said}")
    try:
        _, said = process.communicate(timeout=LONGEST_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return [*problems, f"{event}: hangs"]
    if event == "kill":
        counts.phases[doing if process.returncode == -signal.SIGKILL else "nothing: it had ended"] += 1
    allowed = {"kill": {0, -9}, "ray": {0, 1, 2, -9}, "storm": {0, 130, *(128 + number for number in SIGNALS)}}
    if "Traceback" in said or process.returncode not in allowed.get(event, {0}):
        problems.append(f"{event} {kind}: exit code {process.returncode}, {said}")
    elif process.returncode > 0 and event == "ray" and not said_what_to_do(said):
        problems.append(f"{event} {kind}: exit code {process.returncode} without a word on how to continue, {said}")
    return problems


def one_run(folder: Path, seed: int, counts: Counts, on_ray: bool = False) -> None:
    """Begin a run, disturb it until it ends, and compare it with an undisturbed one without Ray."""
    dice = random.Random(seed)
    env_id = dice.choice(sorted(TASKS))
    more = ON_RAY if on_ray else ()
    whole = folder / "whole"
    whole.mkdir()
    alone = start(whole, *command(whole, env_id, seed, *more[4:]), fork=True)  # without the backend and its workers
    problems = disturb(alone, whole, "none", dice, counts)
    if problems:
        counts.problems += [f"seed {seed}, {env_id}, undisturbed: {problem}" for problem in problems]
        return
    ended = False
    while not ended:
        weights = (1, 1, 0, 0, 8) if on_ray else (8, 2, 1, 1, 0)
        event = dice.choices(("kill", "storm", "rival", "none", "ray"), weights)[0]
        clock = dice.random() < 0.1
        fork = not (clock or on_ray) and dice.random() < 0.8
        counts.events.update([event, "clock"] if clock else [event])
        process = start(folder, *command(folder, env_id, seed, *more), clock=clock, fork=fork)
        problems = disturb(process, folder, event, dice, counts)
        counts.problems += [f"seed {seed}, {env_id}: {problem}" for problem in problems]
        ended = process.returncode == 0 and (folder / "run" / "evaluation.json").exists()
    counts.runs += 1
    if (found := difference(folder / "run", whole / "run")) is not None:
        counts.problems.append(f"seed {seed}, {env_id}: {found}")


@contextlib.contextmanager
def small_disk(folder: Path, pages: int) -> Iterator[None]:
    """Mount a tmpfs at a folder. Raises OSError where that is forbidden."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={pages * PAGE}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode != 0:
        raise OSError(f"cannot mount a tmpfs: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def full_disk(folder: Path, seed: int, free_pages: int, counts: Counts) -> None:
    """Train on a disk with some free pages, make room when it is full, continue, and compare with an undisturbed run.

    Raises:
        OSError: mounting is forbidden.
    """
    env_id, small = "CartPole-v1", ("--generations", "24", "--keep-checkpoints", "8")
    disk, whole = folder / "disk", folder / "whole"
    whole.mkdir()
    problems = disturb(
        start(whole, *command(whole, env_id, seed, *small), fork=True), whole, "none", random.Random(seed), counts
    )
    with small_disk(disk, 1024):
        room = shutil.disk_usage(disk).free - free_pages * PAGE
        (disk / "filler").write_bytes(b"1" * room)
        process = start(disk, *command(disk, env_id, seed, *small), fork=True)
        _, said = process.communicate(timeout=LONGEST_S)
        named = re.search(r"No space left on device: '?([^';]*)", said)
        failed = process.returncode == 2 and said.count("error: ") == 1 and named is not None
        if "Traceback" in said or not (failed or process.returncode == 0):
            problems.append(f"exit code {process.returncode}, {said}")
        counts.full[re.sub(r"\d+", "N", Path(named[1]).name) if named else "none"] += 1
        (disk / "filler").unlink()
        if not (disk / "run" / "config.json").exists():
            shutil.rmtree(disk / "run", ignore_errors=True)
        problems += disturb(
            start(disk, *command(disk, env_id, seed, *small), fork=True), disk, "none", random.Random(seed), counts
        )
        try:
            found = difference(disk / "run", whole / "run")
        except (OSError, UserError) as error:
            found = str(error)
    if found is not None:
        problems.append(found)
    counts.problems += [f"seed {seed}, {free_pages} free pages: {problem}" for problem in problems]


@dataclass(frozen=True)
class Chaos:
    """Disturb runs, and compare their ends with undisturbed ones."""

    minutes: float = 30.0
    """No run is begun after this time."""
    seed: int = 0
    """Seed of the first run; the next one has the next seed."""
    ray: float = 0.0
    """Share of the runs that train on Ray; they take longer."""
    full_disks: int = 0
    """Number of runs on a full disk, each with more room than the one before."""
    output: Path | None = None
    """File for the counts, such as results/reliability_HARDWARE_MONTH/chaos.json; None to print only."""


def main() -> int:
    """Disturb runs for some minutes; the exit code is 1 if anything went wrong."""
    options = tyro.cli(Chaos, description=__doc__)
    counts, began, seed = Counts(), time.monotonic(), options.seed
    dice, not_done = random.Random(options.seed), []
    for pages in range(options.full_disks):
        with tempfile.TemporaryDirectory(prefix="chaos_") as name:
            try:
                full_disk(Path(name), options.seed, pages, counts)
            except OSError as error:
                not_done = [str(error)]
                break
        report(options, counts, seed, not_done)
    while time.monotonic() - began < 60 * options.minutes:
        folder = Path(tempfile.mkdtemp(prefix="chaos_"))
        try:
            one_run(folder, seed, counts, on_ray=dice.random() < options.ray)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        report(options, counts, seed, not_done)
        seed += 1
    return min(len(counts.problems), 1)


def report(options: Chaos, counts: Counts, seed: int, not_done: list[str]) -> None:
    """Print the counts so far, and write them to the output, if there is one."""
    print(counts.line(), *counts.problems[-3:], sep="\n  ", flush=True)
    if options.output is None:
        return
    options.output.parent.mkdir(parents=True, exist_ok=True)
    found = {
        "command": f"scripts/checks/chaos.py {' '.join(sys.argv[1:])}",
        "seeds": [options.seed, seed],
        "runs": counts.runs,
        "events": dict(counts.events),
        "kills_in": dict(counts.phases),
        "kills_of_ray": dict(counts.ray),
        "disk_full_at": dict(counts.full),
        "not_done": not_done,
        "problems": counts.problems,
        "environment": environment(),
    }
    atomic_write(options.output, json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
