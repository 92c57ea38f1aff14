"""The stages of ``gpu.py``: what each step runs, and how its rows of the table are read from what it wrote."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from scripts import report
from scripts.checks._process import ROOT, call, last_line

CLI = ["-m", "es_flipout"]
PYTEST = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--override-ini", "addopts=", "--import-mode=importlib"]
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
# If these pass, kernels, graphs, physics and training on the GPU work.
ESSENTIAL = (
    "tests/kernels/test_gpu.py::test_mlp",
    "tests/kernels/test_gpu.py::test_linear",
    "tests/kernels/test_gpu.py::test_mlp_in_a_cuda_graph",
    "tests/kernels/test_gpu.py::test_weighted_sum_of_many",
    "tests/rollout/test_device.py::test_graphs_replay_what_plain_calls_do",
    "tests/rollout/test_device.py::test_nothing_waits_for_the_device",
    "tests/rollout/test_device.py::test_torch_environments_on_the_gpu",
    "tests/rollout/test_device_warp.py::test_graphs_on_a_gpu_play_the_same_episodes_and_nothing_waits",
    "tests/envs/test_mujoco_gpu.py::test_graph_equals_eager",
    "tests/envs/test_mujoco_gpu.py::test_nothing_waits_for_the_host",
)
# Members, generations, steps per episode and most seconds of the first trainings; the second compiles the kernels of physics.
TRAINED = {"CartPole-v1": (8192, 4, 500, 25), "HalfCheetah-v5": (4096, 2, 200, 60)}
COMPARED = {"HalfCheetah-v5": "≥ 200", "Humanoid-v5": "≥ 100", "CartPole-v1": "≥ 10,000"}


class Row(NamedTuple):
    """A row of the table; those of the README are marked."""

    what: str
    value: str
    target: str
    readme: bool = False


@dataclass(frozen=True)
class Check:
    """The options of this run.

    Attributes:
        out: the results folder.
        rehearse: whether to run everything on the CPU, in tiny sizes.
        humanoid_seconds: duration of the Humanoid training.
    """

    out: Path
    rehearse: bool
    humanoid_seconds: float = 100.0

    @property
    def device(self) -> str:
        """Where the steps compute."""
        return "cpu" if self.rehearse else "cuda"


@dataclass(frozen=True)
class Step:
    """One step; a process of its own.

    Attributes:
        name: of its log and of its mark in the folder.
        arguments: of the interpreter; determined when the step starts.
        seconds: most seconds it may take.
        rows: reads what it has written so far, as rows of the table; an empty list if that is nothing yet.
        stop_is_fine: when its time is over, what it has written by then is its result.
        needs: packages without which it is skipped.
        writes: files and folders that are removed before the step is repeated; what is not among them is continued.
    """

    name: str
    arguments: Callable[[], list[str]]
    seconds: float
    rows: Callable[[], list[Row]]
    stop_is_fine: bool = False
    needs: tuple[str, ...] = ()
    writes: tuple[Path, ...] = ()


def first(check: Check) -> list[Step]:
    """Does it run: ten essential tests, CartPole and HalfCheetah train for seconds."""
    chosen = ["-m", "gpu", *ESSENTIAL] if not check.rehearse else ["-m", "not gpu", "tests/test_runinfo.py"]
    return [_tests(check, "essential", chosen, 30, "essential GPU tests"), *(_train(check, name) for name in TRAINED)]


def forward(check: Check) -> list[Step]:
    """Memory of 65,536 members, and the population forward against plain inference."""
    return [_memory(check), *(_forward(check, width) for width in ((8,) if check.rehearse else (64, 256)))]


def rollout(check: Check) -> list[Step]:
    """Training against bare physics."""
    worlds = (4,) if check.rehearse else (4096, 16384)
    return [_rollout(check, name, size) for size in worlds for name in ("HalfCheetah-v5", "Humanoid-v5")]


def compare(check: Check) -> list[Step]:
    """Classic Ray workers on the host's cores against the GPU."""
    return [_compare(check, name) for name in (("CartPole-v1",) if check.rehearse else COMPARED)]


def humanoid(check: Check) -> list[Step]:
    """A Humanoid-v5 training, which is continued if it is there, and its score in the real environment."""
    return [_humanoid(check), _humanoid_score(check)]


def tests(check: Check) -> list[Step]:
    """All tests marked gpu, file by file."""
    marked = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    files = [path.relative_to(ROOT).as_posix() for path in marked]
    if check.rehearse:
        files = ["tests/kernels/test_gpu.py"]
    return [
        _tests(check, f"tests_{Path(file).stem.removeprefix('test_')}_{number}", ["-m", "gpu", file], 120, file)
        for number, file in enumerate(files)
    ]


STAGES: dict[str, Callable[[Check], list[Step]]] = {
    stage.__name__: stage for stage in (first, forward, rollout, compare, humanoid, tests)
}
# The steps


def _tests(check: Check, name: str, chosen: list[str], seconds: float, what: str) -> Step:
    log = check.out / f"{name}.log"

    def rows() -> list[Row]:
        return [Row(what, last_line(log), "all pass")] if log.exists() else []

    return Step(name, lambda: [*PYTEST, *chosen], seconds, rows, needs=("pytest", "hypothesis"), writes=(log,))


