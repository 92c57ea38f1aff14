"""The steps of ``gpu.py``: what each runs, and how its rows of the table are read."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scripts import report
from scripts.checks._process import call, last_line, run

CLI = ["-m", "es_flipout"]
MEMORY_MEMBERS = 65_536
# Least ratio to plain inference, in one wide layer.
WIDE = {
    "flipout": "≥ 0.48",
    "flipout_layers": "≥ 0.48",
    "flipout_library": "≥ 0.48",
    "flipout_fp8": "≥ 0.6",
    "low_rank": "≥ 0.91",
    "low_rank_kernel": "≥ 0.91",
}

Row = tuple[str, str, str]  # what, value, target


@dataclass(frozen=True)
class Check:
    """The options of this run."""

    out: Path
    device: str
    quick: bool


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        arguments: of the interpreter.
        seconds: its share of the time.
        rows: reads what it wrote, as rows of the table.
        stop_is_fine: when its time is over, what it has written by then counts.
        needs: packages without which it is skipped.
    """

    arguments: list[str]
    seconds: float
    rows: Callable[[], list[Row]]
    stop_is_fine: bool = False
    needs: tuple[str, ...] = ()


def tests(check: Check) -> Step:
    """The tests marked ``gpu``."""
    chosen = ["-m", "gpu", "--override-ini", "addopts=", "--import-mode=importlib"]
    path = "tests/rollout/test_device.py" if check.quick else "tests"
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen, path]

    def rows() -> list[Row]:
        return [("tests marked gpu", last_line(check.out / "tests.log"), "all pass")]

    return Step(arguments, 110, rows, needs=("pytest", "hypothesis"))


def memory(check: Check) -> Step:
    """The memory of 65,536 Humanoid members."""
    file = check.out / "memory.json"

    def rows() -> list[Row]:
        found = report.read_json(file)
        shown = [(f"stored for {found['members']:,} Humanoid members", f"{found['stored'] / 1e9:.3f} GB", "< 1 GB")]
        if found["peak"] is not None:
            shown.append(("  and the peak while they are drawn", f"{found['peak'] / 1e9:.3f} GB", ""))
        return shown

    members = 1024 if check.quick else MEMORY_MEMBERS
    return Step(call(measure_memory, str(file), check.device, members), 30, rows)


def measure_memory(file: str, device: str, members: int) -> None:
    """Draw a population of a 348-256-256-17 policy, and write what it stores."""
    import torch

    from es_flipout.policies.networks import MLP
    from es_flipout.rollout.memory import stored_bytes
    from es_flipout.strategy.evolution_strategy import EvolutionStrategy

    strategy = EvolutionStrategy(MLP(348, 17, (256, 256)), members, 0.02, device=device)
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    population = strategy.ask()
    peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else None
    Path(file).write_text(json.dumps({"members": members, "stored": stored_bytes(population), "peak": peak}) + "\n")


def forward(check: Check) -> Step:
    """``bench forward``."""
    file = check.out / "forward.json"
    sizes = "--widths 64 256 --populations 1024 65536 --precisions ieee tf32 --rounds 3"
    if check.quick:
        sizes = "--widths 32 --populations 256 --rounds 1 --memory-members 1024"

    def rows() -> list[Row]:
        results = report.read_json(file)["results"]
        shown = []
        for p in [*results.get("ways", []), *results.get("forward", [])]:
            size = f"{p['width']}-{p['width']}, P = {p['population']:,} {p.get('precision', '')}".strip()
            shown += [(f"{name} ÷ plain, {size}", _spread(ratio), "≥ 0.91") for name, ratio in p["ratio"].items()]
        for p in results.get("wide", []):
            size = f"one layer {p['width']} wide, bf16, batch {p['population']}"
            shown += [(f"{name} ÷ plain, {size}", _spread(r), WIDE.get(name, "")) for name, r in p["ratio"].items()]
        return shown

    options = [*sizes.split(), "--device", check.device, "--json", str(file)]
    return Step([*CLI, "bench", "forward", *options], 120, rows)


