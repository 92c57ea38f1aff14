"""The final score equals that of a plain loop over the real Gymnasium environment."""

import json
import statistics
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

from es_flipout.config import TrainConfig
from es_flipout.envs import SelectObservation, make_env
from es_flipout.envs.base import EnvironmentFailureError
from es_flipout.policies.agent import Agent
from es_flipout.training.evaluate import Evaluation, evaluate, make_real_env

CONTRACT = {"env_id", "episodes", "mean_return", "std_return", "median_return", "versions"}


OBSERVATIONS = Box(-1, 1, (2, 2), np.float32)


class Picky(gymnasium.Env):
    """Rejects actions outside its space; the reward of a step is the sum of its action."""

    def __init__(self, action_space: gymnasium.Space, fail_at: int | None = None) -> None:
        self.observation_space = OBSERVATIONS
        self.action_space = action_space
        self.fail_at = fail_at
        self.closed = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return OBSERVATIONS.low.copy(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        if self.t == self.fail_at:
            raise RuntimeError("the hinge\nis stuck")
        if not self.action_space.contains(action):
            raise ValueError(f"{action!r} is not in {self.action_space}")
        return OBSERVATIONS.high.copy(), float(np.sum(action)), self.t == 3, False, {}

    def close(self) -> None:
        self.closed += 1


def make_picky(**kwargs: Any) -> Picky:
    return Picky(**kwargs)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    spaces = {
        "Late": Discrete(3, start=5),
        "Grid": Box(-1, 3, (2, 2), np.float32),
        "Double": Box(-1, 3, (2,), np.float64),
    }
    for name, space in spaces.items():
        gymnasium.register(f"Picky{name}-v0", make_picky, max_episode_steps=10, kwargs={"action_space": space})
    gymnasium.register("PickyStuck-v0", make_picky, kwargs={"action_space": Discrete(2), "fail_at": 2})
    yield
    for name in (*spaces, "Stuck"):
        gymnasium.registry.pop(f"Picky{name}-v0")


def trained(env_id: str, **settings: Any) -> tuple[Agent, TrainConfig]:
    """Create an agent as training does: from the spaces of the batch environment."""
    config = TrainConfig.of(env_id, hidden=(4,), **settings)
    env = make_env(env_id, 1, observed=config.task.observed, **config.task.parsed_env_kwargs())
    agent = Agent(config, env.observation_space, env.action_space, env.observation_shape)
    env.close()
    return agent, config


def by_hand(agent: Agent, env: gymnasium.Env, seeds: range) -> list[float]:
    returns = []
    for seed in seeds:
        obs, _ = env.reset(seed=seed)
        total, over, state = 0.0, False, agent.initial_state(1)
        while not over:
            actions, state = agent.act(torch.from_numpy(obs)[None], state)
            action = actions[0]
            taken = int(action) if isinstance(env.action_space, Discrete) else action.numpy()
            obs, reward, terminated, truncated, _ = env.step(taken)
            total, over = total + float(reward), terminated or truncated
        returns.append(total)
    env.close()
    return returns


@pytest.mark.parametrize(
    ("env_id", "kwargs"), [("CartPole-v1", {}), ("Pendulum-v1", {"g": 2.0}), ("InvertedPendulum-v5", {})]
)
def test_equals_a_plain_loop(env_id: str, kwargs: dict[str, Any]) -> None:
    agent, config = trained(env_id, env_kwargs=json.dumps(kwargs), output_gain=1.0)
    result = evaluate(agent, config, episodes=4, first_seed=20)
    expected = by_hand(agent, gymnasium.make(env_id, **kwargs), range(20, 24))
    assert len(set(expected)) > 1
    assert result.mean_return == pytest.approx(statistics.fmean(expected), rel=1e-12)
    assert result.std_return == pytest.approx(statistics.pstdev(expected), rel=1e-9)
    assert result.median_return == pytest.approx(statistics.median(expected), rel=1e-12)
    assert (result.min_return, result.max_return) == (min(expected), max(expected))
    assert (result.env_id, result.env_kwargs, result.episodes, result.first_seed) == (env_id, kwargs, 4, 20)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_a_policy_with_memory_sees_only_what_it_is_shown(cell: str) -> None:
    agent, config = trained("CartPole-v1", policy="recurrent", cell=cell, observed=(2, 0), output_gain=1.0)
    result = evaluate(agent, config, episodes=3, first_seed=20)
    env = SelectObservation(gymnasium.make("CartPole-v1"), (2, 0))
    assert env.observation_space.shape == (2,)
    expected = by_hand(agent, env, range(20, 23))
    assert len(set(expected)) > 1
    assert (result.min_return, result.max_return) == (min(expected), max(expected))


def test_the_result_is_json_with_the_keys_of_the_contract() -> None:
    agent, config = trained("CartPole-v1")
    result = evaluate(agent, config, episodes=1)
    fields = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert set(fields) >= CONTRACT
    assert Evaluation(**fields) == result
    assert {"python", "torch", "gymnasium"} <= set(fields["versions"])
    assert result.mean_length == result.mean_return, "a step of CartPole pays 1"


def test_the_prefix_means_the_real_environment() -> None:
    env = make_real_env("es_flipout/CartPole-v1", {})
    assert type(env.unwrapped).__module__.startswith("gymnasium.")
    env.close()
    agent, config = trained("es_flipout/CartPole-v1")
    assert evaluate(agent, config, episodes=1).mean_return > 0


def test_episodes_are_counted_while_they_are_played() -> None:
    agent, config = trained("CartPole-v1")
    played: list[int] = []
    evaluate(agent, config, episodes=3, on_episode=played.append)
    assert played == [1, 2, 3]


def test_a_longer_evaluation_begins_with_the_shorter_one() -> None:
    agent, config = trained("CartPole-v1", output_gain=1.0)
    returns = [evaluate(agent, config, episodes=1, first_seed=seed).mean_return for seed in (7, 8, 9)]
    assert evaluate(agent, config, episodes=3, first_seed=7).mean_return == pytest.approx(statistics.fmean(returns))


@pytest.mark.parametrize("name", ["Late", "Grid", "Double"])
def test_actions_are_in_the_action_space_of_the_real_environment(name: str) -> None:
    agent, config = trained(f"Picky{name}-v0", observation_norm=False)
    result = evaluate(agent, config, episodes=2)
    assert result.mean_length == 3.0
    # Training and evaluation give the same rewards.
    env = make_env(config.task.env_id, 1)
    obs = env.reset(torch.tensor([0]))
    total = 0.0
    for _ in range(3):
        obs, reward, _, _ = env.step(agent.act(obs, None)[0])
        total += float(reward)
    env.close()
    assert result.mean_return == pytest.approx(total)


def test_an_environment_that_raises_is_named_with_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, config = trained("PickyStuck-v0", observation_norm=False)
    made: list[gymnasium.Env] = []
    make = gymnasium.make

    def watched(*args: Any, **kwargs: Any) -> gymnasium.Env:
        made.append(make(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(gymnasium, "make", watched)
    with pytest.raises(EnvironmentFailureError, match=r"PickyStuck-v0 failed: RuntimeError: the hinge"):
        evaluate(agent, config, episodes=1)
    picky = made[0].unwrapped
    assert isinstance(picky, Picky)
    assert picky.closed == 1
