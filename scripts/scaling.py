"""Scaling on paper: bytes, time and cost of a generation, up to a million members and a thousand nodes.

python scripts/scaling.py --out results/scaling_<hardware>_<yyyy-mm>     # about four minutes; nothing else should run
python scripts/scaling.py --out ... --render                             # only table.md again (prices, network, cores of a node)
python scripts/scaling.py --quick                                        # seconds, into runs/scaling_quick

The model is a sum of measured constants (``Constants``): what a worker needs for a step and for a member, what the process that
trains needs for a member and for a share. Nothing in it is fitted to a training run. It is then checked against training with one
and two Ray workers on this machine, and only after that used for clusters that are not here. Assumed, not measured: the
network, the price, and that cores of a node do not slow each other down.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pickle
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _runs import read_csv, run_script, write_environment

from es_flipout.config import TrainConfig
from es_flipout.errors import UserError
from es_flipout.rollout import MOMENT_BLOCK, MOMENT_JOBS

CHECK_COLUMNS = ("task", "workers", "population", "generation", "env_steps", "seconds")
GRID = ((4096, 1), (4096, 16), (65_536, 16), (65_536, 128), (1_000_000, 128), (1_000_000, 1000))  # members, nodes
FEWEST_MEMBERS = 32  # of a share, see es_flipout/cluster/sharded.py


@dataclass(frozen=True)
class Task:
    """What is trained: one episode of ``episode_steps`` steps for each member; ``kwargs`` of the environment."""

    env_id: str
    hidden: tuple[int, ...]
    episode_steps: int
    kwargs: tuple[tuple[str, Any], ...] = ()

    def config(self, **changes: Any) -> TrainConfig:
        """Its configuration."""
        kwargs = json.dumps({"max_episode_steps": self.episode_steps} | dict(self.kwargs))
        fixed = {"population_size": 256, "generations": 1, "device": "cpu", "env_kwargs": kwargs, "threads": 1}
        return TrainConfig(env_id=self.env_id, hidden=self.hidden, **(fixed | changes))


# Of equal length, as the model has it: an untrained Humanoid falls at once, and a few slots that still live cost as much as many.
TASKS = (
    Task("HalfCheetah-v5", (64, 64), 1000),
    Task("Humanoid-v5", (256, 256), 1000, (("terminate_when_unhealthy", False),)),
)


@dataclass(frozen=True)
class Constants:
    """Seconds and bytes, all measured on one machine, with one thread.

    Attributes:
        step_s: of a worker, for one environment step with its policy.
        worker_member_s: of a worker, for drawing a member's signs and starting its episode.
        ask_member_s, tell_member_s: of the process that trains, for a member: its signs and start state; its part of
            the gradient.
        rank_member_s: the part of ``tell_member_s`` that is ranks.
        generation_s: of the process that trains, for a generation, whatever its members.
        share_s: of the process that trains, for handing out a share and taking in its outcome.
        share_member_s: the same for each member of the share.
        add_s: of the process that trains, for adding one number to a sum.
        member_bytes: memory of a member's signs.
        weights_bytes: mean weights and observation statistics.
        share_bytes: of a share and its outcome, without what grows with its members.
        observations, weights: sizes.
    """

    step_s: float
    worker_member_s: float
    ask_member_s: float
    tell_member_s: float
    rank_member_s: float
    generation_s: float
    share_s: float
    share_member_s: float
    add_s: float
    member_bytes: float
    weights_bytes: int
    share_bytes: int
    observations: int
    weights: int


@dataclass(frozen=True)
class Cluster:
    """Nodes with one worker for each core; ``gbit`` is the network of the machine that trains."""

    nodes: int
    cores: int
    gbit: float


@dataclass(frozen=True)
class Prediction:
    """One generation: seconds of its parts (``play_s``: of the worker with most to do), and bytes of the training process."""

    workers: int
    shares: int
    play_s: float
    head_s: float
    share_s: float
    network_s: float
    bytes_down: int
    bytes_up: int
    env_steps: int

    @property
    def seconds(self) -> float:
        """Of the generation: shares are handled while others play, all else waits."""
        return self.head_s + self.network_s + max(self.play_s, self.share_s)

    @property
    def at_play(self) -> float:
        """Part of the time in which the workers play."""
        return self.play_s / self.seconds

    @property
    def next_bottleneck(self) -> str:
        """What costs most beside playing."""
        parts = {"update in one process": self.head_s, "handling of shares": self.share_s, "network": self.network_s}
        return max(parts, key=lambda name: parts[name])


def predict(c: Constants, members: int, episode_steps: float, cluster: Cluster, remedies: bool = False) -> Prediction:
    """A generation of ``members`` with one episode each.

    Args:
        c: what was measured.
        members: ``P``.
        episode_steps: of every episode.
        cluster: where.
        remedies: as it would be if every node summed its own members' part of the gradient and handed its shares to its own
            cores, so that the process that trains deals with nodes and no longer with members and cores.
    """
    workers = max(min(cluster.nodes * cluster.cores, members // FEWEST_MEMBERS), 1)
    share = share_size(members, workers)
    shares = math.ceil(members / share)
    turns = math.ceil(shares / workers)
    play = turns * share * (episode_steps * c.step_s + c.worker_member_s)
    observed = math.ceil(min(members, MOMENT_JOBS) / MOMENT_BLOCK) * 16 * c.observations
    down, up = cluster.nodes * c.weights_bytes + 8 * members, 16 * members + observed
    head = c.generation_s + members * (c.ask_member_s + c.tell_member_s)
    units = shares
    if remedies:
        units = min(2 * cluster.nodes, shares)
        play += turns * share * (c.tell_member_s - c.rank_member_s)
        head = c.generation_s + members * c.rank_member_s + cluster.nodes * c.weights * c.add_s
        down += 4 * members  # their ranks
        up += 4 * cluster.nodes * c.weights  # their sums
    traffic = down + up + units * c.share_bytes
    return Prediction(
        workers=workers,
        shares=shares,
        play_s=play,
        head_s=head,
        share_s=units * c.share_s + members * c.share_member_s,
        network_s=traffic * 8 / (cluster.gbit * 1e9),
        bytes_down=down + units * c.share_bytes // 2,
        bytes_up=up + units * c.share_bytes // 2,
        env_steps=round(members * episode_steps),
    )


def share_size(members: int, workers: int) -> int:
    """Members of a share, as the engine chooses it: two shares for every worker, in whole blocks of moments."""
    even = math.ceil(members / workers)
    wanted = max(math.ceil(even / 2), min(FEWEST_MEMBERS, even))
    return math.ceil(wanted / MOMENT_BLOCK) * MOMENT_BLOCK


# Measuring


def main() -> None:
    """Measure, check, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="short episodes, few members; the numbers mean nothing")
    parser.add_argument(
        "--tasks", nargs="+", choices=[task.env_id for task in TASKS], default=[task.env_id for task in TASKS]
    )
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2], help="of the check")
    parser.add_argument("--node-cores", type=int, default=16, help="cores of a node (assumed)")
    parser.add_argument("--gbit", type=float, default=10.0, help="network of the machine that trains (assumed)")
    parser.add_argument("--price-core-hour", type=float, default=0.04, help="dollars (assumed)")
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    if options.out is None:
        if not options.quick:
            raise UserError("say where the results go: --out DIRECTORY (or --quick)")
        options.out = Path("runs/scaling_quick")
    if not options.render:
        measure_all(options)
    (options.out / "table.md").write_text(table(options), encoding="utf-8")
    if options.quick:
        print(table(options))


