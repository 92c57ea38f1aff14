"""The MuJoCo environments on the CPU are bitwise identical to Gymnasium's."""

import threading

import numpy as np
import pytest
import torch

from es_flipout.envs import UnsupportedEnvironmentError, make_env
from es_flipout.envs.mujoco_tasks import MUJOCO_TASKS
from tests.envs.oracle import check_against_gymnasium, random_action

VARIANTS = [
    ("Ant-v5", {"include_cfrc_ext_in_observation": False, "contact_cost_weight": 0}),
    ("Ant-v5", {"main_body": "torso", "terminate_when_unhealthy": False, "contact_force_range": (-0.5, 0.5)}),
    (
        "Humanoid-v5",
        {
            "include_cinert_in_observation": False,
            "include_cvel_in_observation": False,
            "include_qfrc_actuator_in_observation": False,
            "include_cfrc_ext_in_observation": False,
            "contact_cost_weight": 0,
        },
    ),
    ("Humanoid-v5", {"include_cfrc_ext_in_observation": False, "healthy_reward": 0.3}),
    ("HumanoidStandup-v5", {"include_cfrc_ext_in_observation": False, "impact_cost_weight": 0}),
    ("HalfCheetah-v5", {"exclude_current_positions_from_observation": False, "frame_skip": 2, "ctrl_cost_weight": 0.7}),
    ("Hopper-v5", {"healthy_state_range": (-3.0, 3.0), "healthy_reward": 0.1, "max_episode_steps": 9}),
    ("Walker2d-v5", {"terminate_when_unhealthy": False, "forward_reward_weight": 3.1, "reset_noise_scale": 0.02}),
    ("Swimmer-v5", {"exclude_current_positions_from_observation": False, "max_episode_steps": -1}),
    ("Reacher-v5", {"reward_dist_weight": 0.3, "reward_control_weight": 0.7}),
    ("Pusher-v5", {"reward_near_weight": 0.3, "reward_control_weight": 0.7}),
    ("InvertedPendulum-v5", {"frame_skip": 3, "reset_noise_scale": 0.1}),
    ("InvertedDoublePendulum-v5", {"healthy_reward": 3.3}),
]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("env_id", MUJOCO_TASKS)
def test_equals_gymnasium_to_the_bit(env_id: str, dtype: type) -> None:
    env = make_env(env_id, 3)
    check_against_gymnasium(env, steps=200, action=lambda rng: random_action(env, rng, dtype))


@pytest.mark.parametrize(("env_id", "kwargs"), VARIANTS)
def test_variants_equal_gymnasium_to_the_bit(env_id: str, kwargs: dict) -> None:
    env = make_env(env_id, 2, **kwargs)
    check_against_gymnasium(env, steps=40, action=lambda rng: random_action(env, rng))


@pytest.mark.parametrize(
    ("env_id", "kwargs", "expected"),
    [
        ("HalfCheetah-v5", {}, False),
        ("HumanoidStandup-v5", {}, False),
        ("Humanoid-v5", {}, True),
        ("Walker2d-v5", {}, True),
        ("Walker2d-v5", {"terminate_when_unhealthy": False}, False),
    ],
)
def test_it_is_known_whether_episodes_can_end_early(env_id: str, kwargs: dict, expected: bool) -> None:
    assert make_env(env_id, 2, **kwargs).terminates is expected
    assert make_env(env_id, 2, observed=(0,), **kwargs).terminates is expected


def test_time_limit() -> None:
    env = make_env("HalfCheetah-v5", 2, max_episode_steps=7)
    assert env.max_episode_steps == 7
    assert check_against_gymnasium(env, steps=30, action=lambda rng: random_action(env, rng)) == 8


@pytest.mark.slow
def test_registered_time_limit() -> None:
    env = make_env("Swimmer-v5", 1)
    assert env.max_episode_steps == 1000
    assert check_against_gymnasium(env, steps=1001, action=lambda rng: random_action(env, rng)) == 1


