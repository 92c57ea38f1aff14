"""Runs that are killed, signalled and resumed at random times, until they end; each end is compared with an undisturbed run.

    .venv/bin/python scripts/checks/chaos.py --minutes 30 --seed 0      (or: make chaos MINUTES=30)

An event is one of: ``kill`` (SIGKILL, at any time from the start of the process on), ``storm`` (two to six of SIGINT, SIGTERM and
SIGHUP within milliseconds), ``rival`` (a second ``resume`` of the same run, which must be refused), or ``none``. A process that
is not killed must end with exit code 0, or with 128 plus the signal and one line, never with a traceback. The weights, the
state of the optimizer, the statistics, the policies and the metrics (without times) of a finished run must be bitwise those of
the undisturbed one. Counts are printed, and written to the file ``--output``.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import tyro

from es_flipout.runinfo import environment
from es_flipout.training.checkpoint import load_checkpoint, load_tensors
from es_flipout.training.lock import LOCK

ROOT = Path(__file__).parents[2]
TASKS = {
    "CartPole-v1": ("--optimizer", "adam"),
    "Hopper-v5": ("--optimizer", "clipup", "--threads", "1"),
}
GENERATIONS = 40
OPTIONS = [
    *(
        "--generations",
        str(GENERATIONS),
        "--env-steps",
        "None",
        "--population-size",
        "8",
        "--hidden",
        "8",
        "--score-every",
        "7",
    ),
    *(
        "--score-episodes",
        "2",
        "--evaluation-episodes",
        "10",
        "--checkpoint-every",
        "3",
        "--env-kwargs",
        '{"max_episode_steps": 40}',
    ),
    *("--sigma", "0.1", "--sigma-final", "0.05", "--learning-rate", "0.05", "--learning-rate-final", "0.01"),
]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LONGEST_S = 300.0  # a process that takes longer hangs, even on a busy machine


@dataclass
class Counts:
    """What happened.

    Attributes:
        events: number of events by kind.
        phases: number of kills by what the process was doing.
        runs: finished runs.
        problems: differences, tracebacks, hangs and wrong exit codes, each with the seed of its run.
    """

    events: Counter[str] = field(default_factory=Counter)
    phases: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    problems: list[str] = field(default_factory=list)

    def line(self) -> str:
        """Return the counts in one line."""
        events = ", ".join(f"{count} {name}" for name, count in sorted(self.events.items()))
        phases = ", ".join(f"{count} in {name}" for name, count in sorted(self.phases.items()))
        return f"{self.runs} runs, events: {events}; kills: {phases}; {len(self.problems)} problems"


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start the command line in a process."""
    return subprocess.Popen(
        [sys.executable, "-m", "es_flipout", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def command(folder: Path, env_id: str, seed: int) -> list[str]:
    """Return the command that begins or continues the run ``run`` in a folder."""
    if (folder / "run" / "config.json").exists():
        return ["resume", "run"]
    return ["train", env_id, *OPTIONS, *TASKS[env_id], "--seed", str(seed), "--run-dir", "run"]


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


def phase(run_dir: Path) -> str:
    """Return what a process is doing, as far as its files tell."""
    if not (run_dir / LOCK).exists():
        return "start-up"
    if not (run_dir / "metrics.csv").exists():
        return "first checkpoint"
    temporary = any(run_dir.rglob(".*.tmp"))
    rows = (run_dir / "metrics.csv").read_text(encoding="utf-8").count("\n") - 1
    return "writing" if temporary else "scoring" if rows >= GENERATIONS else "training"


def handles_signals(process: subprocess.Popen[str]) -> bool:
    """Whether Python has begun to run the command, and handles SIGHUP."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        caught = int(status.split("SigCgt:")[1].split()[0], 16)
        return bool(caught >> (signal.SIGHUP - 1) & 1)
    return False


def disturb(process: subprocess.Popen[str], folder: Path, event: str, dice: random.Random, counts: Counts) -> list[str]:
    """Let an event happen to a process, wait for its end, and return what went wrong."""
    problems: list[str] = []
    if event != "none":
        begun = folder / "run" / "metrics.csv"
        if dice.random() < 0.7:  # after the start-up, which takes most of the time of these short runs
            while process.poll() is None and not (begun.exists() and (folder / "run" / LOCK).exists()):
                time.sleep(0.01)
        time.sleep(dice.uniform(0, dice.choice((0.3, 1.0, 4.0))))
    if event == "kill":
        counts.phases[phase(folder / "run")] += 1
        process.kill()
    elif event == "storm":
        while process.poll() is None and not handles_signals(process):
            time.sleep(0.01)
        for _ in range(dice.randint(2, 6)):
            process.send_signal(dice.choice(SIGNALS))
            time.sleep(dice.choice((0.0, 0.0, 0.003, 0.05)))
    elif event == "rival":
        while process.poll() is None and not (folder / "run" / LOCK).exists():
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
    allowed = {"kill": {0, -9}, "storm": {0, 130, *(128 + number for number in SIGNALS)}}.get(event, {0})
    if "Traceback" in said or process.returncode not in allowed:
        problems.append(f"{event}: exit code {process.returncode}, {said}")
    return problems


def one_run(folder: Path, seed: int, counts: Counts) -> None:
    """Begin a run, disturb it until it ends, and compare it with an undisturbed one."""
    dice = random.Random(seed)
    env_id = dice.choice(sorted(TASKS))
    whole = folder / "whole"
    whole.mkdir()
    problems = disturb(start(whole, *command(whole, env_id, seed)), whole, "none", dice, counts)
    if problems:
        counts.problems += [f"seed {seed}, {env_id}, undisturbed: {problem}" for problem in problems]
        return
    ended = False
    while not ended:
        event = dice.choices(("kill", "storm", "rival", "none"), (6, 3, 1, 2))[0]
        counts.events[event] += 1
        process = start(folder, *command(folder, env_id, seed))
        problems = disturb(process, folder, event, dice, counts)
        counts.problems += [f"seed {seed}, {env_id}: {problem}" for problem in problems]
        ended = process.returncode == 0 and (folder / "run" / "evaluation.json").exists()
    counts.runs += 1
    if (found := difference(folder / "run", whole / "run")) is not None:
        counts.problems.append(f"seed {seed}, {env_id}: {found}")


@dataclass(frozen=True)
class Chaos:
    """Disturb runs, and compare their ends with undisturbed ones."""

    minutes: float = 30.0
    """No run is begun after this time."""
    seed: int = 0
    """Seed of the first run; the next one has the next seed."""
    output: Path | None = None
    """File for the counts, such as results/reliability_HARDWARE_MONTH/chaos.json; None to print only."""


def main() -> int:
    """Disturb runs for some minutes; the exit code is 1 if anything went wrong."""
    options = tyro.cli(Chaos, description=__doc__)
    counts, began, seed = Counts(), time.monotonic(), options.seed
    while time.monotonic() - began < 60 * options.minutes:
        folder = Path(tempfile.mkdtemp(prefix="chaos_"))
        try:
            one_run(folder, seed, counts)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        seed += 1
        print(counts.line(), flush=True)
        for problem in counts.problems[-3:]:
            print(f"  {problem}", flush=True)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        report = {
            "command": f"scripts/checks/chaos.py --minutes {options.minutes:g} --seed {options.seed}",
            "seeds": [options.seed, seed - 1],
            "runs": counts.runs,
            "events": dict(counts.events),
            "kills_in": dict(counts.phases),
            "problems": counts.problems,
            "environment": environment(),
        }
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return min(len(counts.problems), 1)


if __name__ == "__main__":
    sys.exit(main())