def measure_all(options: argparse.Namespace) -> None:
    """Write ``constants.json``, ``runs.csv`` (the check) and ``environment.json``."""
    from _paper import append

    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    tasks = [
        dataclasses.replace(task, episode_steps=20 if options.quick else 200)
        for task in TASKS
        if task.env_id in options.tasks
    ]
    if options.quick:
        tasks = tasks[:1]
    constants = {task.env_id: dataclasses.asdict(measure(task, options.quick)) for task in tasks}
    (options.out / "constants.json").write_text(json.dumps(constants, indent=2) + "\n")
    (options.out / "runs.csv").unlink(missing_ok=True)
    for task in tasks:
        for workers in options.workers:
            population = 128 if options.quick else 256
            played = train(task, workers, population, 3 if options.quick else 5)
            values = [(task.env_id, workers, population, i, *steps_seconds) for i, steps_seconds in enumerate(played)]
            append(options.out / "runs.csv", [dict(zip(CHECK_COLUMNS, v, strict=True)) for v in values])
            print(
                f"{task.env_id}, {workers} workers: {statistics.median(s for _, s in played):.3f} s a generation",
                flush=True,
            )
    write_environment(options.out)


def measure(task: Task, quick: bool = False) -> Constants:
    """The constants of a task on this machine."""
    from es_flipout.agent import Agent
    from es_flipout.envs import make_env

    config = task.config()
    env = make_env(task.env_id, 1)
    agent = Agent(config, env.observation_space, env.action_space, env.observation_shape)
    env.close()
    weights = {name: value.numpy() for name, value in agent.state_dict().items()}
    observations = env.observation_space.shape[0]
    handled = {members: handling(observations, members, weights, 8 if quick else 64) for members in (32, 512)}
    share_member = slope(handled)
    total, part = torch.zeros(1 << 20), torch.ones(1 << 20)
    return Constants(
        **worker_constants(task, weights, 64 if quick else 256),
        **update_constants(config, agent.module, (256, 1024) if quick else (4096, 32_768)),
        share_s=max(handled[32] - 32 * share_member, 0.0),
        share_member_s=share_member,
        add_s=best(lambda: total.add_(part), 5) / len(total),
        weights_bytes=sum(value.nbytes for value in weights.values()),
        observations=observations,
        weights=sum(parameter.numel() for parameter in agent.module.parameters()),
    )


