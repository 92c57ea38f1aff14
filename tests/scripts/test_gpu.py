"""``scripts/checks/gpu.py``, rehearsed without a GPU."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from scripts.checks import gpu
from scripts.checks._gpu_steps import Row, Step


def test_a_failing_step_is_told_in_a_line_and_stops_nothing(tmp_path: Path) -> None:
    def no_rows() -> list[Row]:
        return json.loads((tmp_path / "nothing.json").read_text())

    done = gpu.carry_out("broken", Step(["-c", "print('first'); raise SystemExit('it broke')"], 20, no_rows), tmp_path)
    assert done.problem == "exit code 1: it broke"
    assert gpu.table([done]).splitlines()[2] == "| broken | exit code 1: it broke |  |"
    silent = gpu.carry_out("silent", Step(["-c", "pass"], 20, no_rows), tmp_path)
    assert silent.problem is not None
    assert "no result (FileNotFoundError" in silent.problem
    skipped = gpu.carry_out("skipped", Step(["-c", "pass"], 20, no_rows, needs=("no_such_package",)), tmp_path)
    assert skipped.problem == "skipped: needs no_such_package"


@pytest.mark.parametrize("stop_is_fine", [False, True])
def test_a_step_that_takes_too_long_is_stopped_with_all_that_it_started(tmp_path: Path, stop_is_fine: bool) -> None:
    sleeper = "[sys.executable, '-c', 'import time; time.sleep(60)']"
    code = f"import subprocess, sys, time; print(subprocess.Popen({sleeper}).pid, flush=True); time.sleep(60)"
    started = time.monotonic()
    done = gpu.carry_out("slow", Step(["-c", code], 2, lambda: [("a", "b", "c")], stop_is_fine), tmp_path)
    assert time.monotonic() - started < 30
    assert done.problem == (None if stop_is_fine else "not finished within 2 s")
    assert done.rows == [("a", "b", "c")]
    child = int((tmp_path / "slow.log").read_text())
    assert is_gone(Path(f"/proc/{child}/stat"))


def is_gone(stat: Path) -> bool:
    """Whether a process ends within a few seconds (or waits for a parent that never asks)."""
    for _ in range(100):
        try:
            if stat.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
def test_rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    steps = ["memory", "forward", "rollout", "train"]
    arguments = ["--out", str(tmp_path), "--device", "cpu", "--quick", "--steps", *steps]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    gpu.main()
    shown = capsys.readouterr().out
    done = json.loads((tmp_path / "steps.json").read_text())
    assert [(step["name"], step["problem"]) for step in done] == [(name, None) for name in steps]
    assert all(step["rows"] for step in done)
    assert (tmp_path / "table.md").read_text() in shown
    assert json.loads((tmp_path / "environment.json").read_text())["versions"]["torch"]
    assert "flipout ÷ plain, 32-32, P = 256" in shown
    assert "training ÷ bare physics, HalfCheetah-v5" in shown
    assert "Humanoid-v5 after" in shown
