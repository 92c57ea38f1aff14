"""Other Gymnasium environments through the adapter."""

from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, Sequence, flatten

from es_flipout.envs import EnvironmentFailureError, UnsupportedEnvironmentError, make_env
from tests.envs.oracle import Oracle, random_action


class Counter(gymnasium.Env):
    """Counts its steps from the seed; the action selects a failure."""

    calls = 0

    def __init__(
        self, observation_space: gymnasium.Space | None = None, action_space: gymnasium.Space | None = None
    ) -> None:
        self.observation_space = observation_space or Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = action_space or Discrete(4, start=-1)
        self.count = 0.0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        Counter.calls += 1
        self.count = float(self.np_random_seed)
        return np.array([self.count, 0.0]), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        Counter.calls += 1
        self.count += 1
        assert self.action_space.contains(action)
        if action == 2:
            raise RuntimeError("the wheel came off")
        value = np.nan if action == 1 else float(action)
        return np.array([self.count, value]), 1.5, bool(action == 0), False, {}


class Shapes(gymnasium.Env):
    """A dictionary observation and a matrix action."""

    observation_space = Dict({"a": Box(-1, 1, (2, 2), np.float32), "b": Discrete(3)})
    action_space = Box(-2, 2, (2, 3), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return {"a": np.zeros((2, 2), np.float32), "b": 1}, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert action.shape == (2, 3)
        return {"a": action[:, :2] / 2, "b": 2}, float(action.sum()), False, False, {}


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    gymnasium.register("EsFlipoutCounter-v0", lambda **kwargs: Counter(**kwargs), max_episode_steps=5)
    gymnasium.register("EsFlipoutShapes-v0", lambda **kwargs: Shapes(**kwargs))
    yield
    del gymnasium.registry["EsFlipoutCounter-v0"], gymnasium.registry["EsFlipoutShapes-v0"]


@pytest.mark.parametrize(
    ("env_id", "kwargs"),
    [("FrozenLake-v1", {"map_name": "8x8"}), ("Blackjack-v1", {}), ("CliffWalking-v1", {"max_episode_steps": 20})],
)
@pytest.mark.parametrize("mode", ["sync", pytest.param("async", marks=pytest.mark.slow)])
def test_equals_the_environment_itself(env_id: str, kwargs: dict, mode: str) -> None:
    env = make_env(env_id, 3, vectorization_mode=mode, **kwargs)
    oracle = Oracle(env_id, 3, **kwargs)
    space = oracle.envs[0].observation_space
    seeds, rng = np.arange(3), np.random.default_rng(0)

    def flat(observation: Any) -> Any:
        rows: list[Any] = [flatten(space, tuple(row) if isinstance(row, np.ndarray) else row) for row in observation]
        return np.stack(rows)

    np.testing.assert_array_equal(env.reset(torch.from_numpy(seeds)), flat(oracle.reset(seeds)))
    ended = 0
    for _ in range(60):
        action = random_action(env, rng)
        got = [value.numpy() for value in env.step(torch.from_numpy(action))]
        expected = oracle.step(action)
        np.testing.assert_array_equal(got[0], flat(expected[0]))
        for a, b in zip(got[1:], expected[1:], strict=True):
            np.testing.assert_array_equal(a, b)
        done = got[2] | got[3]
        if done.any():
            ended += int(done.sum())
            seeds = seeds + 3
            observation = env.reset(torch.from_numpy(seeds), torch.from_numpy(done))
            np.testing.assert_array_equal(observation, flat(oracle.reset(seeds, done)))
    assert ended
    env.close()


def test_frozen_and_ended_slots_are_not_touched() -> None:
    env = make_env("EsFlipoutCounter-v0", 3)
    env.reset(torch.tensor([10, 20, 30]))
    calls = Counter.calls
    observation, reward, terminated, _ = env.step(torch.tensor([1, 0, 99]), torch.tensor([True, True, False]))
    assert observation[:, 0].tolist() == [11, 21, 30]
    assert reward.tolist() == [1.5, 1.5, 0]
    assert terminated.tolist() == [True, False, False]
    for _ in range(3):  # the slot that ended stays frozen
        observation, reward, terminated, _ = env.step(torch.tensor([0, 0, 0]), torch.tensor([False, True, False]))
        assert (reward[0], terminated[0]) == (0, False)
    assert observation[:, 0].tolist() == [11, 24, 30]
    assert Counter.calls == calls + 5
    observation = env.reset(torch.tensor([50, 0, 0]), torch.tensor([True, False, False]))
    assert observation[:, 0].tolist() == [50, 24, 30]
    observation, _, _, truncated = env.step(torch.tensor([0, 0, 0]))
    assert observation[:, 0].tolist() == [51, 25, 31]
    assert truncated.tolist() == [False, True, False]


@pytest.mark.parametrize("env_id", ["LunarLander-v3", "BipedalWalker-v3"])
def test_an_episode_does_not_depend_on_those_before_it(env_id: str) -> None:
    rng, played = np.random.default_rng(0), []
    used = make_env(env_id, 1)
    for seed in range(6):
        actions = [torch.from_numpy(random_action(used, rng)) for _ in range(100)]
        new = make_env(env_id, 1)
        for env in (used, new):
            start = env.reset(torch.tensor([seed]))
            played.append(torch.stack([start, *(env.step(action)[0] for action in actions)]))
        new.close()
        assert torch.equal(*played[-2:])
    used.close()


def test_discrete_actions_start_at_zero() -> None:
    env = make_env("EsFlipoutCounter-v0", 1)
    assert env.action_space == Discrete(4)
    env.reset(torch.tensor([0]))
    assert env.step(torch.tensor([0]))[0][0, 1] == -1


def test_divergence_ends_the_slot() -> None:
    env = make_env("EsFlipoutCounter-v0", 2)
    env.reset(torch.tensor([10, 20]))
    observation, reward, terminated, _ = env.step(torch.tensor([2, 0]))
    assert env.diverged.tolist() == terminated.tolist() == [True, False]
    assert observation.tolist() == [[10, 0], [21, -1]]
    assert reward.tolist() == [0, 1.5]
    env.step(torch.tensor([0, 0]), torch.tensor([False, True]))
    assert not env.diverged.any()


def test_spaces_of_other_shapes_are_flattened() -> None:
    env = make_env("EsFlipoutShapes-v0", 2)
    assert env.observation_space.shape == (7,)
    assert env.action_space == Box(-2, 2, (6,), np.float32)
    env.reset(torch.arange(2))
    action = torch.arange(12, dtype=torch.float64).reshape(2, 6) / 12
    observation, reward, _, _ = env.step(action)
    expected = [0, 1 / 24, 3 / 24, 4 / 24, 0, 0, 1]
    torch.testing.assert_close(observation[0], torch.tensor(expected, dtype=observation.dtype))
    assert reward[0].item() == pytest.approx(15 / 12)


def test_an_exception_in_the_environment_is_named() -> None:
    env = make_env("EsFlipoutCounter-v0", 2)
    env.reset(torch.arange(2))
    with pytest.raises(EnvironmentFailureError, match="EsFlipoutCounter-v0: RuntimeError: the wheel came off"):
        env.step(torch.tensor([0, 3]))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"action_space": Sequence(Discrete(2))}, "actions must be Discrete, MultiDiscrete, MultiBinary or a"),
        ({"action_space": Box(0, 5, (2,), np.int64)}, "or a floating-point Box"),
        ({"observation_space": Sequence(Discrete(2))}, "EsFlipoutCounter-v0"),
        ({"color": "red"}, "EsFlipoutCounter-v0 cannot be created"),
    ],
)
def test_what_is_not_supported(kwargs: dict, message: str) -> None:
    with pytest.raises(UnsupportedEnvironmentError, match=message) as caught:
        make_env("EsFlipoutCounter-v0", 1, **kwargs)
    assert "\n" not in str(caught.value)


def test_slots_that_have_not_begun_show_zeros() -> None:
    env = make_env("EsFlipoutCounter-v0", 3)
    observation = env.reset(torch.tensor([5, 6, 7]), torch.tensor([False, True, False]))
    assert observation.tolist() == [[0, 0], [6, 0], [0, 0]]
    live = torch.tensor([False, True, False])
    observation, *_ = env.step(torch.full((3,), 0), live)
    assert observation.tolist() == [[0, 0], [7, -1], [0, 0]]
