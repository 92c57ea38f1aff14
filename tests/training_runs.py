"""Small training runs and what they leave, for tests of the trainer."""

import csv
from pathlib import Path

import torch
from torch import Tensor

from es_flipout.config import TrainConfig
from es_flipout.training.metrics import Silent
from es_flipout.training.setup import make_trainer
from es_flipout.training.trainer import Trainer

TIMES = ("env_steps_per_s", "wall_s")
CARTPOLE = TrainConfig.of(
    "CartPole-v1",
    generations=4,
    population_size=32,
    hidden=(8,),
    sigma=0.5,
    learning_rate=0.2,
    score_every=2,
    score_episodes=4,
)
HOPPER = CARTPOLE.replace(env_id="Hopper-v5", sigma=0.1, learning_rate=0.05, hidden=(16,), output_gain=1.0, threads=1)


class Heard(Silent):
    """Records the messages for the user."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)


def train(config: TrainConfig, run_dir: Path | None = None, reporter: Silent | None = None) -> Trainer:
    trainer = make_trainer(config, run_dir, reporter)
    trainer.create()
    trainer.train()
    return trainer


def weights(trainer: Trainer) -> Tensor:
    return torch.cat([p.flatten() for p in trainer.strategy.mean_module().parameters()]).detach()


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different


def rows(run_dir: Path, without: tuple[str, ...] = TIMES) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return [{name: value for name, value in row.items() if name not in without} for row in csv.DictReader(file)]
