"""Everything that has to be measured on a GPU, in one command of at most ten minutes.

python scripts/gpu_check.py --out results/gpu_<hardware>_<yyyy-mm>
python scripts/gpu_check.py --out DIR --device cpu --quick      # a rehearsal without a GPU, in two minutes

Steps: the tests marked ``gpu``; the memory of 65,536 Humanoid members; ``bench forward`` and ``bench rollout`` on the GPU;
``bench compare`` against the host's own cores (needs the extra ``ray``); a short Humanoid-v5 training and the score, in the real
environment, of what it trained. Each runs in a process of its own with a share of the time; one that fails does not stop the
others.

The folder then holds a log of each step, the JSON files of the benchmarks, the training run, ``environment.json``,
``steps.json`` and ``table.md``, which is printed last. Nothing has to be installed but the dependencies; nothing else should run
on the machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MEMORY_MEMBERS = 65_536
CLI = ["-m", "es_flipout.cli"]


@dataclass
class Done:
    """What came of a step: its rows of the table are ``(what, value, target)``."""

    name: str
    seconds: float
    problem: str | None
    rows: list[tuple[str, str, str]]


@dataclass(frozen=True)
class Check:
    """The options of this run."""

    out: Path
    device: str
    quick: bool

    def step(
        self,
        name: str,
        arguments: list[str],
        seconds: float,
        rows: Callable[[], list[tuple[str, str, str]]],
        stop_is_fine: bool = False,
    ) -> Done:
        """Run ``python ARGUMENTS`` for at most so many seconds, then read its rows of the table.

        Args:
            name: of the step and its log.
            arguments: of the interpreter.
            seconds: its share of the time.
            rows: reads what it wrote.
            stop_is_fine: when the time is over it is asked to stop, and what it has by then counts.
        """
        print(f"{name} (at most {seconds:.0f} s) ...", flush=True)
        started = time.perf_counter()
        code, late = run(arguments, self.out / f"{name}.log", seconds)
        took = time.perf_counter() - started
        problem = None
        if late and not stop_is_fine:
            problem = f"not finished within {seconds:.0f} s"
        elif code != 0 and not late:
            problem = f"exit code {code}: {last_line(self.out / f'{name}.log')}"
        found: list[tuple[str, str, str]] = []
        try:
            found = rows()
        except (OSError, KeyError, IndexError, ValueError, TypeError) as error:
            problem = problem or f"no result ({type(error).__name__}: {error})"
        print(f"  {problem or 'done'} in {took:.0f} s", flush=True)
        return Done(name, round(took, 1), problem, found)


def run(arguments: list[str], log: Path, seconds: float) -> tuple[int, bool]:
    """Exit code, and whether the time was over; the process and its children are then asked to stop, and later killed."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "COLUMNS": "160"}
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=env, stdout=file, stderr=file, start_new_session=True
        )
        try:
            return process.wait(seconds), False
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            try:
                return process.wait(20), True
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                return process.wait(), True
        finally:
            stop_children(process.pid)


def stop_children(group: int) -> None:
    """Kill what a step has left running."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:160] if lines else "it said nothing"


def main() -> None:
    """Run all steps and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that every step works")
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=list(STEPS), help="only these")
    parser.add_argument("--memory-into", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_into is not None:
        measure_memory(options.memory_into, options.device, 1024 if options.quick else MEMORY_MEMBERS)
        return
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    check = Check(out, options.device, options.quick)
    run(["-c", ENVIRONMENT, str(out / "environment.json")], out / "environment.log", 60)
    done = []
    for name in options.steps:
        done.append(STEPS[name](check))
        (out / "steps.json").write_text(json.dumps([asdict(step) for step in done], indent=2) + "\n")
    text = table(done)
    (out / "table.md").write_text(text)
    print(f"\n{text}\neverything lies in {options.out}")


ENVIRONMENT = """
import json, pathlib, sys
from es_flipout.runinfo import environment
pathlib.Path(sys.argv[1]).write_text(json.dumps(environment(), indent=2) + "\\n")
"""


def tests(check: Check) -> Done:
    """The tests marked ``gpu``."""
    if importlib.util.find_spec("pytest") is None or importlib.util.find_spec("hypothesis") is None:
        return Done("tests", 0, "left out: pytest and hypothesis are not installed", [])
    chosen = ["-m", "gpu", "--override-ini", "addopts=", "--import-mode=importlib"]
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen, "tests"]
    if check.quick:
        arguments[-1] = "tests/test_device_rollout.py"
    return check.step(
        "tests", arguments, 110, lambda: [("tests marked gpu", last_line(check.out / "tests.log"), "all pass")]
    )


