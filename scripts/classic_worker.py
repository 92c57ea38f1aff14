"""Where a classic worker's time goes, and what its parts would cost done otherwise; one process, no Ray.

python scripts/classic_worker.py --out results/classic_worker_<hardware>_<yyyy-mm>
python scripts/classic_worker.py --out ... --render        # only table.md again

For every environment: the share of Gymnasium's own `step` (and `reset`) in the worker's time, with an untrained 64-64 policy
and observation statistics of one generation, as in training. Beside it the parts that were chosen by measurement: one forward
in NumPy against torch, and one member's noise out of the table against numbers drawn anew. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median

from _runs import append_csv, read_csv, run_script, write_environment

COLUMNS = ("env_id", "what", "round", "value", "unit")
SHARES = ("steps_per_s", "step_share", "reset_share", "rest_us_per_step")
PARTS = ("forward_numpy", "forward_torch", "noise_table", "noise_numpy", "noise_addressed")


def main() -> None:
    """Measure and write ``config.json``, ``environment.json``, ``runs.csv`` and ``table.md``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--env-ids", nargs="+", default=["CartPole-v1", "Hopper-v5", "HalfCheetah-v5", "Humanoid-v5"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of one measurement, about")
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    out: Path = options.out
    if not options.render:
        out.mkdir(parents=True, exist_ok=True)
        (out / "runs.csv").unlink(missing_ok=True)
        config = {name: getattr(options, name) for name in ("env_ids", "rounds", "seconds")}
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        write_environment(out)
        for env_id in options.env_ids:
            append_csv(out / "runs.csv", COLUMNS, measure(env_id, options.rounds, options.seconds))
    (out / "table.md").write_text(table(out))
    print((out / "table.md").read_text())


def measure(env_id: str, rounds: int, seconds: float) -> list[dict[str, object]]:
    """The rows of one environment."""
    import torch

    from es_flipout.agent import Agent
    from es_flipout.bench.timing import interleave, repeated
    from es_flipout.cluster.classic import ClassicStrategy, center_of, worker_spec
    from es_flipout.cluster.classic_worker import ClassicWorker, NumpyPolicy, Task
    from es_flipout.config import TrainConfig
    from es_flipout.envs import make_env
    from es_flipout.observation_norm import ObservationNorm
    from es_flipout.randomness import Address, Stream, normals
    from es_flipout.rollout import run, start_seeds

    torch.set_num_threads(1)
    config = TrainConfig(env_id=env_id, population_size=512, hidden=(64, 64), generations=1)
    env = make_env(env_id, 64, threads=1)
    agent = Agent(config, env.observation_space, env.action_space)
    strategy = ClassicStrategy(agent.module, config.population_size, config.sigma)
    assert isinstance(agent.norm, ObservationNorm)
    agent.norm.update(run(strategy.ask(), env, max_episode_steps=100).moments)
    env.close()
    population = strategy.ask()
    seeds = start_seeds(population, 1).numpy()
    spec = worker_spec(config, agent.module)
    worker = ClassicWorker(spec)
    worker.begin(center_of(population, agent.norm, None, 0))

    def task(members: int) -> Task:
        return Task(0, population.offsets[:members], population.signs[:members], seeds[:members])

    members = 4
    while (taken := worker.play(task(members)).seconds) < seconds / 2 and members < len(seeds):
        members = min(max(round(members * seconds / max(taken, 1e-6)), 2 * members), len(seeds))
    rows: list[dict[str, object]] = []

    def keep(what: str, number: int, value: float, unit: str) -> None:
        rows.append({"env_id": env_id, "what": what, "round": number, "value": value, "unit": unit})

    for number in range(rounds):
        plain, profiled = worker.play(task(members)), worker.play(task(members), profile=True)
        steps = int(profiled.lengths.sum())
        rest = profiled.seconds - profiled.step_seconds - profiled.reset_seconds
        keep("steps_per_s", number, int(plain.lengths.sum()) / plain.seconds, "env steps/s")
        keep("step_share", number, profiled.step_seconds / profiled.seconds, "of the worker's time")
        keep("reset_share", number, profiled.reset_seconds / profiled.seconds, "of the worker's time")
        keep("rest_us_per_step", number, 1e6 * rest / steps, "µs")

    import numpy as np

    policy = NumpyPolicy(spec.layers, spec.activation)
    policy.load(population.mean)
    x = torch.zeros(spec.layers[0][1])
    fresh = np.empty(policy.size, np.float32)

    def draw() -> None:
        # Philox has a counter: the cheapest way to begin at any place, member by member.
        bits = np.random.Philox(key=0, counter=1)
        np.random.Generator(bits).standard_normal(out=fresh, dtype=np.float32)

    one = torch.zeros(1, dtype=torch.int64)
    module = strategy.mean_module()
    with torch.inference_mode():
        parts = {
            "forward_numpy": policy,
            "forward_torch": lambda: module(x),
            "noise_table": lambda: worker._load(worker._center, 123, 1.0),  # pyright: ignore[reportArgumentType]
            "noise_numpy": draw,
            "noise_addressed": lambda: normals(Address(0), Stream.WEIGHT, one, policy.size),
        }
        timings = interleave({name: repeated(part, seconds / 20) for name, part in parts.items()}, rounds)
    for name, rates in timings.rates.items():
        for number, rate in enumerate(rates):
            keep(name, number, 1e6 / rate, "µs")
    return rows


def table(out: Path) -> str:
    """Medians (least to most) in Markdown."""
    rows = read_csv(out / "runs.csv")

    def cell(env_id: str, what: str, digits: int) -> str:
        values = [float(row["value"]) for row in rows if (row["env_id"], row["what"]) == (env_id, what)]
        return f"{median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"

    lines = [
        "One classic worker, one core, untrained 64-64 policies, no Ray: median of the rounds (least to most).",
        "",
        "| environment | env steps/s | share of Gymnasium's step | share of its reset | all else, µs a step |",
        "|---|---|---|---|---|",
    ]
    env_ids = list(dict.fromkeys(row["env_id"] for row in rows))
    for env_id in env_ids:
        cells = [cell(env_id, what, digits) for what, digits in zip(SHARES, (0, 3, 3, 1), strict=True)]
        lines.append(f"| {env_id} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "What was chosen, and what it would cost otherwise, µs. Noise is for one member; the window's time includes the whole"
        " exchange of the policy's parameters.",
        "",
        "| environment | forward, NumPy | forward, torch | noise, window of the table | noise, NumPy's generator |"
        " noise, by addresses |",
        "|---|---|---|---|---|---|",
    ]
    lines += [f"| {env_id} | " + " | ".join(cell(env_id, what, 1) for what in PARTS) + " |" for env_id in env_ids]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_script(main)
