"""The sharded engine on Ray against one process with as many threads, side by side on this machine.

python scripts/sharding.py --out results/sharding_<hardware>_<yyyy-mm>     # about 3 minutes
python scripts/sharding.py --out ... --render                              # only table.md again

Both train the same generations (the same bits, which is checked), with a learning rate so small that the policy stays the
same. Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
from collections import defaultdict
from pathlib import Path
from statistics import median

COLUMNS = ("env_id", "population", "workers", "threads_alone", "round", "alone", "sharded", "commit")


def main() -> None:
    """Measure and write ``runs.csv``, ``config.json``, ``environment.json`` and ``table.md``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--env-ids", nargs="+", default=["HalfCheetah-v5", "Hopper-v5"])
    parser.add_argument("--populations", nargs="+", type=int, default=[64, 128, 512])
    parser.add_argument("--workers", type=int, help="by default one for each core")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one measurement, at least")
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    if not options.render:
        measure(options)
    (options.out / "table.md").write_text(table(options.out))


def measure(options: argparse.Namespace) -> None:
    """All environments and populations, round by round."""
    from _runs import write_environment

    from es_flipout.envs.mujoco_cpu import usable_cores

    workers = options.workers or usable_cores()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = [
        row
        for env_id in options.env_ids
        for population in options.populations
        for row in rounds_of(env_id, population, workers, options.rounds, options.seconds)
    ]
    with (options.out / "runs.csv").open("w", newline="") as file:
        writer = csv.DictWriter[str](file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    config = {name: value for name, value in vars(options).items() if name not in ("out", "render")}
    (options.out / "config.json").write_text(json.dumps(config | {"workers": workers}, indent=2) + "\n")
    write_environment(options.out)


def rounds_of(env_id: str, population: int, workers: int, rounds: int, seconds: float) -> list[dict[str, object]]:
    """Environment steps per second of both, a row for each round."""
    import torch

    from es_flipout.bench.timing import Measure, Measured, interleave, timed
    from es_flipout.config import TrainConfig
    from es_flipout.runinfo import commit
    from es_flipout.trainer import Trainer

    config = TrainConfig(
        env_id=env_id,
        population_size=population,
        hidden=(64, 64),
        learning_rate=1e-12,
        generations=2**31,
        threads=workers,
    )
    ways = {"alone": config, "sharded": dataclasses.replace(config, backend="ray", workers=workers, threads=1)}
    trainers = {name: Trainer(way) for name, way in ways.items()}
    try:
        first = {name: trainer.generation().episode_returns for name, trainer in trainers.items()}
        assert torch.equal(first["alone"], first["sharded"]), f"{env_id}: the returns differ"

        def measure_of(trainer: Trainer) -> Measure:
            def measure() -> Measured:
                parts: list[Measured] = []
                while sum(part.seconds for part in parts) < seconds:
                    parts.append(timed(lambda: trainer.generation().env_steps))
                return Measured(sum(part.work for part in parts), sum(part.seconds for part in parts))

            return measure

        timings = interleave({name: measure_of(trainer) for name, trainer in trainers.items()}, rounds)
    finally:
        for trainer in trainers.values():
            trainer.close()
    made = commit()
    rows: list[dict[str, object]] = [
        {
            "env_id": env_id,
            "population": population,
            "workers": workers,
            "threads_alone": workers,
            "round": number,
            **{name: round(rates[number]) for name, rates in timings.rates.items()},
            "commit": made,
        }
        for number in range(rounds)
    ]
    return rows


def table(out: Path) -> str:
    """Medians and spread, in Markdown."""
    points: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    with (out / "runs.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            points[row["env_id"], row["population"]].append(row)
    lines = [
        "| environment | population | one process, env steps/s | Ray workers of one thread, env steps/s | Ray ÷ one process |",
        "|---|---|---|---|---|",
    ]
    for (env_id, population), rows in points.items():
        alone, sharded = ([float(row[name]) for row in rows] for name in ("alone", "sharded"))
        ratios = [b / a for a, b in zip(alone, sharded, strict=True)]
        threads, workers = f"{rows[0]['threads_alone']} threads", f"{rows[0]['workers']} workers"
        lines.append(
            f"| {env_id} | {population} | {median(alone):,.0f} ({threads}) | {median(sharded):,.0f} ({workers}) | "
            f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