def rollout(check: Check) -> Step:
    """``bench rollout``."""
    file = check.out / "rollout.json"
    sizes = "--env-ids HalfCheetah-v5 Humanoid-v5 --populations 4096 16384 --rounds 2 --seconds 5"
    if check.quick:
        sizes = "--env-ids HalfCheetah-v5 --populations 16 --rounds 1 --seconds 0.2 --shortest-episode 20"

    def rows() -> list[Row]:
        shown = []
        for p in report.read_json(file)["results"]["rollout"]:
            ratio, rate = _spread(p["training_to"]["physics"]), p["steps_per_s"]["training"]["median"]
            what = f"training ÷ bare physics, {p['env_id']}, {p['population']:,} worlds"
            shown.append((what, f"{ratio}, {rate:,.0f} env steps/s", "≥ 0.95"))
        return shown

    options = [*sizes.split(), "--device", check.device, "--json", str(file)]
    return Step([*CLI, "bench", "rollout", *options], 110, rows)


def compare(check: Check) -> Step:
    """``bench compare`` against the cores of this machine; short episodes, so that a few cores finish in time."""
    cores, folder = len(os.sched_getaffinity(0)), check.out / "compare"
    env_id = "CartPole-v1" if check.quick else "HalfCheetah-v5"
    sizes = f"--population-size 4096 --rounds 2 --seconds 1 --workers {max(cores // 2, 1)},{cores}"
    kwargs = ["--env-kwargs", '{"max_episode_steps": 100}']
    if check.quick:
        sizes, kwargs = "--population-size 64 --rounds 1 --seconds 0 --workers 1", []

    def rows() -> list[Row]:
        (file,) = folder.glob("*.json")
        found = report.read_json(file)["results"]["compare"]["equivalent_cores"].items()
        what = "classic Ray workers that equal"
        return [(f"{what} {name}, {env_id}", _spread(e["linear"], ",.1f"), "≥ 200 for a GPU") for name, e in found]

    options = [*sizes.split(), *kwargs, "--out", str(folder)]
    return Step([*CLI, "bench", "compare", env_id, *options], 100, rows, needs=("ray",))


def train(check: Check) -> Step:
    """A short training, stopped when its time is over, and scored."""
    run_dir = check.out / f"run_{time.strftime('%H%M%S')}"
    sizes = "--population-size 8192 --env-steps 2000000000 --checkpoint-every 1"
    if check.quick:
        sizes = "--population-size 8 --generations 1 --hidden 8 --score-episodes 2"
    options = ["--device", check.device, "--run-dir", str(run_dir), "--evaluation-episodes", "5", *sizes.split()]

    def rows() -> list[Row]:
        metrics = (run_dir / "metrics.csv").read_text().splitlines()
        last = dict(zip(metrics[0].split(","), metrics[-1].split(","), strict=True))
        run(call(score, str(run_dir), 2 if check.quick else 10), check.out / "score.log", 60)
        result = report.read_json(run_dir / "evaluation.json")
        what = f"Humanoid-v5 after {float(last['wall_s']):.0f} s, {int(last['env_steps']):,} env steps"
        value = f"score {result['mean_return']:,.0f} (sd {result['std_return']:,.0f}, {result['episodes']} episodes)"
        return [(what, value, "6,000 within 600 s")]

    return Step([*CLI, "train", "Humanoid-v5", *options], 30 if check.quick else 100, rows, stop_is_fine=True)


def score(run_dir: str, episodes: int) -> None:
    """Score the policy of a run in the real environment, and write ``evaluation.json``."""
    from es_flipout.training.evaluate import evaluate
    from es_flipout.training.run_directory import load_agent, write_evaluation

    agent, config = load_agent(Path(run_dir))
    write_evaluation(Path(run_dir), evaluate(agent, config, episodes))


def _spread(values: dict[str, float], form: str = ",.2f") -> str:
    return report.spread(values, form)


STEPS: dict[str, Callable[[Check], Step]] = {
    step.__name__: step for step in (tests, memory, forward, rollout, compare, train)
}
