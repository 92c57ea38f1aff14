"""The classic control environments in torch, compared with Gymnasium's."""

import numpy as np
import pytest
import torch

from es_flipout.envs import UnsupportedEnvironmentError, make_env
from es_flipout.envs.classic import CLASSIC_TASKS
from tests.envs.oracle import Oracle, check_against_gymnasium, random_action


@pytest.mark.parametrize("env_id", CLASSIC_TASKS)
def test_equals_gymnasium(env_id: str) -> None:
    env = make_env(env_id, 8)
    check_against_gymnasium(env, steps=250, action=lambda rng: random_action(env, rng), reward_tolerance=1e-9)


@pytest.mark.parametrize(
    ("env_id", "kwargs"),
    [
        ("CartPole-v1", {"sutton_barto_reward": True}),
        ("CartPole-v1", {"max_episode_steps": 5}),
        ("Pendulum-v1", {"g": 9.81}),
        ("MountainCar-v0", {"goal_velocity": 0.01}),
        ("MountainCarContinuous-v0", {"goal_velocity": 0.01, "max_episode_steps": -1}),
    ],
)
def test_variants_equal_gymnasium(env_id: str, kwargs: dict) -> None:
    env = make_env(env_id, 4, **kwargs)
    check_against_gymnasium(env, steps=60, action=lambda rng: random_action(env, rng), reward_tolerance=1e-9)


@pytest.mark.parametrize("env_id", ["MountainCar-v0", "MountainCarContinuous-v0"])
def test_reaching_the_goal_equals_gymnasium(env_id: str) -> None:
    """Pushing in the direction of motion reaches the goal, which random actions do not."""
    env = make_env(env_id, 4)
    oracle = Oracle(env_id, 4)
    seeds = np.arange(4)
    env.reset(torch.from_numpy(seeds))
    observation = oracle.reset(seeds)
    reached = False
    while not reached:
        forward = observation[:, 1] >= 0
        action = np.where(forward, 2, 0) if env_id == "MountainCar-v0" else np.where(forward, 1.0, -1.0)[:, None]
        action = action if env_id == "MountainCar-v0" else action.astype(np.float32)
        got = [value.numpy() for value in env.step(torch.from_numpy(action))]
        expected = oracle.step(action)
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_array_equal(a, b)
        observation, reached = got[0], bool(got[2].any())
        assert not got[3].any()


@pytest.mark.parametrize("env_id", CLASSIC_TASKS)
def test_starts_equal_gymnasium(env_id: str) -> None:
    seeds = np.arange(200) * 7919
    observation = make_env(env_id, 200).reset(torch.from_numpy(seeds))
    np.testing.assert_array_equal(observation.numpy(), Oracle(env_id, 200).reset(seeds))


@pytest.mark.parametrize("env_id", CLASSIC_TASKS)
def test_frozen_slots_are_untouched(env_id: str) -> None:
    env, rng = make_env(env_id, 3), np.random.default_rng(0)
    after = observation = env.reset(torch.arange(3))
    live = torch.tensor([True, False, True])
    for _ in range(5):
        action = torch.from_numpy(random_action(env, rng))
        if action.is_floating_point():
            action[1] = torch.nan
        after, reward, terminated, truncated = env.step(action, live)
        assert torch.equal(after[1], observation[1])
        assert not reward[1]
        assert not (terminated | truncated | env.diverged)[1]
    assert not torch.equal(after[::2], observation[::2])


def test_a_frozen_slot_does_not_age() -> None:
    env = make_env("Pendulum-v1", 2, max_episode_steps=3)
    env.reset(torch.arange(2))
    live = torch.tensor([True, False])
    truncated = [env.step(torch.zeros(2, 1), live)[3].tolist() for _ in range(3)]
    assert truncated[-1] == [True, False]
    assert env.step(torch.zeros(2, 1))[3].tolist() == [True, False]


def test_divergence_ends_the_slot_and_stays_there() -> None:
    env = make_env("Pendulum-v1", 3)
    before = env.reset(torch.arange(3))
    observation, reward, terminated, _ = env.step(torch.tensor([[0.0], [torch.nan], [0.0]]))
    assert env.diverged.tolist() == terminated.tolist() == [False, True, False]
    assert reward[1] == 0
    assert reward.isfinite().all()
    assert torch.equal(observation[1], before[1])


def test_unknown_keyword_is_named() -> None:
    with pytest.raises(UnsupportedEnvironmentError, match="unsupported keyword 'gravity'"):
        make_env("Pendulum-v1", 1, gravity=3)
