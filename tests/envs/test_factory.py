"""Environments made by a function, and actions of several choices, from the batch to a trained policy."""

from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, MultiBinary, MultiDiscrete

import es_flipout as esf
from es_flipout.config import TrainConfig
from es_flipout.envs import UnsupportedEnvironmentError
from es_flipout.training.evaluate import evaluate
from es_flipout.training.setup import make_trainer, resume_trainer

SPACES = [
    MultiDiscrete([2, 3], start=[4, -1]),
    MultiDiscrete(np.array([[2, 3], [3, 2]])),
    MultiBinary(3),
    MultiBinary((2, 2)),
]


class Matching(gymnasium.Env):
    """Rewards every entry of the action that equals the last one of its space."""

    observation_space = Box(-1, 1, (2,), np.float32)

    def __init__(self, action_space: gymnasium.Space) -> None:
        self.action_space = action_space
        sample = np.asarray(action_space.sample())
        last = action_space.start + action_space.nvec - 1 if isinstance(action_space, MultiDiscrete) else 1
        self.wanted = np.broadcast_to(last, sample.shape)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return np.ones(2, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        self.t += 1
        return np.ones(2, np.float32), float((action == self.wanted).mean()), self.t == 4, False, {}


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_actions_of_several_choices(space: gymnasium.Space) -> None:
    env = esf.make_env(partial(Matching, space), 3)
    try:
        assert env.backend == "gymnasium"
        assert env.action_space.shape is not None
        env.reset(torch.arange(3))
        last = env.action_space.nvec - 1 if isinstance(env.action_space, MultiDiscrete) else 1
        action = torch.zeros(3, *env.action_space.shape, dtype=torch.int64)
        action[1] = torch.as_tensor(last)
        action[2] = 99  # frozen, so its action is ignored
        _, reward, *_ = env.step(action, torch.tensor([True, True, False]))
        assert reward.tolist() == [0.0, 1.0, 0.0]
    finally:
        env.close()


@pytest.mark.parametrize("space", [SPACES[1], SPACES[3]], ids=str)
def test_a_factory_is_trained_resumed_and_scored(tmp_path: Path, space: gymnasium.Space) -> None:
    name = f"Matching{space.__class__.__name__}-v0"
    config = TrainConfig.of(name, generations=12, population_size=16, hidden=(4,), sigma=0.5, learning_rate=0.3)
    config = config.replace(score_episodes=1, checkpoint_every=6, evaluation_episodes=2)
    trainer = make_trainer(config, tmp_path / "run", factory=(factory := partial(Matching, space)))
    trainer.create()
    before = trainer.score()
    trainer.train()
    trainer.close()
    assert trainer.score() == 4.0 > before
    resumed = resume_trainer(tmp_path / "run", factory=factory)
    assert evaluate(resumed.trained_agent(), config, 2).mean_return == 4.0


def test_the_same_function_is_the_same_environment() -> None:
    def made() -> gymnasium.Env:
        return Matching(MultiBinary(1))

    def limited() -> gymnasium.Env:
        return gymnasium.make("CartPole-v1", max_episode_steps=5)

    ids = [esf.make_env(factory, 1).env_id for factory in (made, made, lambda: Matching(MultiBinary(1)))]
    assert ids[0] == ids[1] != ids[2]
    population = esf.EvolutionStrategy(esf.policies.MLP(4, 2), 4, 0.1).ask()
    assert esf.run(population, esf.make_env(limited, 2)).lengths.max() == 5, "wrappers of the function stay"
    with pytest.raises(UnsupportedEnvironmentError, match="already the id of another environment"):
        make_trainer(TrainConfig.of("CartPole-v1", generations=1), factory=made)