def worker_constants(task: Task, weights: Any, members: int) -> dict[str, Any]:
    """Of a worker in this process: from shares of short and of longer episodes, whose difference is nothing but steps."""
    from es_flipout.cluster.sharded import Generation, ShardWorker, Share

    config = task.config()
    worker = ShardWorker(config, members, 1)
    share = Share(0, torch.arange(members)[:, None].numpy(), members)
    seconds, lengths, overhead = [], [], 0
    for cap in (5, task.episode_steps):
        generation = Generation(0, config.sigma, 1, cap, True, True)
        seconds.append(best(lambda g=generation: worker.play(g, share, weights), 3) / members)
        outcome = worker.play(generation, share, weights)
        lengths.append(float(outcome.lengths.mean()))
        grows = share.seeds.nbytes + outcome.returns.nbytes + outcome.lengths.nbytes
        grows += outcome.total.nbytes + outcome.squares.nbytes
        overhead = len(pickle.dumps((generation, share, outcome))) - grows
    step = (seconds[1] - seconds[0]) / (lengths[1] - lengths[0])
    return {
        "step_s": step,
        "worker_member_s": max(seconds[0] - lengths[0] * step, 0.0),
        "share_bytes": overhead,
    }


def update_constants(config: TrainConfig, module: torch.nn.Module, sizes: tuple[int, int]) -> dict[str, Any]:
    """Of the process that trains, from a small and a large population."""
    from es_flipout.bench.forward import stored_bytes
    from es_flipout.shaping import centered_ranks
    from es_flipout.strategy import EvolutionStrategy

    asks, tells, ranks, member_bytes = {}, {}, {}, 0.0
    for members in sizes:
        strategy = EvolutionStrategy(module, members, config.sigma, config.perturbation)
        returns = torch.randn(members, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        asks[members] = best(lambda s=strategy: _ask(s), 3)
        tells[members] = min(_tell_seconds(strategy, returns) for _ in range(4))
        ranks[members] = best(lambda r=returns: centered_ranks(r), 3)
        member_bytes = stored_bytes(strategy.ask()) / members
    ask, tell = slope(asks), slope(tells)
    return {
        "ask_member_s": ask,
        "tell_member_s": tell,
        "rank_member_s": slope(ranks),
        "generation_s": max(asks[sizes[0]] + tells[sizes[0]] - sizes[0] * (ask + tell), 0.0),
        "member_bytes": member_bytes,
    }


def _ask(strategy: Any) -> Any:
    from es_flipout.rollout import start_seeds

    population = strategy.ask()
    start_seeds(population, 1)
    return population


def _tell_seconds(strategy: Any, returns: Any) -> float:
    strategy.ask()
    started = time.perf_counter()
    strategy.tell(returns)
    return time.perf_counter() - started


def handling(observations: int, members: int, weights: Any, shares: int) -> float:
    """Seconds of the training process for a share of ``members``: handed out, answered at once, taken in."""
    from es_flipout.cluster.connect import Connection
    from es_flipout.cluster.pool import Pool
    from es_flipout.cluster.sharded import Generation, Outcome, Share

    blocks = torch.zeros(members // MOMENT_BLOCK, observations, dtype=torch.float64).numpy()
    returns = torch.zeros(members, 1, dtype=torch.float64).numpy()
    outcome = Outcome(returns, returns.astype("int64"), 1.0, blocks, blocks, 0, 0.0)

    class Echo:  # local: Ray then sends it to its workers, which cannot import scripts
        def __init__(self, outcome: Any) -> None:
            self.outcome = outcome

        def ready(self) -> None:
            pass

        def play(self, generation: Any, share: Any, weights: Any) -> Any:
            return self.outcome

    connection = Connection(None, 2)
    try:
        actor = connection.ray.remote(num_cpus=0.5)(Echo)
        pool = Pool(connection, lambda: actor.remote(outcome), 2)
        generation = Generation(0, 0.1, 1, None, True, True)
        work = [Share(i, returns.astype("int64"), members) for i in range(shares)]

        def once() -> None:
            reference = connection.ray.put(weights)
            pool.work(work, lambda actor, share: actor.play.remote(generation, share, reference))

        return best(once, 5) / shares
    finally:
        connection.close()


def train(task: Task, workers: int, population: int, generations: int) -> list[tuple[int, float]]:
    """Environment steps and seconds of generations of training with Ray workers; the first, a warm-up, is left out."""
    from es_flipout.trainer import Trainer

    config = task.config(
        population_size=population, generations=generations + 1, backend="ray", workers=workers, score_every=1 << 30
    )
    trainer = Trainer(config)
    played = []
    try:
        for _ in range(generations + 1):
            started = time.perf_counter()
            env_steps = trainer.generation().env_steps
            played.append((env_steps, time.perf_counter() - started))
    finally:
        trainer.close()
    return played[1:]


def best(call: Callable[[], object], times: int) -> float:
    """The shortest of a few calls after one that does not count: what the work needs where nothing disturbs it."""
    call()
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def slope(seconds: dict[int, float]) -> float:
    """Seconds for one member more, between the smallest and the largest measured."""
    few, many = min(seconds), max(seconds)
    return max((seconds[many] - seconds[few]) / (many - few), 0.0)


# Table


def table(options: argparse.Namespace) -> str:
    """The constants, the check, and the predictions, in Markdown."""
    named = {name: Constants(**c) for name, c in json.loads((options.out / "constants.json").read_text()).items()}
    lines = [
        "**Measured on one core**",
        "",
        "| | " + " | ".join(named) + " |",
        "|---|" + "---|" * len(named),
    ]
    for label, value in _CONSTANTS.items():
        lines.append(f"| {label} | " + " | ".join(value(c) for c in named.values()) + " |")
    lines += [
        "",
        "**The model against training with Ray workers on this machine** (generations after the first; median, least to most)",
        "",
        "| task | workers | members | steps an episode | predicted | measured | measured ÷ predicted |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = read_csv(options.out / "runs.csv")
    for name, workers, population in dict.fromkeys((r["task"], int(r["workers"]), int(r["population"])) for r in rows):
        own = [r for r in rows if (r["task"], r["workers"], r["population"]) == (name, str(workers), str(population))]
        seconds = [float(r["seconds"]) for r in own]
        steps = statistics.mean(int(r["env_steps"]) for r in own) / population
        predicted = predict(named[name], population, steps, Cluster(1, workers, math.inf)).seconds
        measured = statistics.median(seconds)
        lines.append(
            f"| {name} | {workers} | {population} | {steps:.0f} | {_time(predicted)} | {_time(measured)} "
            f"({_time(min(seconds))} to {_time(max(seconds))}) | {measured / predicted:.2f} |"
        )
    for remedies in (False, True):
        title = "With both remedies (not built)" if remedies else "As it is"
        lines += [
            "",
            f"**{title}**: episodes of 1,000 steps, nodes of {options.node_cores} cores, {options.gbit:g} Gbit/s and "
            f"${options.price_core_hour:g} for a core-hour (the last three are assumed)",
            "",
            "| task | members | nodes | shares | down | up | playing | shares handled | update | network | generation "
            "| time at play | env steps/s | dollars a generation | next bottleneck |",
            "|---|" + "---|" * 14,
        ]
        for name, c in named.items():
            for members, nodes in GRID:
                p = predict(c, members, 1000, Cluster(nodes, options.node_cores, options.gbit), remedies)
                dollars = p.seconds / 3600 * nodes * options.node_cores * options.price_core_hour
                cells = [
                    f"{members:,}",
                    f"{nodes:,}",
                    f"{p.shares:,}",
                    _bytes(p.bytes_down),
                    _bytes(p.bytes_up),
                    *(_time(s) for s in (p.play_s, p.share_s, p.head_s, p.network_s, p.seconds)),
                    f"{p.at_play:.0%}",
                    f"{p.env_steps / p.seconds:,.0f}",
                    f"{dollars:.3g}",
                    p.next_bottleneck,
                ]
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


_CONSTANTS: dict[str, Callable[[Constants], str]] = {
    "a worker's environment step, with the policy": lambda c: f"{c.step_s * 1e6:.1f} µs",
    "a worker's share of drawing a member and starting its episode": lambda c: f"{c.worker_member_s * 1e6:.0f} µs",
    "training process: drawing a member": lambda c: f"{c.ask_member_s * 1e6:.2f} µs",
    "training process: a member's rank and part of the gradient": lambda c: f"{c.tell_member_s * 1e6:.2f} µs",
    "of this, its rank": lambda c: f"{c.rank_member_s * 1e6:.2f} µs",
    "training process: a generation, whatever its members": lambda c: f"{c.generation_s * 1e3:.2f} ms",
    "training process: a share through Ray, there and back": lambda c: f"{c.share_s * 1e3:.2f} ms",
    "the same, for each of its members": lambda c: f"{c.share_member_s * 1e6:.2f} µs",
    "training process: memory of a member's signs": lambda c: _bytes(round(c.member_bytes)),
    "mean weights and observation statistics": lambda c: _bytes(c.weights_bytes),
    "a share and its outcome, without its members": lambda c: _bytes(c.share_bytes),
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
    run_script(main)
