"""Measure everything that needs a GPU, in one command of at most ten minutes.

python scripts/checks/gpu.py --out results/gpu_<hardware>_<yyyy-mm>
python scripts/checks/gpu.py --out DIR --device cpu --quick      # a rehearsal without a GPU, in two minutes

Steps: the tests marked ``gpu``; the memory of 65,536 Humanoid members; ``bench forward`` and ``bench rollout`` on the GPU;
``bench compare`` against the host's own cores (needs the extra ``ray``); a short Humanoid-v5 training and the score, in the real
environment, of what it trained. Each runs in a process of its own with a share of the time; one that fails does not stop the
others.

The folder then holds a log of each step, the JSON files of the benchmarks, the training run, ``environment.json``,
``steps.json`` and ``table.md``, which is printed last. The package's own dependencies suffice; nothing else should run on the
machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from scripts import report
from scripts.checks._gpu_steps import STEPS, Check, Row, Step
from scripts.checks._process import call, last_line, run


@dataclass
class Done:
    """What came of a step."""

    name: str
    seconds: float
    problem: str | None
    rows: list[Row]


def main() -> None:
    """Run all steps, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="results folder")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that every step works")
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=list(STEPS), help="only these")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    check = Check(out, options.device, options.quick)
    # In a process of its own, because it asks CUDA for the GPU's name and so takes some of its memory.
    run(call(report.write_environment, str(out)), out / "environment.log", 60)
    done = []
    for name in options.steps:
        done.append(carry_out(name, STEPS[name](check), out))
        report.write_json(out / "steps.json", [asdict(step) for step in done])
    report.write_table(out, table(done))
    print(f"everything is in {options.out}")


def carry_out(name: str, step: Step, out: Path) -> Done:
    """Run a step, and read its rows of the table."""
    missing = [package for package in step.needs if importlib.util.find_spec(package) is None]
    if missing:
        return Done(name, 0, f"skipped: needs {' and '.join(missing)}", [])
    print(f"{name} (at most {step.seconds:.0f} s) ...", flush=True)
    started = time.perf_counter()
    log = out / f"{name}.log"
    code, late = run(step.arguments, log, step.seconds)
    took = time.perf_counter() - started
    problem = None
    if late and not step.stop_is_fine:
        problem = f"not finished within {step.seconds:.0f} s"
    elif code != 0 and not late:
        problem = f"exit code {code}: {last_line(log)}"
    rows: list[Row] = []
    try:
        rows = step.rows()
    except (OSError, KeyError, IndexError, ValueError, TypeError) as error:
        problem = problem or f"no result ({type(error).__name__}: {error})"
    print(f"  {problem or 'done'} in {took:.0f} s", flush=True)
    return Done(name, round(took, 1), problem, rows)


def table(done: list[Done]) -> str:
    """What was measured, beside its target, in Markdown."""
    rows: list[tuple[str, ...]] = []
    for step in done:
        rows += step.rows
        if step.problem is not None:
            rows.append((step.name, step.problem, ""))
    total = sum(step.seconds for step in done)
    return report.markdown("what | measured | target", rows) + f"\n{total:.0f} s in all.\n"


if __name__ == "__main__":
    main()