def forward(check: Check) -> Done:
    """``bench forward``."""
    file = check.out / "forward.json"
    sizes = ["--widths", "64", "256", "--populations", "1024", "65536", "--precisions", "ieee", "tf32", "--rounds", "3"]
    if check.quick:
        sizes = ["--widths", "32", "--populations", "256", "--rounds", "1", "--memory-members", "1024"]

    def rows() -> list[tuple[str, str, str]]:
        results = json.loads(file.read_text())["results"]
        shown = []
        for point in [*results.get("ways", []), *results.get("forward", [])]:
            where = (
                f"{point['width']}-{point['width']}, P = {point['population']:,} {point.get('precision', '')}".strip()
            )
            shown += [(f"{name} ÷ plain, {where}", spread(r), "≥ 0.91") for name, r in point["ratio"].items()]
        for point in results.get("wide", []):
            where = f"one layer {point['width']} wide, bf16, batch {point['population']}"
            shown += [(f"{name} ÷ plain, {where}", spread(r), WIDE.get(name, "")) for name, r in point["ratio"].items()]
        return shown

    device = ["--device", check.device]
    return check.step("forward", [*CLI, "bench", "forward", *sizes, *device, "--json", str(file)], 120, rows)


WIDE = {"flipout": "≥ 0.48", "flipout_layers": "≥ 0.48", "flipout_library": "≥ 0.48", "flipout_fp8": "≥ 0.6"}
WIDE |= {"low_rank": "≥ 0.91", "low_rank_kernel": "≥ 0.91"}


def rollout(check: Check) -> Done:
    """``bench rollout``."""
    file = check.out / "rollout.json"
    sizes = ["--env-ids", "HalfCheetah-v5", "Humanoid-v5", "--populations", "4096", "16384", "--rounds", "2"]
    sizes += ["--seconds", "5"]
    if check.quick:
        sizes = ["--env-ids", "HalfCheetah-v5", "--populations", "16", "--rounds", "1", "--seconds", "0.2"]
        sizes += ["--shortest-episode", "20"]

    def rows() -> list[tuple[str, str, str]]:
        return [
            (
                f"training ÷ bare physics, {p['env_id']}, {p['population']:,} worlds",
                f"{spread(p['training_to']['physics'])}, {p['steps_per_s']['training']['median']:,.0f} env steps/s",
                "≥ 0.95",
            )
            for p in json.loads(file.read_text())["results"]["rollout"]
        ]

    device = ["--device", check.device]
    return check.step("rollout", [*CLI, "bench", "rollout", *sizes, *device, "--json", str(file)], 110, rows)


def compare(check: Check) -> Done:
    """``bench compare`` against the cores of this machine; short episodes, so that few cores are done in time."""
    if importlib.util.find_spec("ray") is None:
        return Done("compare", 0, "left out: ray is not installed", [])
    cores = len(os.sched_getaffinity(0))
    env_id = "CartPole-v1" if check.quick else "HalfCheetah-v5"
    sizes = [
        "--population-size",
        "4096",
        "--rounds",
        "2",
        "--seconds",
        "1",
        "--workers",
        f"{max(cores // 2, 1)},{cores}",
    ]
    sizes += ["--env-kwargs", '{"max_episode_steps": 100}']
    if check.quick:
        sizes = ["--population-size", "64", "--rounds", "1", "--seconds", "0", "--workers", "1"]
    folder = check.out / "compare"

    def rows() -> list[tuple[str, str, str]]:
        (file,) = folder.glob("*.json")
        results = json.loads(file.read_text())["results"]["compare"]
        return [
            (f"classic Ray workers that equal {name}, {env_id}", spread(found["linear"], 1), "≥ 200 for a GPU")
            for name, found in results["equivalent_cores"].items()
        ]

    return check.step("compare", [*CLI, "bench", "compare", env_id, *sizes, "--out", str(folder)], 100, rows)


