"""What ``train`` and ``resume`` have in common: a training run in a terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from es_flipout.config import TrainConfig
from es_flipout.training.evaluate import evaluate
from es_flipout.training.run_directory import write_evaluation
from es_flipout.training.setup import Build, build_engine
from es_flipout.training.trainer import Trainer


def build_for(config: TrainConfig) -> Build:
    """Return the function that builds the parts of a run: the engine's, or that of the classic baseline."""
    if config.compute.worker_kind == "classic":
        from es_flipout.bench.classic.player import build_classic

        return build_classic
    return build_engine


def train_to_the_end(trainer: Trainer, run_dir: Path, console: Console) -> int:
    """Train, score in the single Gymnasium environment, and print the run directory; return the exit code."""
    try:
        trainer.train()
    finally:
        trainer.close()
    if trainer.interrupted:
        at = trainer.progress
        print(f"stopped after generation {at.generation} ({at.env_steps:,} environment steps)")
        print(f"continue with: es-flipout resume {run_dir}")
        return 0
    config = trainer.config
    env_id, episodes = config.task.env_id, config.logging.evaluation_episodes
    try:
        with console.status(f"scoring in {env_id}, {episodes} episodes"):
            evaluation = evaluate(trainer.trained_agent(), config, episodes)
    except KeyboardInterrupt:
        print(f"stopped while scoring; score with: es-flipout resume {run_dir}")
        return 0
    write_evaluation(run_dir, evaluation)
    print(
        f"score {evaluation.mean_return:,.1f} (sd {evaluation.std_return:,.1f}, median {evaluation.median_return:,.1f}) "
        f"over {evaluation.episodes} episodes of {env_id} in Gymnasium {evaluation.versions['gymnasium']}"
    )
    print(f"trained on {trainer.progress.env_steps:,} environment steps in {trainer.progress.wall_s:,.0f} s")
    print(f"run directory: {run_dir}")
    return 0
