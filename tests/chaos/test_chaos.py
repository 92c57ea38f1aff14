"""Killed, signalled and contested runs end like undisturbed ones; ``make chaos`` does this for as long as one likes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.checks import chaos


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_disturbed_run(tmp_path: Path, seed: int) -> None:
    counts = chaos.Counts()
    chaos.one_run(tmp_path, seed, counts)
    assert counts.runs == 1
    assert not counts.problems
    assert sum(counts.events.values()) > 0


def test_a_difference_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chaos.TASKS, "CartPole-v1", ("--generations", "3", "--seed", "1"))
    for name, more in {"one": (), "same": (), "other": ("--learning-rate", "0.06")}.items():
        folder = tmp_path / name
        folder.mkdir()
        process = chaos.start(folder, *chaos.command(folder, "CartPole-v1", 1), *more)
        process.communicate(timeout=100)
        assert process.returncode == 0
    assert chaos.difference(tmp_path / "same" / "run", tmp_path / "one" / "run") is None
    assert chaos.difference(tmp_path / "other" / "run", tmp_path / "one" / "run") is not None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["raylet", "gcs_server", "ray::DashboardAgent", "ray::RuntimeEnvAgent"])
def test_a_run_whose_ray_dies(tmp_path: Path, kind: str) -> None:
    """Ray's threads end the process then, and Python with it: another process says so."""
    constant = ("--sigma-final", "None", "--learning-rate-final", "None")  # the length of the run does not matter then
    more = (*chaos.ON_RAY, *constant, "--generations", "5000")
    process = chaos.start(tmp_path, *chaos.command(tmp_path, "CartPole-v1", 1, *more))
    metrics = tmp_path / "run" / "metrics.csv"
    while not (metrics.exists() and chaos.rows_of(metrics) >= 7):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    for pid in chaos.ray_processes(process)[kind]:
        os.kill(pid, signal.SIGKILL)
    _, said = process.communicate(timeout=chaos.LONGEST_S)
    assert process.returncode in (1, 2), said
    assert said.count("error: ") == 1, said
    assert said.splitlines()[-1].endswith("continue with: es-flipout resume run")
    generations = str(chaos.rows_of(metrics) + 3)
    whole = tmp_path / "whole"
    whole.mkdir()
    alone = ("--population-size", "64", *constant, "--generations", generations)
    for folder, command in (
        (tmp_path, ["resume", "run", "--generations", generations, "--backend", "local"]),
        (whole, chaos.command(whole, "CartPole-v1", 1, *alone)),
    ):
        again = chaos.start(folder, *command)
        assert (again.communicate(timeout=chaos.LONGEST_S), again.returncode)[1] == 0
    assert chaos.difference(tmp_path / "run", whole / "run") is None


@pytest.mark.slow
@pytest.mark.parametrize("free_pages", [0, 3, 12])
def test_a_full_disk(tmp_path: Path, free_pages: int) -> None:
    counts = chaos.Counts()
    try:
        chaos.full_disk(tmp_path, 0, free_pages, counts)
    except OSError as refused:
        pytest.skip(f"a small disk cannot be made: {refused}")
    assert not counts.problems
    assert not counts.full["none"]


def test_a_clock_that_is_set_back(tmp_path: Path) -> None:
    chaos.start(tmp_path, "--version", clock=True).communicate(timeout=100)
    program = "import time; t = time.time(); time.sleep(0.4); print(time.time() - t)"
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "clock")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert -7300 < float(run.stdout) < -3500


def test_a_fork_ends_as_a_process_does(tmp_path: Path) -> None:
    train = ("train", "CartPole-v1", *chaos.OPTIONS, "--generations", "3", "--run-dir", "run")
    ends = []
    for fork in (True, False):
        folder = tmp_path / str(fork)
        folder.mkdir()
        trained, refused = (chaos.start(folder, *said, fork=fork) for said in (train, ("no-command",)))
        _, error = refused.communicate(timeout=100)
        out, _ = trained.communicate(timeout=100)
        ends.append((trained.returncode, refused.returncode, error, "run directory" in out))
    assert ends[0] == ends[1]
    assert ends[0][:2] == (0, 2)
    assert chaos.difference(tmp_path / "True" / "run", tmp_path / "False" / "run") is None


def test_a_fork_can_be_killed(tmp_path: Path) -> None:
    process = chaos.start(tmp_path, *chaos.command(tmp_path, "CartPole-v1", 0), fork=True)
    assert process.poll() is None
    process.kill()
    process.communicate(timeout=100)
    assert process.returncode == -signal.SIGKILL
