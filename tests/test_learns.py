"""Training learns: small tasks with fixed seeds, a few seconds each, scored in Gymnasium's own environments.

A run continues until the mean policy is good in the native environment, up to a generous limit: other machines round
differently, and a small difference in a policy changes everything that follows.
"""

from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete

from es_flipout.config import TrainConfig
from es_flipout.training.evaluate import evaluate
from es_flipout.training.setup import make_trainer
from es_flipout.training.trainer import Trainer


def real_score(trainer: Trainer, episodes: int = 10) -> float:
    return evaluate(trainer.trained_agent(), trainer.config, episodes).mean_return


def learn(config: TrainConfig, start: float, goal: float) -> float:
    """Train until ``goal`` or the last generation is reached, and return the score in Gymnasium's environment."""
    trainer = make_trainer(config)
    assert trainer.score() < start, "nothing to learn"
    assert config.schedule.generations is not None
    for _ in range(config.schedule.generations):
        trainer.generation()
        if trainer.score() >= goal:
            break
    return real_score(trainer)


@pytest.mark.parametrize("perturbation", ["flipout", "low_rank", "dense"])
def test_cartpole(perturbation: Any) -> None:
    config = TrainConfig.of(
        "CartPole-v1",
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
    config = TrainConfig.of(
        "MountainCarContinuous-v0",
        generations=20,
        population_size=32,
        sigma=0.3,
        learning_rate=0.1,
        hidden=(16,),
        score_episodes=8,
    )
    assert learn(config, start=0, goal=92) >= 90


def test_inverted_pendulum() -> None:
    config = TrainConfig.of(
        "InvertedPendulum-v5",
        generations=60,
        population_size=32,
        sigma=0.1,
        learning_rate=0.1,
        policy="linear",
        threads=1,
    )
    assert learn(config, start=100, goal=1000) >= 950


def test_nothing_is_learned_without_a_step() -> None:
    # Tests the measure itself: with steps that are too small the score does not change.
    config = TrainConfig.of("CartPole-v1", generations=5, population_size=8, sigma=0.5, learning_rate=1e-9)
    assert learn(config, start=100, goal=500) < 100


class Recall(gymnasium.Env):
    """Shows a cue of -1 or 1 once, and rewards an action equal to the cue at the end, which requires memory."""

    observation_space = Box(-1, 1, (2,), np.float32)
    action_space = Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.cue, self.t = float(self.np_random.choice([-1.0, 1.0])), 0
        return np.array([self.cue, 0], np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        over = self.t == 4
        return np.array([0, self.t / 4], np.float32), float(action[0] * self.cue) if over else 0.0, over, False, {}


class Spot(gymnasium.Env):
    """An image with one bright pixel; the correct action is the quadrant of the image in which it is."""

    observation_space = Box(0, 255, (8, 8, 1), np.uint8)
    action_space = Discrete(4)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return self._draw(), {}

    def _draw(self) -> Any:
        image = np.zeros((8, 8, 1), np.uint8)
        self.place = self.np_random.integers(8, size=2)
        image[*self.place] = 255
        return image

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        right = 2 * (self.place[0] // 4) + self.place[1] // 4
        self.t += 1
        return self._draw(), float(action == right), self.t == 20, False, {}


@pytest.fixture
def _registered() -> Iterator[None]:
    gymnasium.register("Recall-v0", entry_point=lambda **kwargs: Recall())
    gymnasium.register("Spot-v0", entry_point=lambda **kwargs: Spot())
    yield
    for name in ("Recall-v0", "Spot-v0"):
        del gymnasium.registry[name]


@pytest.mark.usefixtures("_registered")
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_memory(cell: Any) -> None:
    config = TrainConfig.of(
        "Recall-v0",
        generations=60,
        population_size=64,
        sigma=0.2,
        learning_rate=0.1,
        episodes=2,
        policy="recurrent",
        cell=cell,
        hidden=(8,),
        output_gain=1.0,
        score_episodes=64,
    )
    assert learn(config, start=0.5, goal=0.9) >= 0.8


@pytest.mark.usefixtures("_registered")
def test_images() -> None:
    config = TrainConfig.of(
        "Spot-v0",
        generations=80,
        population_size=64,
        sigma=0.1,
        learning_rate=0.05,
        policy="convnet",
        channels=(4, 8),
        hidden=(),
        output_gain=1.0,
    )
    assert learn(config, start=10, goal=17) >= 15
