"""``scripts/checks/gpu.py``, rehearsed without a GPU."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from es_flipout.errors import UserError
from scripts import report
from scripts.checks import _gpu_steps, gpu
from scripts.checks._gpu_steps import ESSENTIAL, STAGES, Check, Row, Step
from scripts.checks._process import ROOT


def step_of(name: str, code: str, rows: Any = list, seconds: float = 20, **options: Any) -> Step:
    return Step(name, lambda: ["-c", code], seconds, rows, **options)


def test_a_failing_step_is_told_in_a_line(tmp_path: Path) -> None:
    done = gpu.carry_out(step_of("broken", "print('first'); raise SystemExit('it broke')"), tmp_path)
    assert done.problem == "exit code 1: it broke"
    assert gpu.carry_out(step_of("silent", "pass"), tmp_path).problem == "no result"
    skipped = gpu.carry_out(step_of("skipped", "pass", needs=("no_such_package",)), tmp_path)
    assert skipped.problem == "skipped: needs no_such_package"


@pytest.mark.parametrize("stop_is_fine", [False, True])
def test_a_step_that_takes_too_long_is_stopped_with_all_that_it_started(tmp_path: Path, stop_is_fine: bool) -> None:
    sleeper = "[sys.executable, '-c', 'import time; time.sleep(60)']"
    code = f"import subprocess, sys, time; print(subprocess.Popen({sleeper}).pid, flush=True); time.sleep(60)"
    started = time.monotonic()
    step = step_of("slow", code, lambda: [Row("a", "b", "c")], 2, stop_is_fine=stop_is_fine)
    assert gpu.carry_out(step, tmp_path).problem == (None if stop_is_fine else "not finished within 2 s")
    assert time.monotonic() - started < 30
    assert is_gone(int((tmp_path / "slow.log").read_text()))


def is_gone(process: int) -> bool:
    """Whether a process ends within a few seconds (or waits for a parent that never asks)."""
    for _ in range(100):
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.1)
    return False


POINTS = """
import json, pathlib, sys
file = pathlib.Path(sys.argv[1]); points = json.loads(file.read_text()) if file.exists() else []
points.append({"n": len(points)}); file.write_text(json.dumps(points)); sys.exit(len(points) < 3)
"""


def test_a_step_that_dies_goes_on_as_long_as_it_gets_further(tmp_path: Path) -> None:
    """A broken CUDA context ends the process, but not the points after the one that broke it."""
    file = tmp_path / "points.json"

    def rows() -> list[Row]:
        return [Row(str(p["n"]), "", "") for p in json.loads(file.read_text())] if file.exists() else []

    done = gpu.carry_out(Step("points", lambda: ["-c", POINTS, str(file)], 20, rows), tmp_path)
    assert (done.problem, len(rows())) == (None, 3)


def test_done_steps_stay_failed_ones_are_tried_again_and_stages_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs: list[str] = []

    def stage(name: str, problem: list[str | None]) -> Any:
        def steps(check: Check) -> list[Step]:
            file = check.out / f"{name}.json"

            def rows() -> list[Row]:
                return (
                    [Row(name, str(len(report.read_json(file)["results"]["points"])), "", True)]
                    if file.exists()
                    else []
                )

            return [step_of(name, "", rows, writes=(file,))]

        def carry_out(step: Step, out: Path) -> gpu.Done:
            runs.append(step.name)
            held = report.read_json(out / f"{step.name}.json")["results"]["points"] if step.writes[0].exists() else []
            points = [*held, {"n": len(runs)}, {"n": 0, "error": "it broke"}]
            report.write_json(step.writes[0], {"results": {"points": points}})
            return gpu.Done(step.name, 1.0, problem.pop(0))

        doers[name] = carry_out
        return steps

    doers: dict[str, Any] = {}
    stages = {"good": stage("good", [None, None]), "bad": stage("bad", ["not finished", None])}
    monkeypatch.setattr(gpu, "STAGES", stages)
    monkeypatch.setattr(gpu, "carry_out", lambda step, out: doers[step.name](step, out))
    monkeypatch.setattr(gpu, "record_machine", lambda check: report.write_json(tmp_path / "environment.json", MACHINE))

    def run(*options: str) -> str:
        runs.clear()
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path), "--rehearse", *options])
        gpu.main()
        return capsys.readouterr().out

    assert "| bad | not finished |" in run()
    assert runs == ["good", "bad"]
    shown = run()
    assert (runs, "not finished" in shown) == (["bad"], False)
    assert shown.rstrip().splitlines()[-4:] == ["| what | measured |", "|---|---|", "| good | 2 |", "| bad | 3 |"]
    assert "a card:" in shown
    run("--skip", "good")
    run("--only", "good")
    assert runs == []
    assert "| good | 2 |" in run("--repeat", "good", "--only", "bad")
    assert runs == ["good"]


MACHINE = {"hardware": {"gpu": "a card"}}


def test_measurements_of_two_machines_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(arguments: list[str], log: Path, seconds: float) -> tuple[int, bool]:
        report.write_json(tmp_path / ".environment" / "environment.json", {"hardware": dict(machine)})
        return 0, False

    machine = {"cpu": "one"}
    monkeypatch.setattr(gpu, "run", told)
    with pytest.raises(UserError, match="no CUDA GPU"):
        gpu.record_machine(Check(tmp_path, rehearse=False))
    gpu.record_machine(Check(tmp_path, rehearse=True))
    assert report.read_json(tmp_path / "environment.json")["hardware"]["gpu"] == gpu.REHEARSED
    machine["gpu"] = "a card"
    with pytest.raises(UserError, match="another machine"):
        gpu.record_machine(Check(tmp_path, rehearse=False))


def test_help_says_what_every_stage_costs() -> None:
    shown = gpu.parser().format_help()
    assert all(re.search(rf"{name} +at most +\d+ s  ", shown) for name in STAGES)
    minutes = {name: sum(step.seconds for step in stage(Check(Path(), False))) / 60 for name, stage in STAGES.items()}
    assert minutes["first"] <= 2.5


def test_the_essential_tests_exist() -> None:
    assert len(ESSENTIAL) == 10
    for test in ESSENTIAL:
        path, name = test.split("::")
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8")


def test_half_a_line_of_metrics_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("generation,wall_s\n1,2.5\n2,3")
    assert _gpu_steps._last_metrics(tmp_path) == {"generation": "1", "wall_s": "2.5"}
    (tmp_path / "metrics.csv").write_text("generation,wall_s\n")
    assert _gpu_steps._last_metrics(tmp_path) is None


@pytest.mark.slow
def test_a_rehearsal_that_is_killed_has_lost_no_figure_and_goes_on(tmp_path: Path) -> None:
    """All stages, on the CPU; killed several times at moments that differ from run to run."""
    check, moments = Check(tmp_path, rehearse=True), random.Random(os.urandom(8))
    command = [sys.executable, "scripts/checks/gpu.py", "--out", str(tmp_path), "--rehearse"]
    figures: dict[str, str] = {}

    def on_disk() -> dict[str, str]:
        steps = [step for stage in STAGES.values() for step in stage(check)]
        # Trainings go on, so their rows change.
        return {row.what: row.value for step in steps for row in step.rows() if "after" not in row.what}

    for kill in range(3):
        seconds = moments.uniform(5, 60)
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        found = on_disk()
        final = {what: value for what, value in figures.items() if "trains" not in what and "GPU tests" not in what}
        assert final.items() <= found.items(), f"lost by kill {kill} after {seconds:.1f} s"
        assert figures.keys() <= found.keys()
        figures = found
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    marks = [report.read_json(path) for path in (tmp_path / "steps").glob("*.json")]
    assert {mark["problem"] for mark in marks} == {None}
    assert len(marks) == sum(len(stage(check)) for stage in STAGES.values())
    assert (tmp_path / "table.md").read_text() in done.stdout
    kept = {what: value for what, value in figures.items() if "trains" not in what and "GPU tests" not in what}
    assert kept.items() <= on_disk().items()
    assert done.stdout.rstrip().splitlines()[-1].startswith("| score of Humanoid-v5")