def _train(check: Check, env_id: str) -> Step:
    run_dir = check.out / env_id
    members, generations, steps, seconds = TRAINED[env_id]
    if check.rehearse:
        members, generations = 8, 2
    sizes = f"--population-size {members} --generations {generations} --checkpoint-every 1 --evaluation-episodes 2"
    if check.rehearse:
        sizes += " --hidden 8 --score-episodes 2"
    limit = json.dumps({"max_episode_steps": steps})
    options = ["--device", check.device, "--run-dir", str(run_dir), *sizes.split(), "--env-kwargs", limit]

    def rows() -> list[Row]:
        if (last := _last_metrics(run_dir)) is None:
            return []
        value = f"{float(last['env_steps_per_s']):,.0f} env steps/s in generation {int(last['generation'])}"
        return [Row(f"{env_id} trains, {members:,} members, {steps} steps", value, "")]

    command = partial(_train_or_resume, env_id, run_dir, options)
    return Step(f"train_{env_id}", command, seconds, rows, writes=(run_dir,))


def _train_or_resume(env_id: str, run_dir: Path, options: list[str]) -> list[str]:
    if any((run_dir / "checkpoints").glob("*")):
        return [*CLI, "resume", str(run_dir)]
    shutil.rmtree(run_dir, ignore_errors=True)  # stopped before its first checkpoint
    return [*CLI, "train", env_id, *options]


def _memory(check: Check) -> Step:
    file = check.out / "memory.json"

    def rows() -> list[Row]:
        if not file.exists():
            return []
        found = report.read_json(file)
        shown = [Row(f"stored for {found['members']:,} Humanoid members", f"{found['stored'] / 1e9:.3f} GB", "< 1 GB")]
        if found["peak"] is not None:
            shown.append(Row("  and the peak while they are drawn", f"{found['peak'] / 1e9:.3f} GB", ""))
        return shown

    members = 1024 if check.rehearse else MEMORY_MEMBERS
    return Step("memory", lambda: call(measure_memory, str(file), check.device, members), 30, rows, writes=(file,))


def measure_memory(file: str, device: str, members: int) -> None:
    """Draw a population of a 348-256-256-17 policy, and write what it stores."""
    import torch

    from es_flipout.policies.networks import MLP
    from es_flipout.rollout.memory import stored_bytes
    from es_flipout.strategy.evolution_strategy import EvolutionStrategy
    from es_flipout.training.checkpoint import atomic_write

    strategy = EvolutionStrategy(MLP(348, 17, (256, 256)), members, 0.02, device=device)
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    population = strategy.ask()
    peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else None
    found = {"members": members, "stored": stored_bytes(population), "peak": peak}
    atomic_write(Path(file), json.dumps(found) + "\n")


def _forward(check: Check, width: int) -> Step:
    file = check.out / f"forward_{width}.json"
    sizes = "--populations 1024 65536 --precisions tf32 ieee --rounds 3"
    ways, wide = "plain plain_compiled low_rank_kernel flipout flipout_layers flipout_mlp", width == 256
    if check.rehearse:
        sizes, ways, wide = (
            "--populations 16 32 --precisions ieee --rounds 1 --seconds-per-point 0.01",
            "plain flipout",
            True,
        )
    # The wide layer once, after the points of the widest network.
    layer = (["--wide", "32", "--wide-batch", "8"] if check.rehearse else []) if wide else ["--wide", "0"]
    options = ["--widths", str(width), *sizes.split(), "--ways", *ways.split(), *layer, "--device", check.device]

    def rows() -> list[Row]:
        shown: list[Row] = []
        results = _results(file)
        for p in results.get("ways", []):
            size = f"{p['width']}-{p['width']}, P = {p['population']:,} {p['precision']}"
            shown += _ratios(p, size, lambda name: "≥ 0.91 (0.48 where arithmetic counts)")
        for p in results.get("wide", []):
            shown += _ratios(
                p, f"one layer {p['width']} wide, bf16, batch {p['population']}", lambda n: WIDE.get(n, "")
            )
        return shown

    arguments = [*CLI, "bench", "forward", *options, "--json", str(file), "--resume"]
    return Step(f"forward_{width}", lambda: arguments, 150, rows, writes=(file,))


def _ratios(point: dict[str, Any], size: str, target: Callable[[str], str]) -> list[Row]:
    if "error" in point:
        return [Row(f"population forward, {size}", point["error"], "")]
    shown = [
        Row(f"{name} ÷ {point['reference']}, {size}", _spread(ratio), target(name), name.startswith("flipout"))
        for name, ratio in point["ratio"].items()
    ]
    if point["reference"] is None:
        shown.append(
            Row(f"population forward, {size}", f"no reference: {'; '.join(point['left_out'].values())}"[:300], "")
        )
    return shown


