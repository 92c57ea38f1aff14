"""Episodes in segments: a segment continues the previous one, and together they equal the whole episode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from populations import population_of
from toy_envs import ToyEnv

from es_flipout.envs import make_env
from es_flipout.perturbations import Flipout
from es_flipout.policies.action_map import ActionMap
from es_flipout.policies.networks import MLP
from es_flipout.rollout.episodes import Ends, Episodes, Rollout, Segments
from es_flipout.rollout.host import run
from es_flipout.strategy.population import Population

P, E = 6, 2


def anew(size: int = P) -> Segments:
    """Return segments that start from their seeds."""
    return Segments(torch.zeros(size, E, 1, dtype=torch.float64), torch.zeros(size, E, dtype=torch.int64))


def ends_of(rollout: Rollout) -> Ends:
    assert rollout.ends is not None
    return rollout.ends


def population_for(env_id: str) -> Population:
    env = make_env(env_id, 1)
    module = MLP(env.observation_space.shape[0], ActionMap(env.action_space).size, (8,), output_gain=3.0)
    return population_of(module, Flipout(), P, row_block=4)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "Acrobot-v1", "MountainCarContinuous-v0"])
@pytest.mark.parametrize("lanes", [[12], [5], [3, 4]])
def test_segments_add_up_to_the_episode(env_id: str, lanes: list[int]) -> None:
    """Bitwise identical steps, for environments whose state vector is complete."""
    population, limit = population_for(env_id), 37
    kwargs: dict[str, Any] = {"max_episode_steps": limit}
    seeds = torch.arange(P * E).view(P, E)
    whole = run(population, make_env(env_id, P * E, **kwargs), Episodes(seeds))
    segments, total = anew(), torch.zeros(P, E, dtype=torch.float64)
    length, alive = torch.zeros(P, E, dtype=torch.int64), torch.ones(P, E, dtype=torch.bool)
    envs = [make_env(env_id, slots, **kwargs) for slots in lanes]
    for _ in range(4):  # 10 + 10 + 10 + 7
        rollout = run(population, envs, Episodes(seeds, step_cap=10, segments=segments))
        total += rollout.episode_returns * alive
        length += rollout.lengths * alive
        alive &= ends_of(rollout).running
        segments = Segments(ends_of(rollout).states, (segments.elapsed + rollout.lengths) * ends_of(rollout).running)
    assert not alive.any(), "every episode has reached the time limit by now"
    assert torch.equal(length, whole.lengths)
    torch.testing.assert_close(total, whole.episode_returns, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("env_id", "tolerance"),
    [("HalfCheetah-v5", 1e-5), ("Hopper-v5", 1e-5), ("Pusher-v5", 1e-3), ("Humanoid-v5", 0.05)],
)
def test_mujoco_continues_from_the_recorded_state(env_id: str, tolerance: float) -> None:
    """The state consists of positions and velocities; the solver's warm start is not kept, so rounding differs.

    Derived fields that observation or reward read (contact forces, inertias) are computed by a reset, whereas
    Gymnasium's lag one physics step behind.
    """
    population = population_for(env_id)
    seeds, env = torch.arange(P * E).view(P, E), make_env(env_id, P * E, threads=1)
    first = run(population, env, Episodes(seeds, step_cap=6, segments=anew()))
    whole = run(population, env, Episodes(seeds, step_cap=9))
    running = ends_of(first).running
    assert running.any()
    second = run(population, env, Episodes(seeds, step_cap=3, segments=Segments(ends_of(first).states, first.lengths)))
    joined = first.episode_returns + second.episode_returns
    torch.testing.assert_close(joined[running], whole.episode_returns[running], rtol=tolerance, atol=tolerance)


def test_an_episode_that_ended_starts_from_its_seed_again() -> None:
    population = population_for("CartPole-v1")
    seeds, env = torch.arange(P * E).view(P, E), make_env("CartPole-v1", 5)
    states = torch.full((P, E, 4), torch.nan, dtype=torch.float64)  # must not be read
    again = run(population, env, Episodes(seeds, segments=Segments(states, torch.zeros(P, E, dtype=torch.int64))))
    assert torch.equal(again.episode_returns, run(population, env, Episodes(seeds)).episode_returns)
    assert not ends_of(again).running.any()


@pytest.mark.parametrize("elapsed", [0, 3])
def test_no_starts_are_drawn_where_every_episode_continues(elapsed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    env, drawn = make_env("HalfCheetah-v5", 1), []
    draw = env.starts  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(env, "starts", lambda seeds: drawn.append(len(seeds)) or draw(seeds))
    states = torch.rand(P, E, 18, dtype=torch.float64)
    steps = torch.full((P, E), 3)
    steps[-1, -1] = elapsed
    segments = Segments(states, steps, begins=elapsed == 0)
    starts = Episodes(torch.arange(P * E).view(P, E), segments=segments).starts(env)  # pyright: ignore
    assert drawn == ([] if elapsed else [P * E])
    assert torch.equal(starts[:-1], states.flatten(0, 1)[:-1])
    assert torch.equal(starts[-1], states[-1, -1]) == bool(elapsed)


def test_the_time_limit_counts_all_segments() -> None:
    population = population_for("Pendulum-v1")
    env, seeds = make_env("Pendulum-v1", 4, max_episode_steps=20), torch.zeros(P, E, dtype=torch.int64)
    states = torch.zeros(P, E, 2, dtype=torch.float64)
    elapsed = torch.tensor([1, 5, 10, 14, 15, 19])[:, None].expand(P, E).contiguous()
    rollout = run(population, env, Episodes(seeds, step_cap=6, segments=Segments(states, elapsed)))
    assert rollout.lengths[:, 0].tolist() == [6, 6, 6, 6, 5, 1]
    assert ends_of(rollout).running[:, 0].tolist() == [True, True, True, False, False, False]


def test_nothing_is_recorded_unless_segments_are_asked_for() -> None:
    assert run(population_for("CartPole-v1"), make_env("CartPole-v1", 4)).ends is None


def test_rollouts_of_shards_join_with_their_ends() -> None:
    population = population_for("Pendulum-v1")
    seeds, env = torch.arange(P * E).view(P, E), make_env("Pendulum-v1", 4)
    whole = run(population, env, Episodes(seeds, step_cap=5, segments=anew()))
    parts = []
    for first, size in ((0, 4), (4, 2)):
        shard = population_of(population._module, Flipout(), size, first=first, of=P, row_block=4)
        parts.append(run(shard, env, Episodes(seeds[first : first + size], step_cap=5, segments=anew(size))))
    joined = Rollout.join(parts)
    assert torch.equal(ends_of(joined).states, ends_of(whole).states)
    assert torch.equal(ends_of(joined).running, ends_of(whole).running)


def test_segments_need_an_environment_with_states() -> None:
    env = ToyEnv(2, lambda seed: 3, obs_dim=3)
    with pytest.raises(ValueError, match="Toy-v0 has no states to continue from"):
        run(population_for("Pendulum-v1"), env, Episodes(torch.zeros(P, E, dtype=torch.int64), segments=anew()))


def test_segments_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"segments must have shape \(3, 2\), got \(6, 2\)"):
        Episodes(torch.zeros(3, E, dtype=torch.int64), segments=anew())