@pytest.mark.parametrize("env_id", ["Hopper-v5", "Ant-v5", "Humanoid-v5"])
def test_frozen_slots_are_untouched_and_nothing_leaks(env_id: str) -> None:
    """Slots that are sometimes frozen, with invalid actions, have the same trajectories as slots that never are."""
    rng = np.random.default_rng(0)
    env, alone = make_env(env_id, 4), make_env(env_id, 4)
    seeds = torch.arange(4)
    observation = env.reset(seeds)
    assert torch.equal(observation, alone.reset(seeds))
    action = torch.empty(0)
    for step in range(12):
        live = torch.tensor([True, False, step % 2 == 0, step % 3 == 0])
        action = torch.from_numpy(random_action(env, rng))
        poisoned = torch.where(live[:, None], action, torch.nan if step % 2 else torch.inf)
        after, reward, terminated, truncated = env.step(poisoned, live)
        assert torch.equal(after[~live], observation[~live])
        assert not reward[~live].any()
        assert not (terminated | truncated | env.diverged)[~live].any()
        assert reward.isfinite().all()
        observation = after
        if live[0]:
            expected = alone.step(action, torch.tensor([True, False, False, False]))
            assert torch.equal(after[0], expected[0][0])
            assert reward[0] == expected[1][0]
    assert torch.equal(env.step(action, torch.zeros(4, dtype=torch.bool))[0], observation)


@pytest.mark.parametrize("env_id", ["HalfCheetah-v5", "Humanoid-v5"])
def test_thread_count_does_not_matter(env_id: str) -> None:
    envs = [make_env(env_id, 5, threads=threads) for threads in (1, 2, 5)]
    for env in envs:
        env.reset(torch.arange(5))
    rng = np.random.default_rng(0)
    for _ in range(20):
        action = torch.from_numpy(random_action(envs[0], rng))
        first, *others = [env.step(action) for env in envs]
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("env_id", ["HalfCheetah-v5", "Humanoid-v5"])
def test_two_envs_in_two_threads(env_id: str) -> None:
    size = (30, 4, *(make_env(env_id, 1).action_space.shape or ()))
    actions = torch.rand(size, generator=torch.Generator().manual_seed(0))

    def run(result: list[torch.Tensor]) -> None:
        env = make_env(env_id, 4, threads=2)
        env.reset(torch.arange(4))
        result.extend(env.step(action)[0] for action in actions)

    results: list[list[torch.Tensor]] = [[], [], []]
    run(results[0])
    threads = [threading.Thread(target=run, args=(result,)) for result in results[1:]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results[1:]:
        assert torch.equal(torch.stack(result), torch.stack(results[0]))


@pytest.mark.parametrize("env_id", ["HalfCheetah-v5", "Ant-v5", "Swimmer-v5"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 1e30])
def test_divergence_ends_the_slot_and_stays_there(env_id: str, poison: float) -> None:
    env, clean = make_env(env_id, 3), make_env(env_id, 3)
    env.reset(torch.arange(3))
    clean.reset(torch.arange(3))
    action = torch.zeros(3, *(env.action_space.shape or ()))
    action[1] = poison
    observation, reward, terminated, _ = env.step(action)
    expected = clean.step(torch.zeros_like(action))
    assert env.diverged.tolist() == terminated.tolist() == [False, True, False]
    assert reward[1] == 0
    assert observation.isfinite().all()
    assert torch.equal(observation[::2], expected[0][::2])
    assert torch.equal(reward[::2], expected[1][::2])
    env.step(torch.zeros_like(action))
    assert not env.diverged.any()
    assert torch.equal(env.reset(torch.arange(3)), clean.reset(torch.arange(3)))


def test_returned_tensors_are_not_overwritten() -> None:
    env = make_env("HalfCheetah-v5", 2)
    first = env.reset(torch.arange(2))
    kept = first.clone()
    outcome = env.step(torch.ones(2, 6))
    copies = [value.clone() for value in outcome]
    env.step(-torch.ones(2, 6))
    assert torch.equal(first, kept)
    assert all(torch.equal(a, b) for a, b in zip(outcome, copies, strict=True))


def test_equal_seeds_start_equal() -> None:
    observation = make_env("Hopper-v5", 3).reset(torch.tensor([4, 4, 5]))
    assert torch.equal(observation[0], observation[1])
    assert not torch.equal(observation[0], observation[2])


@pytest.mark.parametrize(
    ("env_id", "bonus"),
    [
        ("HalfCheetah-v5", 0),
        ("Hopper-v5", 1),
        ("Humanoid-v5", 5),
        ("InvertedDoublePendulum-v5", 10),
        ("InvertedPendulum-v5", 0),
    ],
)
def test_alive_bonus(env_id: str, bonus: float) -> None:
    assert make_env(env_id, 1).alive_bonus == bonus


def test_unknown_keyword_is_named() -> None:
    with pytest.raises(UnsupportedEnvironmentError, match="unsupported keyword 'render_mode'"):
        make_env("Hopper-v5", 1, render_mode="human")


def test_actions_of_a_wrong_shape() -> None:
    env = make_env("Hopper-v5", 2)
    with pytest.raises(ValueError, match=r"must have shape \(2, 3\), got \(3,\)"):
        env.step(torch.zeros(3))