def train(check: Check) -> Done:
    """A short training, stopped when its time is over, and scored."""
    run_dir = check.out / f"run_{time.strftime('%H%M%S')}"
    arguments = [*CLI, "train", "Humanoid-v5", "--device", check.device, "--run-dir", str(run_dir)]
    arguments += ["--evaluation-episodes", "5"]
    if check.quick:
        arguments += ["--population-size", "8", "--generations", "1", "--hidden", "8", "--score-episodes", "2"]
    else:
        arguments += ["--population-size", "8192", "--env-steps", "2000000000", "--checkpoint-every", "1"]
    score = check.out / "humanoid.json"

    def rows() -> list[tuple[str, str, str]]:
        metrics = (run_dir / "metrics.csv").read_text().splitlines()
        last = dict(zip(metrics[0].split(","), metrics[-1].split(","), strict=True))
        run(
            ["-c", EVALUATE, str(run_dir), str(score), "2" if check.quick else "10"],
            check.out / "humanoid_score.log",
            60,
        )
        result: dict[str, Any] = json.loads(score.read_text())
        what = f"Humanoid-v5 after {float(last['wall_s']):.0f} s, {int(last['env_steps']):,} env steps"
        value = f"score {result['mean_return']:,.0f} (sd {result['std_return']:,.0f}, {result['episodes']} episodes)"
        return [(what, value, "6,000 within 600 s")]

    return check.step("train", arguments, 30 if check.quick else 100, rows, stop_is_fine=True)


EVALUATE = """
import contextlib, pathlib, sys
from es_flipout.cli import main
with open(sys.argv[2], "w") as file, contextlib.redirect_stdout(file):
    code = main(["evaluate", sys.argv[1], "--episodes", sys.argv[3], "--json"])
sys.exit(code)
"""


def memory(check: Check) -> Done:
    """The memory of 65,536 Humanoid members."""
    file = check.out / "memory.json"
    arguments = [str(Path(__file__).resolve()), "--out", str(check.out), "--device", check.device]
    arguments += ["--memory-into", str(file), *(["--quick"] if check.quick else [])]

    def rows() -> list[tuple[str, str, str]]:
        found = json.loads(file.read_text())
        rows = [(f"stored for {found['members']:,} Humanoid members", f"{found['stored'] / 1e9:.3f} GB", "< 1 GB")]
        if found["peak"] is not None:
            rows.append(("  and the most in use while they are drawn", f"{found['peak'] / 1e9:.3f} GB", ""))
        return rows

    return check.step("memory", arguments, 30, rows)


def measure_memory(file: Path, device: str, members: int) -> None:
    """Draw a population of a 348-256-256-17 policy and write what it stores."""
    import torch

    from es_flipout.memory import stored_bytes
    from es_flipout.policies import MLP
    from es_flipout.strategy import EvolutionStrategy

    module = MLP(348, 17, (256, 256))
    strategy = EvolutionStrategy(module, members, 0.02, device=device)
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    population = strategy.ask()
    peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else None
    file.write_text(json.dumps({"members": members, "stored": stored_bytes(population), "peak": peak}) + "\n")


STEPS: dict[str, Callable[[Check], Done]] = {
    "tests": tests,
    "memory": memory,
    "forward": forward,
    "rollout": rollout,
    "compare": compare,
    "train": train,
}


def spread(values: dict[str, float], digits: int = 2) -> str:
    """Median, least and most."""
    return "{median:,.{d}f} ({min:,.{d}f} to {max:,.{d}f})".format(**values, d=digits)


def table(done: list[Done]) -> str:
    """What was measured, beside its target, in Markdown."""
    lines = ["| what | measured | target |", "|---|---|---|"]
    for step in done:
        lines += [f"| {what} | {value} | {target} |" for what, value, target in step.rows]
        if step.problem is not None:
            lines.append(f"| {step.name} | {step.problem} | |")
    total = sum(step.seconds for step in done)
    return "\n".join(lines) + f"\n\n{total:.0f} s in all.\n"


if __name__ == "__main__":
    main()
