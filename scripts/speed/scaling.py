"""Predict bytes, time and cost of a generation, up to a million members and a thousand nodes.

python scripts/speed/scaling.py --out results/scaling_<hardware>_<yyyy-mm>     # about ten minutes; nothing else should run
python scripts/speed/scaling.py --out ... --render                             # only table.md (prices, network, node cores)
python scripts/speed/scaling.py --quick                                        # a minute, into runs/scaling_quick

The model is a sum of measured constants (``_scaling_model.py``): what a worker needs per step and per member while all workers
play, what the training process needs per member and per message. Nothing in it is fitted to a training run. It is then
checked against training with one and two Ray workers on this machine, which is measured in turn with the constants of the
workers, and against a simulated cluster (``_scaling_cluster.py``), whose nodes sleep instead of playing. Only after that it
is applied to clusters that are not here. Assumed, not measured: the network, and the price.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from scripts import report
from scripts.speed._scaling_cluster import simulate
from scripts.speed._scaling_measure import TASKS, measure, train
from scripts.speed._scaling_model import Cluster, Constants, predict

GRID = ((4096, 1), (4096, 16), (65_536, 16), (65_536, 128), (1_000_000, 128), (1_000_000, 1000))  # members, nodes


def main() -> None:
    """Measure, check, and write the table."""
    parser = report.script_parser(__doc__, "short episodes, few members; the numbers mean nothing")
    parser.add_argument(
        "--tasks", nargs="+", choices=[task.env_id for task in TASKS], default=[task.env_id for task in TASKS]
    )
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2], help="of the check")
    parser.add_argument("--simulated", nargs=2, type=int, default=[100, 16], metavar=("NODES", "CORES"))
    parser.add_argument("--node-cores", type=int, default=16, help="cores of a node (assumed)")
    parser.add_argument("--gbit", type=float, default=10.0, help="network of the machine that trains (assumed)")
    parser.add_argument("--price-core-hour", type=float, default=0.04, help="dollars (assumed)")
    options = report.parse(parser)
    if not options.render:
        measure_all(options)
    report.write_table(options.out, table(options))


def measure_all(options: argparse.Namespace) -> None:
    """Write ``constants.json``, ``runs.csv``, ``shards.csv`` (the check), ``cluster.csv`` and ``environment.json``."""
    torch.set_num_threads(1)
    tasks = [
        dataclasses.replace(task, episode_steps=20 if options.quick else 200)
        for task in TASKS
        if task.env_id in options.tasks
    ]
    (nodes, cores), sleeps = options.simulated, (0.0, 0.5)
    if options.quick:
        tasks, nodes, sleeps = tasks[:1], 2, (0.0,)
    report.begin(options.out, report.config_of(options, "node_cores", "gbit", "price_core_hour"), fresh=True)
    for name in ("shards", "cluster"):
        (options.out / f"{name}.csv").unlink(missing_ok=True)
    constants = {task.env_id: measure(task, options.quick) for task in tasks}
    population, generations = (128, 3) if options.quick else (256, 5)
    for task in tasks:
        for workers in options.workers:
            fixed = {"task": task.env_id, "workers": workers, "population": population}
            played, shards = train(task, workers, population, generations)
            report.append_csv(options.out / "runs.csv", [{**fixed, **row} for row in played])
            report.append_csv(options.out / "shards.csv", [{**fixed, **row} for row in shards])
            print(f"{task.env_id}, {workers} workers: measured", flush=True)
    beside = worker_constants(options.out)
    for name, own in constants.items():
        under_load = beside[name, max(options.workers)]
        own |= {key: median(here[key] for here in under_load) for key in under_load[0]}
    report.write_json(options.out / "constants.json", constants)
    for sleep_s in sleeps:
        report.append_csv(options.out / "cluster.csv", simulate(tasks[0], nodes, cores, generations, sleep_s))


def table(options: argparse.Namespace) -> str:
    """The constants, the checks, and the predictions, in Markdown."""
    constants = {name: Constants(**c) for name, c in report.read_json(options.out / "constants.json").items()}
    measured = ((label, *(show(c) for c in constants.values())) for label, show in CONSTANTS.items())
    text = "**Measured**\n\n" + report.markdown("".join(f"| {name}" for name in constants), measured)
    text += (
        "\n**The model against training with Ray workers on this machine** (generations after the first; median, least to "
        "most)\n\n"
    )
    header = "task | workers | members | steps an episode | predicted | measured | measured ÷ predicted"
    text += report.markdown(header, check(options.out, constants))
    if (options.out / "cluster.csv").exists():
        text += "\n**A simulated cluster**: real messages and updates, nodes that sleep (medians of generations)\n\n"
        text += report.markdown(SIMULATED, simulated(options.out))
    for remedies, title in ((True, "As it is"), (False, "Every core for itself, and the update in one process")):
        text += (
            f"\n**{title}**: episodes of 1,000 steps, nodes of {options.node_cores} cores, {options.gbit:g} Gbit/s and "
            f"${options.price_core_hour:g} for a core-hour (the last three are assumed)\n\n"
        )
        text += report.markdown(PREDICTED, predictions(options, constants, remedies))
    return text


def worker_constants(out: Path) -> dict[tuple[str, int], list[dict[str, float]]]:
    """Seconds of the slowest worker for a step and a member, by task and number of workers, beside every generation."""
    if not (out / "shards.csv").exists():
        return {}
    found = defaultdict(list)
    shards = report.read_csv(out / "shards.csv")
    for (task, workers, _), own in report.groups(shards, "task", "workers", "generation"):
        slowest = own.max(numeric_only=True)
        short, whole = slowest["short_s"] / slowest["members"], slowest["whole_s"] / slowest["members"]
        step_s = (whole - short) / (slowest["whole_steps"] - slowest["short_steps"])
        member_s = max(short - slowest["short_steps"] * step_s, 0.0)
        found[task, int(workers)].append({"step_s": float(step_s), "worker_member_s": float(member_s)})
    return found


def check(out: Path, constants: dict[str, Constants]) -> list[tuple[object, ...]]:
    """Generations of training beside their prediction; ratios are those of a generation and what was measured beside it."""
    rows, played, beside = [], report.read_csv(out / "runs.csv"), worker_constants(out)
    for (task, workers, population), own in report.groups(played, "task", "workers", "population"):
        steps = mean(own["env_steps"]) / population
        predicted = [
            predict(
                dataclasses.replace(constants[task], **here), population, steps, Cluster(1, workers, math.inf)
            ).seconds
            for here in beside.get((task, workers), [{}] * len(own))
        ]
        ratios = [measured / expected for measured, expected in zip(own["seconds"], predicted, strict=True)]
        seconds = report.spread(own["seconds"], _time)
        rows.append(
            (task, workers, population, f"{steps:.0f}", _time(median(predicted)), seconds, report.spread(ratios, ".2f"))
        )
    return rows


SIMULATED = (
    "nodes | cores of each | members | messages | shards | a node's time for a message | generation | update | "
    "processor time of the training process: a message | a shard | update"
)


def simulated(out: Path) -> list[tuple[object, ...]]:
    """The simulated cluster: seconds on the clock, and of the training process's processor."""
    rows = []
    sizes = ("nodes", "cores", "members", "messages", "shards", "sleep_s")
    for (*counts, sleep_s), own in report.groups(report.read_csv(out / "cluster.csv"), *sizes):
        middle = own.median(numeric_only=True)
        clock = (sleep_s, middle["play_s"] + middle["update_s"], middle["update_s"])
        play_s = middle["play_cpu_s"]
        head = (play_s / middle["messages"], play_s / middle["shards"], middle["update_cpu_s"])
        rows.append((*(f"{count:,}" for count in counts), *map(_time, clock), *map(_time, head)))
    return rows


