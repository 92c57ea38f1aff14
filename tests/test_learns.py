"""Training learns: small tasks, fixed seeds, seconds; the score is that of Gymnasium's own environment.

A run goes on until the mean policy is good in our environment, up to a limit that leaves room: other machines round
otherwise, and a policy that is a bit better or worse changes everything that comes after.
"""

from typing import Any

import pytest

from es_flipout.config import TrainConfig
from es_flipout.evaluate import evaluate
from es_flipout.trainer import Trainer


def real_score(trainer: Trainer, episodes: int = 10) -> float:
    return evaluate(trainer.trained_agent(), trainer.config, episodes).mean_return


def learn(config: TrainConfig, start: float, goal: float) -> float:
    """Train until ``goal`` is reached or the generations are over; returns the score in Gymnasium's environment."""
    trainer = Trainer(config)
    assert trainer.score() < start, "nothing to learn"
    assert config.generations is not None
    for _ in range(config.generations):
        trainer.generation()
        if trainer.score() >= goal:
            break
    return real_score(trainer)


@pytest.mark.parametrize("perturbation", ["flipout", "low_rank", "dense"])
def test_cartpole(perturbation: Any) -> None:
    config = TrainConfig(
        env_id="CartPole-v1",
        generations=40,
        seed=2,
        population_size=32,
        sigma=0.5,
        learning_rate=0.3,
        hidden=(16,),
        perturbation=perturbation,
    )
    assert learn(config, start=100, goal=500) >= 475


def test_mountain_car_continuous() -> None:
    config = TrainConfig(
        env_id="MountainCarContinuous-v0",
        generations=20,
        population_size=32,
        sigma=0.3,
        learning_rate=0.1,
        hidden=(16,),
        score_episodes=8,
    )
    assert learn(config, start=0, goal=92) >= 90


def test_inverted_pendulum() -> None:
    config = TrainConfig(
        env_id="InvertedPendulum-v5",
        generations=60,
        population_size=32,
        sigma=0.1,
        learning_rate=0.1,
        policy="linear",
        threads=1,
    )
    assert learn(config, start=100, goal=1000) >= 950


def test_nothing_is_learned_without_a_step() -> None:
    # The measure itself: with steps too small to matter the score stays where it is.
    config = TrainConfig(env_id="CartPole-v1", generations=5, population_size=8, sigma=0.5, learning_rate=1e-9)
    assert learn(config, start=100, goal=500) < 100
