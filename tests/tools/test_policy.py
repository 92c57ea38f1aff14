"""A loaded policy takes what a Gymnasium environment returns, and returns what it takes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete
from tools.runs import write_run

import es_flipout
from es_flipout.errors import UserError
from es_flipout.tools.policy import load_policy, make_gymnasium_env
from es_flipout.training.evaluate import evaluate


class Chest(gymnasium.Env):
    """Observations are dictionaries; the reward depends on all of them and on the action, which must be in its space."""

    observation_space = Dict({"position": Box(-9, 9, (2, 2), np.float64), "drawer": Discrete(3)})
    action_space = Box(-1, 3, (2, 2), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert action in self.action_space
        self.t += 1
        return self._observe(), float((action * [[1, 2], [3, 4]]).sum()), self.t == 5, False, {}

    def _observe(self) -> dict[str, Any]:
        return {"position": self.np_random.normal(size=(2, 2)), "drawer": int(self.np_random.integers(3))}


@pytest.fixture(autouse=True)
def chest() -> Iterator[None]:
    gymnasium.register("Chest-v0", lambda **_: Chest())
    yield
    gymnasium.registry.pop("Chest-v0")


@pytest.mark.parametrize(
    ("env_id", "options"),
    [
        ("Chest-v0", {"observed": (6, 0, 2)}),
        ("CartPole-v1", {"policy": "recurrent", "hidden": (3,)}),
        ("MinAtar/Breakout-v1", {"policy": "convnet"}),
    ],
)
def test_returns_are_those_of_evaluate(env_id: str, options: dict[str, Any], tmp_path: Path) -> None:
    policy = es_flipout.load(write_run(tmp_path / "run", env_id, **options))
    env, returns = make_gymnasium_env(policy.config), []
    for seed in (7, 8):
        observation, _ = env.reset(seed=seed)
        policy.reset()
        total, ended = 0.0, False
        while not ended:
            observation, reward, terminated, truncated, _ = env.step(policy.act(observation))
            total, ended = total + float(reward), terminated or truncated
        returns.append(total)
    env.close()
    scored = evaluate(policy.agent, policy.config, 2, first_seed=7)
    assert (scored.min_return, scored.max_return) == (min(returns), max(returns))


def test_memory_is_kept_until_reset(tmp_path: Path) -> None:
    policy = es_flipout.load(write_run(tmp_path / "run", "Pendulum-v1", policy="recurrent", squash="tanh"))
    observation = np.array([1.0, 0.0, 0.5], np.float32)
    first, second = policy.act(observation), policy.act(observation)
    policy.reset()
    assert policy.act(observation) == first != second


def test_checkpoints_are_earlier_policies(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", "Pendulum-v1", generations=(10, 20))
    observation = np.array([1.0, 0.0, 0.5], np.float32)
    actions = {
        float(load_policy(run_dir, generation=generation).act(observation)[0])  # type: ignore[index]
        for generation in (10, 20, None)
    }
    assert len(actions) == 3
    with pytest.raises(UserError, match="no checkpoint of generation 15; it has those of 10, 20"):
        load_policy(run_dir, generation=15)


def test_observation_of_another_shape_is_refused(tmp_path: Path) -> None:
    policy = es_flipout.load(write_run(tmp_path / "run", "Pendulum-v1"))
    with pytest.raises(UserError, match=r"Pendulum-v1 have shape \(3,\), got \(1, 3\)"):
        policy.act(np.zeros((1, 3), np.float32))
