"""Shared by the learning scripts: train many configurations and seeds side by side, and read the scores back."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from es_flipout.config import TrainConfig
from es_flipout.presets import preset
from es_flipout.runinfo import commit
from es_flipout.training.evaluate import evaluate
from es_flipout.training.metrics import Silent
from es_flipout.training.setup import make_trainer, resume_trainer
from scripts import report

Changes = Mapping[str, Mapping[str, Any]]  # options that differ from a preset, by the name of what has them


@dataclass(frozen=True)
class Job(report.Job):
    """One run: a name, which is shared by the seeds of a configuration, its configuration, and its run directory."""

    KEY = ("name", "seed")
    name: str
    config: TrainConfig
    run_dir: Path = Path()

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self.config.schedule.seed


class Printed(Silent):
    """Prints what must be seen."""

    def say(self, message: str) -> None:
        """Print a message."""
        print(message)


def train_and_score(job: Job) -> dict[str, report.Rows]:
    """Train one run, or continue it, and score the best and the last mean policy in the real environment."""
    began = (job.run_dir / "checkpoints").exists()
    trainer = resume_trainer(job.run_dir, Printed()) if began else make_trainer(job.config, job.run_dir, Printed())
    if not began:
        trainer.create()
    trainer.train()
    if trainer.interrupted:
        raise KeyboardInterrupt  # the run continues when the sweep is started again
    fixed: dict[str, object] = {"name": job.name, "env_id": job.config.task.env_id, "seed": job.seed}
    episodes = job.config.logging.evaluation_episodes
    best, last = (evaluate(trainer.trained_agent(which), job.config, episodes) for which in ("best", "last"))
    row = {
        **fixed,
        "env_steps": trainer.progress.env_steps,
        "generations": trainer.progress.generation,
        "train_s": round(trainer.progress.wall_s, 1),
        "mean_return": best.mean_return,
        "std_return": best.std_return,
        "median_return": best.median_return,
        "last_return": last.mean_return,
        "best_generation": trainer.progress.best_generation,
        "commit": commit(),
    }
    metrics = report.read_csv(job.run_dir / "metrics.csv").dropna(subset="score")
    columns = ["generation", "env_steps", "wall_s", "mean_return", "score"]
    return {"runs": [row], "curves": [{**fixed, **scored} for scored in metrics[columns].to_dict("records")]}


def sweep_parser(doc: str | None, envs: Iterable[str]) -> argparse.ArgumentParser:
    """The options of all sweeps."""
    parser = report.script_parser(doc)
    parser.add_argument("--envs", nargs="+", choices=list(envs), default=list(envs))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--processes", type=int, default=report.usable_cores(), help="runs side by side, one core each")
    return parser


def job(name: str, env_id: str, seed: int, **changes: Any) -> Job:
    """A run of a preset with other options, on one core (the runs of a sweep share the machine)."""
    return Job(name, preset(env_id).replace(seed=seed, threads=1, overlap=False, **changes))


def sweep(jobs: Iterable[Job], out: Path, processes: int) -> None:
    """Train what ``runs.csv`` does not hold yet, and add the configurations to ``config.json``.

    The run directories stay under ``runs/`` of the folder, which git ignores: an interrupted sweep continues its runs.
    """
    path = out / "config.json"
    jobs = [dataclasses.replace(job, run_dir=run_dir_of(out, job.name, job.seed)) for job in jobs]
    out.mkdir(parents=True, exist_ok=True)
    configs = report.read_json(path) if path.exists() else {}
    configs |= {job.name: job.config.flat() for job in jobs}
    report.write_json(path, {name: dict(sorted(config.items())) for name, config in sorted(configs.items())})
    report.run_missing(jobs, train_and_score, out, processes)
    report.write_environment(out)


def compare(doc: str | None, tasks: Changes, variants: Changes) -> Path:
    """The command line of a script that trains every variant on every task, and does so; returns the results folder."""
    options = report.parse(sweep_parser(doc, tasks))
    if not options.render:
        jobs = [
            job(f"{env_id}: {name}", env_id, seed, **{**tasks[env_id], **changes})
            for seed in options.seeds
            for env_id in options.envs
            for name, changes in variants.items()
        ]
        sweep(jobs, options.out, options.processes)
    return options.out


def plot_comparison(out: Path, tasks: Changes, variants: Changes, title: str = "{}", band: int | None = None) -> None:
    """``figure.png``: a panel for each task, where every variant has a color; for ``band`` see ``plot_seeds``."""
    curves = read_curves(out)
    envs = [env_id for env_id in tasks if env_id in set(curves["env_id"])]
    figure, axes = report.panels(len(envs), 4.5, 3.6)
    for axis, env_id in zip(axes, envs, strict=True):
        for color, name in enumerate(variants):
            own = curves[curves["name"] == f"{env_id}: {name}"]
            if len(own):
                report.plot_seeds(axis, own, "million_steps", "score", f"C{color}", name, band)
        axis.set_title(title.format(env_id), fontsize=10)
        axis.set_xlabel("million env steps")
    axes[0].set_ylabel("score of the mean policy")
    axes[-1].legend(fontsize=8)
    report.save(figure, out)


def run_dir_of(out: Path, name: str, seed: int) -> Path:
    """The directory of a run of a sweep."""
    return out / "runs" / re.sub(r"[^\w.-]+", "_", f"{name}_seed{seed}")


def final_scores(out: Path) -> dict[str, list[float]]:
    """The scores of every name's seeds, worst first."""
    return report.read_csv(out / "runs.csv").groupby("name")["mean_return"].apply(sorted).to_dict()


def listed(scores: Iterable[float]) -> str:
    """The scores of the seeds, for a table."""
    return ", ".join(f"{score:,.0f}" for score in scores)


def read_curves(out: Path) -> report.Frame:
    """``curves.csv`` with environment steps in millions."""
    curves = report.read_csv(out / "curves.csv")
    return curves.assign(million_steps=curves["env_steps"] / 1e6)
