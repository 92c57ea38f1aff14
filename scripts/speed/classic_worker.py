"""How a classic worker spends its time, and what its parts would cost done in other ways; one process, no Ray.

python scripts/speed/classic_worker.py --out results/classic_worker_<hardware>_<yyyy-mm>
python scripts/speed/classic_worker.py --out ... --render        # only table.md

For every environment: the share of Gymnasium's own ``step`` and ``reset`` in the worker's time, with an untrained 64-64 policy
and the observation statistics of one generation, as in training. Beside it the parts that were chosen by measurement: one forward
in NumPy against torch, and one member's noise from the table against freshly drawn numbers. Nothing else should run meanwhile.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
from torch import nn

from es_flipout.bench.classic.player import center_of, worker_spec
from es_flipout.bench.classic.strategy import ClassicStrategy, TablePopulation
from es_flipout.bench.classic.worker import Center, ClassicWorker, NumpyPolicy, Task, WorkerSpec
from es_flipout.bench.timing import interleave, repeated
from es_flipout.config import TrainConfig
from es_flipout.policies.observation_norm import ObservationNorm
from es_flipout.randomness import Address, Stream, normals
from es_flipout.rollout.builder import local_player, make_strategy
from es_flipout.rollout.episodes import MOMENT_JOBS, Episodes, start_seeds
from scripts import report

SHARES = {"steps_per_s": 0, "step_share": 3, "reset_share": 3, "rest_us_per_step": 1}  # digits to show
PARTS = ("forward_numpy", "forward_torch", "noise_table", "noise_numpy", "noise_addressed")


def main() -> None:
    """Measure, and write the table."""
    parser = report.script_parser(__doc__)
    parser.add_argument("--env-ids", nargs="+", default=["CartPole-v1", "Hopper-v5", "HalfCheetah-v5", "Humanoid-v5"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of one measurement, about")
    options = report.parse(parser)
    out: Path = options.out
    if not options.render:
        torch.set_num_threads(1)
        report.begin(out, report.config_of(options), fresh=True)
        for env_id in options.env_ids:
            report.append_csv(out / "runs.csv", measure(env_id, options.rounds, options.seconds))
    report.write_table(out, table(out))


def measure(env_id: str, rounds: int, seconds: float) -> report.Rows:
    """The rows of one environment."""
    config = TrainConfig.of(env_id, population_size=512, hidden=(64, 64), device="cpu", threads=1, overlap=False)
    agent, player = local_player(config, slots=64)
    strategy = make_strategy(config, agent.module, kind=ClassicStrategy)
    population = strategy.ask()
    assert isinstance(agent.norm, ObservationNorm)
    assert isinstance(population, TablePopulation)
    seeds = start_seeds(population, 1)
    agent.norm.update(player.play(population, Episodes(seeds, step_cap=100, moment_jobs=MOMENT_JOBS)).moments)
    player.close()
    spec, center = worker_spec(config, agent.module), center_of(population, agent.norm, None, 0)
    measured = shares_of_time(spec, center, population, seeds.numpy(), rounds, seconds)
    measured |= times_of_parts(spec, center, strategy.mean_module(), rounds, seconds)
    return [
        {"env_id": env_id, "what": what, "round": number, "value": value, "unit": unit}
        for (what, unit), values in measured.items()
        for number, value in enumerate(values)
    ]


def shares_of_time(
    spec: WorkerSpec, center: Center, population: TablePopulation, seeds: np.ndarray, rounds: int, seconds: float
) -> dict[tuple[str, str], list[float]]:
    """How a worker spends its time on as many members as take about so many seconds."""
    worker = ClassicWorker(spec)
    worker.begin(center)

    def task(members: int) -> Task:
        return Task(0, population.offsets[:members], population.signs[:members], seeds[:members])

    members = 4
    while (taken := worker.play(task(members)).seconds) < seconds / 2 and members < len(seeds):
        members = min(max(round(members * seconds / max(taken, 1e-6)), 2 * members), len(seeds))
    measured: dict[tuple[str, str], list[float]] = {}
    share = "of the worker's time"
    for _ in range(rounds):
        plain, profiled = worker.play(task(members)), worker.play(task(members), profile=True)
        rest = profiled.seconds - profiled.step_seconds - profiled.reset_seconds
        for key, value in {
            ("steps_per_s", "env steps/s"): int(plain.lengths.sum()) / plain.seconds,
            ("step_share", share): profiled.step_seconds / profiled.seconds,
            ("reset_share", share): profiled.reset_seconds / profiled.seconds,
            ("rest_us_per_step", "µs"): 1e6 * rest / int(profiled.lengths.sum()),
        }.items():
            measured.setdefault(key, []).append(value)
    return measured


def times_of_parts(
    spec: WorkerSpec, center: Center, module: nn.Module, rounds: int, seconds: float
) -> dict[tuple[str, str], list[float]]:
    """Microseconds of a forward, and of drawing one member's noise, in different ways."""
    worker, policy = ClassicWorker(spec), NumpyPolicy(spec.layers, spec.activation)
    policy.load(center.mean)
    x, one = torch.zeros(spec.layers[0][1]), torch.zeros(1, dtype=torch.int64)
    fresh = np.empty(policy.size, np.float32)

    def draw() -> None:
        # Philox has a counter: the cheapest way to start anywhere, member by member.
        bits = np.random.Philox(key=0, counter=1)
        np.random.Generator(bits).standard_normal(out=fresh, dtype=np.float32)

    parts = {
        "forward_numpy": policy,
        "forward_torch": lambda: module(x),
        "noise_table": lambda: worker._load(center, 123, 1.0),
        "noise_numpy": draw,
        "noise_addressed": lambda: normals(Address(0), Stream.WEIGHT, one, policy.size),
    }
    with torch.inference_mode():
        timings = interleave({name: repeated(part, seconds / 20) for name, part in parts.items()}, rounds)
    return {(name, "µs"): [1e6 / rate for rate in rates] for name, rates in timings.rates.items()}


def table(out: Path) -> str:
    """Medians (least to most) in Markdown."""
    rows = report.read_csv(out / "runs.csv")

    def cells(own: dict[str, list[float]], digits: dict[str, int]) -> list[str]:
        return [report.spread(own[what], f",.{number}f") for what, number in digits.items()]

    by_env = {
        env_id: {what: list(values["value"]) for what, values in report.groups(own, "what")}
        for env_id, own in report.groups(rows, "env_id")
    }
    shares = "environment | env steps/s | share of Gymnasium's step | share of its reset | all else, µs a step"
    parts = "environment | forward, NumPy | forward, torch | noise, window of the table | noise, NumPy's generator | "
    parts += "noise, by addresses"
    digits = {part: 1 for part in PARTS}
    return (
        "One classic worker, one core, untrained 64-64 policies, no Ray: median of the rounds (least to most).\n\n"
        + report.markdown(shares, ((env_id, *cells(own, SHARES)) for env_id, own in by_env.items()))
        + "\nWhat was chosen, and what it would cost otherwise, µs. Noise is for one member; the window's time includes the "
        "whole exchange of the policy's parameters.\n\n"
        + report.markdown(parts, ((env_id, *cells(own, digits)) for env_id, own in by_env.items()))
    )


if __name__ == "__main__":
    report.run_script(main)
