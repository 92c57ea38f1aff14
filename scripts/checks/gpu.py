"""Measure everything that needs a GPU, in stages by value; each figure is on disk the moment it exists.

python scripts/checks/gpu.py --out results/gpu_<hardware>_<yyyy-mm>            # all stages; again: what is still missing
python scripts/checks/gpu.py --out DIR --only first                            # or --skip compare tests
python scripts/checks/gpu.py --out DIR --repeat rollout                        # measure a stage again
python scripts/checks/gpu.py --out DIR --only humanoid --humanoid-seconds 7200 # --repeat humanoid trains on
python scripts/checks/gpu.py --out DIR --rehearse                              # tiny sizes on the CPU, a made-up device name

Each step runs in a process of its own for a limited time; one that fails does not stop the others, and is tried again by the next
call. After an interruption of any kind, the same command continues: steps that are done and points that are measured stay.

The folder holds a log of each step, ``steps/`` (which steps are done), the JSON files of the benchmarks, the training runs,
``environment.json`` and ``table.md``. The last lines printed are the table for the README. Nothing else should run on the
machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from es_flipout.errors import UserError
from es_flipout.training.checkpoint import atomic_write
from scripts import report
from scripts.checks._gpu_steps import STAGES, Check, Row, Step
from scripts.checks._process import call, last_line, run

REHEARSED = "no GPU (rehearsal)"


@dataclass
class Done:
    """What came of a step."""

    name: str
    seconds: float
    problem: str | None


def main() -> None:
    """Run the stages, and write the table."""
    options = parser().parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    check = Check(out, options.rehearse, options.humanoid_seconds)
    record_machine(check)
    (out / "steps").mkdir(exist_ok=True)
    chosen = [name for name in options.only or STAGES if name not in options.skip]
    for name in options.repeat:
        for step in STAGES[name](check):
            forget(step, out)
    for name in [*chosen, *(name for name in options.repeat if name not in chosen)]:
        carry_out_stage(name, check)
    print(table(check))
    print(f"everything is in {options.out}\n\nFor the README:\n")
    print(readme_table(check))


def parser() -> argparse.ArgumentParser:
    """The command line; its help says what every stage costs."""
    check = Check(Path(), rehearse=False)
    costs = [
        f"  {name:9} at most {sum(step.seconds for step in stage(check)):4.0f} s  {(stage.__doc__ or '').strip()}"
        for name, stage in STAGES.items()
    ]
    stages = "stages, in this order:\n" + "\n".join(costs)
    own = argparse.ArgumentParser(
        description=__doc__, epilog=stages, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    own.add_argument("--out", type=Path, required=True, help="results folder")
    own.add_argument("--only", nargs="+", choices=list(STAGES), metavar="STAGE", help="only these stages")
    own.add_argument(
        "--skip", nargs="+", choices=list(STAGES), default=[], metavar="STAGE", help="all but these stages"
    )
    own.add_argument(
        "--repeat", nargs="+", choices=list(STAGES), default=[], metavar="STAGE", help="measure these again"
    )
    own.add_argument("--humanoid-seconds", type=float, default=100.0, help="duration of the Humanoid training (100)")
    own.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU: shows that every stage works")
    return own


def record_machine(check: Check) -> None:
    """Write ``environment.json``.

    Raises:
        UserError: the folder holds what was measured on another machine, or in a rehearsal.
    """
    path, now = check.out / "environment.json", check.out / ".environment"
    # In a process of its own, because it asks CUDA for the GPU's name and so takes some of its memory.
    now.mkdir(exist_ok=True)
    code, _ = run(call(report.write_environment, str(now)), check.out / "environment.log", 60)
    if code:
        raise UserError(f"the machine could not be described: {last_line(check.out / 'environment.log')}")
    found = report.read_json(now / "environment.json")
    shutil.rmtree(now)
    if check.rehearse:
        found["hardware"]["gpu"] = REHEARSED
    if "gpu" not in found["hardware"]:
        raise UserError("torch finds no CUDA GPU; use --rehearse")
    if path.exists() and report.read_json(path)["hardware"] != found["hardware"]:
        raise UserError(f"{check.out} holds what was measured on another machine; choose another --out")
    atomic_write(path, json.dumps(found, indent=2) + "\n")


def carry_out_stage(name: str, check: Check) -> None:
    """Run the steps of a stage that are not done, and write the table after each."""
    for step in STAGES[name](check):
        mark = check.out / "steps" / f"{step.name}.json"
        if mark.exists() and report.read_json(mark)["problem"] is None:
            continue
        _drop_failed_points(step)
        done = carry_out(step, check.out)
        atomic_write(mark, json.dumps(asdict(done)) + "\n")
        atomic_write(check.out / "table.md", table(check))


def carry_out(step: Step, out: Path) -> Done:
    """Run a step; as long as it dies with new points, it is started again for the others."""
    missing = [package for package in step.needs if importlib.util.find_spec(package) is None]
    if missing:
        return Done(step.name, 0, f"skipped: needs {' and '.join(missing)}")
    print(f"{step.name} (at most {step.seconds:.0f} s) ...", flush=True)
    started, log, rows = time.perf_counter(), out / f"{step.name}.log", len(_rows(step))
    while True:
        code, late = run(step.arguments(), log, step.seconds - (time.perf_counter() - started))
        more, rows = len(_rows(step)) > rows, len(_rows(step))
        if code == 0 or late or not more or time.perf_counter() - started >= step.seconds:
            break
    problem = None
    if late and not step.stop_is_fine:
        problem = f"not finished within {step.seconds:.0f} s"
    elif code != 0 and not late:
        problem = f"exit code {code}: {last_line(log)}"
    elif not rows:
        problem = "no result"
    took = time.perf_counter() - started
    print(f"  {problem or 'done'} in {took:.0f} s", flush=True)
    return Done(step.name, round(took, 1), problem)


def forget(step: Step, out: Path) -> None:
    """Remove what a step has measured."""
    for path in (*step.writes, out / "steps" / f"{step.name}.json"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def table(check: Check) -> str:
    """Everything that was measured so far, read from its files, beside its target, in Markdown."""
    rows: list[tuple[str, ...]] = []
    seconds = 0.0
    for stage in STAGES.values():
        for step in stage(check):
            rows += [row[:3] for row in _rows(step)]
            mark = check.out / "steps" / f"{step.name}.json"
            if mark.exists():
                done = Done(**report.read_json(mark))
                seconds += done.seconds
                if done.problem is not None:
                    rows.append((step.name, done.problem, ""))
    return _device(check) + report.markdown("what | measured | target", rows) + f"\n{seconds:.0f} s in all.\n"


def readme_table(check: Check) -> str:
    """The rows that the README shows, in Markdown."""
    rows = [row[:2] for stage in STAGES.values() for step in stage(check) for row in _rows(step) if row.readme]
    return _device(check) + report.markdown("what | measured", rows)


def _device(check: Check) -> str:
    return f"{report.read_json(check.out / 'environment.json')['hardware']['gpu']}:\n\n"


def _rows(step: Step) -> list[Row]:
    try:
        return step.rows()
    except (OSError, KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        return [Row(step.name, f"unreadable ({type(error).__name__}: {error})", "")]


def _drop_failed_points(step: Step) -> None:
    """Let a benchmark measure again what failed in an earlier call."""
    for path in step.writes:
        if path.suffix != ".json" or not path.exists():
            continue
        whole: Any = report.read_json(path)
        for group, points in whole.get("results", {}).items():
            if isinstance(points, list):
                whole["results"][group] = [point for point in points if "error" not in point]
        atomic_write(path, json.dumps(whole, indent=2) + "\n")


if __name__ == "__main__":
    report.run_script(main)