PREDICTED = (
    "task | members | nodes | messages | down | up | playing | messages handled | update | network | generation | "
    "time at play | env steps/s | dollars a generation | next bottleneck"
)


def predictions(
    options: argparse.Namespace, constants: dict[str, Constants], remedies: bool
) -> list[tuple[object, ...]]:
    """The grid of members and nodes."""
    rows = []
    for name, c in constants.items():
        for members, nodes in GRID:
            p = predict(c, members, 1000, Cluster(nodes, options.node_cores, options.gbit), remedies)
            dollars = p.seconds / 3600 * nodes * options.node_cores * options.price_core_hour
            seconds = (p.play_s, p.shard_s, p.head_s, p.network_s, p.seconds)
            counts = (f"{members:,}", f"{nodes:,}", f"{p.messages:,}", _bytes(p.bytes_down), _bytes(p.bytes_up))
            rates = (f"{p.at_play:.0%}", f"{p.env_steps / p.seconds:,.0f}", f"{dollars:.3g}")
            rows.append((name, *counts, *map(_time, seconds), *rates, p.next_bottleneck))
    return rows


CONSTANTS: dict[str, Callable[[Constants], str]] = {
    "a worker's environment step, with the policy": lambda c: f"{c.step_s * 1e6:.1f} µs",
    "a worker's time of drawing a member and starting its episode": lambda c: f"{c.worker_member_s * 1e6:.0f} µs",
    "training process: drawing a member": lambda c: f"{c.ask_member_s * 1e6:.2f} µs",
    "training process: a member's rank and part of the gradient": lambda c: f"{c.tell_member_s * 1e6:.2f} µs",
    "of this, its rank": lambda c: f"{c.rank_member_s * 1e6:.2f} µs",
    "training process: a generation, whatever its members": lambda c: f"{c.generation_s * 1e3:.2f} ms",
    "training process: a message through Ray and its answer": lambda c: f"{c.shard_s * 1e3:.2f} ms",
    "the same, for each member of its shard": lambda c: f"{c.shard_member_s * 1e6:.2f} µs",
    "training process: memory of a member's signs": lambda c: _bytes(round(c.member_bytes)),
    "mean weights and observation statistics": lambda c: _bytes(c.weights_bytes),
    "a shard and its outcome, without its members": lambda c: _bytes(c.shard_bytes),
}


def _time(seconds: float) -> str:
    if seconds >= 100:
        return f"{seconds:,.0f} s"
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{seconds * 1e3:.3g} ms"


def _bytes(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} B"


if __name__ == "__main__":
    report.run_script(main)
