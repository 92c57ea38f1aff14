"""The engine on Ray against one process with as many threads, side by side on this machine.

python scripts/speed/sharding.py --out results/sharding_<hardware>_<yyyy-mm>     # about 3 minutes
python scripts/speed/sharding.py --out ... --render                              # only table.md

Both train the same generations (bitwise identical, which is checked), with a learning rate so small that the policy stays the
same. Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from es_flipout.bench.timing import Measure, Measured, interleave, timed
from es_flipout.config import TrainConfig
from es_flipout.runinfo import commit
from es_flipout.training.setup import make_trainer
from es_flipout.training.trainer import Trainer
from scripts import report


def main() -> None:
    """Measure, and write the table."""
    parser = report.script_parser(__doc__)
    parser.add_argument("--env-ids", nargs="+", default=["HalfCheetah-v5", "Hopper-v5"])
    parser.add_argument("--populations", nargs="+", type=int, default=[64, 128, 512])
    parser.add_argument("--workers", type=int, default=report.usable_cores())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one measurement, at least")
    options = report.parse(parser)
    if not options.render:
        report.begin(options.out, report.config_of(options), fresh=True)
        for env_id in options.env_ids:
            for population in options.populations:
                report.append_csv(options.out / "runs.csv", rounds_of(env_id, population, options))
    report.write_table(options.out, table(options.out))


def rounds_of(env_id: str, population: int, options: argparse.Namespace) -> report.Rows:
    """Environment steps per second of both, one row for each round."""
    workers: int = options.workers
    config = TrainConfig.of(
        env_id,
        population_size=population,
        hidden=(64, 64),
        learning_rate=1e-12,
        generations=2**31,
        threads=workers,
        compile="off",
    )
    ways = {"alone": config, "sharded": config.replace(backend="ray", workers=workers, threads=1)}
    trainers = {name: make_trainer(way) for name, way in ways.items()}
    try:
        first = {name: trainer.generation().episode_returns for name, trainer in trainers.items()}
        assert torch.equal(first["alone"], first["sharded"]), f"{env_id}: the returns differ"
        measures = {name: generations_of(trainer, options.seconds) for name, trainer in trainers.items()}
        timings = interleave(measures, options.rounds)
    finally:
        for trainer in trainers.values():
            trainer.close()
    fixed = {"env_id": env_id, "population": population, "workers": workers, "threads_alone": workers}
    rates = {name: [round(rate) for rate in timings.rates[name]] for name in ways}
    return [
        {**fixed, "round": number, **{name: rates[name][number] for name in ways}, "commit": commit()}
        for number in range(options.rounds)
    ]


def generations_of(trainer: Trainer, seconds: float) -> Measure:
    """Measures whole generations for at least so many seconds."""

    def measure() -> Measured:
        parts: list[Measured] = []
        while sum(part.seconds for part in parts) < seconds:
            parts.append(timed(lambda: trainer.generation().env_steps))
        return Measured(sum(part.work for part in parts), sum(part.seconds for part in parts))

    return measure


def table(out: Path) -> str:
    """Medians and ratios, in Markdown."""
    rows = []
    for (env_id, population), own in report.groups(report.read_csv(out / "runs.csv"), "env_id", "population"):
        alone = f"{median(own['alone']):,.0f} ({own['threads_alone'].iloc[0]} threads)"
        sharded = f"{median(own['sharded']):,.0f} ({own['workers'].iloc[0]} workers)"
        rows.append((env_id, population, alone, sharded, report.spread(own["sharded"] / own["alone"], ".2f")))
    return report.markdown(
        "environment | population | one process, env steps/s | Ray workers of one thread, env steps/s | Ray ÷ one process",
        rows,
    )


if __name__ == "__main__":
    report.run_script(main)