def _rollout(check: Check, env_id: str, worlds: int) -> Step:
    name = f"rollout_{env_id}_{worlds}"
    file = check.out / f"{name}.json"
    sizes = "--rounds 2 --seconds 5" if not check.rehearse else "--rounds 1 --seconds 0.05 --shortest-episode 5"
    options = ["--env-ids", env_id, "--populations", str(worlds), *sizes.split(), "--device", check.device]

    def rows() -> list[Row]:
        shown: list[Row] = []
        for p in _results(file).get("rollout", []):
            what = f"training ÷ bare physics, {p['env_id']}, {p['population']:,} worlds"
            if "error" in p:
                shown.append(Row(what, p["error"], "≥ 0.95"))
                continue
            ratio, rate = _spread(p["training_to"]["physics"]), p["steps_per_s"]["training"]["median"]
            shown.append(Row(what, f"{ratio}, {rate:,.0f} env steps/s", "≥ 0.95", True))
        return shown

    arguments = [*CLI, "bench", "rollout", *options, "--json", str(file), "--resume"]
    return Step(name, lambda: arguments, 100, rows, writes=(file,))


def _compare(check: Check, env_id: str) -> Step:
    cores, folder = len(os.sched_getaffinity(0)), check.out / "compare"
    sizes = f"--population-size 4096 --rounds 2 --seconds 1 --workers {max(cores // 2, 1)},{cores}"
    kwargs = ["--env-kwargs", '{"max_episode_steps": 100}']  # so that a few cores finish in time
    if check.rehearse:
        sizes, kwargs = "--population-size 16 --rounds 1 --seconds 0 --workers 1 --hidden 8", []
    file = folder / f"{env_id}.json"

    def rows() -> list[Row]:
        found = _results(file).get("compare", {}).get("equivalent_cores", {})
        what = f"classic Ray workers that equal {{}}, {env_id}"
        return [
            Row(what.format(name), _spread(e["linear"], ",.1f"), f"{COMPARED[env_id]} for a GPU", name == "engine_cuda")
            for name, e in found.items()
        ]

    arguments = [*CLI, "bench", "compare", env_id, *sizes.split(), *kwargs, "--out", str(folder)]
    return Step(f"compare_{env_id}", lambda: arguments, 130, rows, needs=("ray",), writes=(file,))


def _humanoid(check: Check) -> Step:
    run_dir = check.out / "Humanoid-v5"
    sizes = "--population-size 8192 --env-steps 100000000000 --checkpoint-every 1"
    if check.rehearse:
        sizes = "--population-size 8 --generations 2 --hidden 8 --score-episodes 2 --checkpoint-every 1"
    options = ["--device", check.device, "--run-dir", str(run_dir), "--evaluation-episodes", "5", *sizes.split()]

    def rows() -> list[Row]:
        if (last := _last_metrics(run_dir)) is None:
            return []
        trained = f"Humanoid-v5 after {float(last['wall_s']):.0f} s"
        steps = f"{int(last['env_steps']):,} env steps, {float(last['env_steps_per_s']):,.0f} per second"
        best = f"{steps}, mean return of the members {float(last['mean_return']):,.0f}"
        return [Row(trained, best, "800,000 env steps/s")]

    arguments = partial(_train_or_resume, "Humanoid-v5", run_dir, options)
    return Step("humanoid", arguments, check.humanoid_seconds, rows, stop_is_fine=True)


def _humanoid_score(check: Check) -> Step:
    run_dir = check.out / "Humanoid-v5"
    file = check.out / "humanoid_score.json"

    def rows() -> list[Row]:
        if not file.exists():
            return []
        found = report.read_json(file)
        what = f"score of Humanoid-v5 after {found['wall_s']:.0f} s"
        value = f"{found['mean_return']:,.0f} (sd {found['std_return']:,.0f}, {found['episodes']} episodes)"
        return [Row(what, value, "6,000 within 600 s", True)]

    arguments = partial(call, score, str(run_dir), str(file), 2 if check.rehearse else 10)
    return Step("humanoid_score", arguments, 60, rows, writes=(file,))


def score(run_dir: str, file: str, episodes: int) -> None:
    """Score the policy of a run in the real environment."""
    from es_flipout.training.checkpoint import atomic_write
    from es_flipout.training.evaluate import evaluate
    from es_flipout.training.run_directory import load_agent

    agent, config = load_agent(Path(run_dir))
    found = evaluate(agent, config, episodes)
    last = _last_metrics(Path(run_dir))
    values = {name: getattr(found, name) for name in ("mean_return", "std_return", "episodes")}
    atomic_write(Path(file), json.dumps(values | {"wall_s": float(last["wall_s"]) if last else 0.0}) + "\n")


# Reading


def _results(file: Path) -> dict[str, Any]:
    return report.read_json(file)["results"] if file.exists() else {}


def _last_metrics(run_dir: Path) -> dict[str, str] | None:
    """The last complete line of ``metrics.csv``; None if there is none."""
    path = run_dir / "metrics.csv"
    lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
    whole = [line.strip().split(",") for line in lines if line.endswith("\n")]
    return dict(zip(whole[0], whole[-1], strict=True)) if len(whole) > 1 else None


def _spread(values: dict[str, float], form: str = ",.2f") -> str:
    return report.spread(values, form)
