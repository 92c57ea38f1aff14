"""Rollouts: every episode is played once, by its member, and counted correctly; its bits do not depend on the slot."""

from __future__ import annotations

import heapq
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Literal

import gymnasium
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from populations import population_of
from torch import Tensor, nn
from toy_envs import SignedPopulation, Step, ToyEnv

from es_flipout.envs import make_env
from es_flipout.envs.base import EnvironmentFailureError
from es_flipout.perturbations import Family, Flipout
from es_flipout.policies.action_map import ActionMap
from es_flipout.policies.networks import MLP, Linear, Recurrent
from es_flipout.policies.observation_norm import Moments, ObservationNorm
from es_flipout.rollout.episodes import MOMENT_JOBS, Episodes, Rollout, RolloutInterrupted, start_seeds
from es_flipout.rollout.host import run
from es_flipout.strategy.unperturbed import Unperturbed

CPU = torch.device("cpu")
UNIT_BOX = gymnasium.spaces.Box(-1, 1, (6,), np.float32)


def coded_seeds(size: int, episodes: int) -> Tensor:
    """Return seeds that differ for every episode, and differ from its number."""
    return (3 * torch.arange(size * episodes) + 7).view(size, episodes)


def by_seed(envs: list[ToyEnv]) -> dict[int, list[Step]]:
    """Return the live steps of every episode, in the order in which they were played."""
    episodes = defaultdict(list)
    for env in envs:
        for step in env.trace:
            episodes[step.seed].append(step)
    return episodes


def same_moments(a: Moments, b: Moments) -> bool:
    return a.count == b.count and torch.equal(a.total, b.total) and torch.equal(a.squares, b.squares)


def same(a: Rollout, b: Rollout) -> bool:
    """Return whether two rollouts are bitwise identical."""
    return (
        torch.equal(a.episode_returns, b.episode_returns)
        and torch.equal(a.returns, b.returns)
        and torch.equal(a.fitness, b.fitness)
        and torch.equal(a.lengths, b.lengths)
        and a.env_steps == b.env_steps
        and same_moments(a.moments, b.moments)
    )


@settings(max_examples=80)
@given(
    size=st.integers(1, 8),
    episodes=st.integers(1, 3),
    slots=st.lists(st.integers(1, 9), min_size=1, max_size=2),
    limit=st.one_of(st.none(), st.integers(1, 5)),
    cap=st.one_of(st.none(), st.integers(1, 6)),
    data=st.data(),
)
def test_every_episode_is_played_once_by_its_member(
    size: int, episodes: int, slots: list[int], limit: int | None, cap: int | None, data: st.DataObject
) -> None:
    seeds = coded_seeds(size, episodes)
    drawn = data.draw(st.lists(st.integers(1, 6), min_size=seeds.numel(), max_size=seeds.numel()))
    lengths = dict(zip(seeds.flatten().tolist(), drawn, strict=True))
    own_cap = cap if cap is not None and (limit is None or cap < limit) else None
    envs = [ToyEnv(s, lengths.__getitem__, max_episode_steps=limit, caller_cap=own_cap) for s in slots]
    rollout = run(SignedPopulation(size), envs, Episodes(seeds, step_cap=cap, moment_jobs=MOMENT_JOBS))
    played = by_seed(envs)
    assert sum(len(steps) for steps in played.values()) == rollout.env_steps
    acted_on = []
    for job, seed in enumerate(seeds.flatten().tolist()):
        member, episode = divmod(job, episodes)
        length = min(lengths[seed], limit or 99, cap or 99)
        steps = played.pop(seed)
        assert [step.t for step in steps] == list(range(1, length + 1))
        assert all(step.action.tolist() == [member] for step in steps)
        assert rollout.lengths[member, episode] == length
        # including the terminal reward; exact, because the rewards are whole numbers
        assert rollout.episode_returns[member, episode] == sum(1000 * seed + t for t in range(1, length + 1))
        acted_on += [[seed, t, 1] for t in range(length)]
    assert not played, "episodes that were not requested"
    observed = torch.tensor(acted_on, dtype=torch.float64)
    assert same_moments(rollout.moments, Moments(len(observed), observed.sum(0), observed.square().sum(0)))
    torch.testing.assert_close(rollout.returns, rollout.episode_returns.mean(1))
    assert torch.equal(rollout.fitness, rollout.returns)
    assert (rollout.diverged, rollout.nan_returns) == (0, 0)
    assert rollout.episode_returns.shape == rollout.lengths.shape == (size, episodes)


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 8, 20, 30])
def test_a_freed_slot_takes_the_next_episode_at_once(slots: int) -> None:
    """The number of steps is that of a greedy queue."""
    seeds = coded_seeds(20, 1)
    env = ToyEnv(slots, lambda seed: 1 + seed % 8)
    rollout = run(SignedPopulation(20), env, Episodes(seeds))
    free = [0] * slots
    for seed in seeds.flatten().tolist():
        heapq.heapreplace(free, free[0] + 1 + seed % 8)
    assert len(env.masks) == max(free)
    assert sum(int(mask.sum()) for mask in env.masks) == rollout.env_steps


def test_frozen_slots_are_never_stepped() -> None:
    lengths = {7: 2, 10: 6, 13: 3}
    env = ToyEnv(5, lengths.__getitem__)
    run(SignedPopulation(3), env, Episodes(coded_seeds(3, 1)))
    live = [[mask[slot].item() for mask in env.masks] for slot in range(5)]
    assert live == [[t < n for t in range(6)] for n in (2, 6, 3, 0, 0)]


def test_policy_computes_less_than_twice_the_live_rows() -> None:
    population, env = SignedPopulation(20), ToyEnv(14, lambda seed: 1 + seed % 11)
    run(population, env, Episodes(coded_seeds(20, 1)))
    live = [int(mask.sum()) for mask in env.masks]
    assert live[-1] == 1, "without a long tail nothing is tested"
    assert all(rows < 2 * now for rows, now in zip(population.rows_computed, live, strict=True))


def test_all_live_is_told_as_none() -> None:
    told = []

    class Listening(ToyEnv):
        def step(self, action: Tensor, live: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            told.append(live)
            return super().step(action, live)

    run(SignedPopulation(4), Listening(2, lambda seed: 3), Episodes(coded_seeds(4, 1)))
    assert told == [None] * 6


def test_terminal_reward_is_counted_and_nothing_after() -> None:
    rollout = run(SignedPopulation(2), ToyEnv(2, {7: 1, 10: 4}.__getitem__), Episodes(coded_seeds(2, 1)))
    assert rollout.returns.tolist() == [7001.0, 40010.0]
    assert rollout.lengths.tolist() == [[1], [4]]


def test_truncation_ends_an_episode() -> None:
    env = ToyEnv(1, lambda seed: 100, max_episode_steps=3)
    rollout = run(SignedPopulation(2), env, Episodes(coded_seeds(2, 1)))
    assert rollout.lengths.tolist() == [[3], [3]]
    assert rollout.returns.tolist() == [21006.0, 30006.0]


@pytest.mark.parametrize(("cap", "length"), [(2, 2), (4, 4), (5, 4), (99, 4), (None, 4)])
@pytest.mark.parametrize("limit", [4, None])
def test_cap_below_the_limit(cap: int | None, length: int, limit: int | None) -> None:
    env = ToyEnv(2, lambda seed: 4 if limit is None else 100, max_episode_steps=limit, caller_cap=cap)
    rollout = run(SignedPopulation(3), env, Episodes(coded_seeds(3, 1), step_cap=cap))
    assert rollout.lengths.flatten().tolist() == [length] * 3


@pytest.mark.parametrize("lanes", [1, 2])
def test_alive_bonus_is_left_out_of_fitness_only(lanes: int) -> None:
    def play(remove: bool) -> Rollout:
        envs = [ToyEnv(2, lambda seed: 1 + seed % 3, alive_bonus=0.5) for _ in range(lanes)]
        return run(SignedPopulation(4), envs, Episodes(coded_seeds(4, 2), remove_alive_bonus=remove))

    kept, removed = play(False), play(True)
    assert torch.equal(kept.fitness, kept.returns)
    assert torch.equal(removed.returns, kept.returns)
    expected = (kept.episode_returns - 0.5 * kept.lengths).mean(1)
    torch.testing.assert_close(removed.fitness, expected)
    assert (removed.fitness < removed.returns).all()


@pytest.mark.parametrize("slots", [[1], [3], [2, 2]])
def test_nan_reward_spoils_its_episode_alone(slots: list[int]) -> None:
    seeds = coded_seeds(4, 2)
    spoiled = int(seeds[1, 0])
    envs = [ToyEnv(s, lambda seed: 3, nan_seeds=[spoiled]) for s in slots]
    rollout = run(SignedPopulation(4), envs, Episodes(seeds))
    assert rollout.nan_returns == 1
    assert rollout.episode_returns.isnan().nonzero().tolist() == [[1, 0]]
    assert rollout.returns.isnan().tolist() == [False, True, False, False]
    assert rollout.env_steps == 24
    clean = run(SignedPopulation(4), ToyEnv(2, lambda seed: 3), Episodes(seeds))
    assert torch.equal(rollout.episode_returns.nan_to_num(-1.0)[[0, 2, 3]], clean.episode_returns[[0, 2, 3]])


@pytest.mark.parametrize("slots", [[1], [3], [2, 2]])
def test_diverged_episodes_end_and_are_counted(slots: list[int]) -> None:
    seeds = coded_seeds(5, 2)
    bad = [int(seeds[0, 0]), int(seeds[0, 1]), int(seeds[3, 0])]  # the first two at the same time
    envs = [ToyEnv(s, lambda seed: 4, diverging_seeds=bad) for s in slots]
    rollout = run(SignedPopulation(5), envs, Episodes(seeds))
    assert rollout.diverged == 3
    assert rollout.lengths.tolist() == [[2, 2], [4, 4], [4, 4], [2, 4], [4, 4]]


def test_moments_of_the_first_jobs_only() -> None:
    seeds = coded_seeds(4, 2)
    rollout = run(SignedPopulation(4), ToyEnv(3, lambda seed: 1 + seed % 3), Episodes(seeds, moment_jobs=3))
    first = seeds.flatten()[:3].tolist()
    observed = torch.tensor([[seed, t, 1] for seed in first for t in range(1 + seed % 3)], dtype=torch.float64)
    assert same_moments(rollout.moments, Moments(len(observed), observed.sum(0), observed.square().sum(0)))
    assert rollout.env_steps > rollout.moments.count


def test_rollouts_of_shards_join_to_the_rollout_of_all_to_the_bit() -> None:
    population = population_of(MLP(17, 6, output_gain=1.0), Flipout(), 80, row_block=16)
    env, seeds = make_env("HalfCheetah-v5", 80, threads=1, max_episode_steps=7), start_seeds(population, 2)
    whole = run(population, env, Episodes(seeds, remove_alive_bonus=True, moment_jobs=100))
    parts = []
    for first, size in ((0, 32), (32, 32), (64, 16)):
        shard = population_of(population._module, Flipout(), size, first=first, of=80, row_block=16)
        here = start_seeds(shard, 2)
        assert torch.equal(here, seeds[first : first + size])
        lane = make_env("HalfCheetah-v5", 5, threads=1, max_episode_steps=7)
        left = min(max(100 - 2 * first, 0), 2 * size)
        parts.append(run(shard, lane, Episodes(here, remove_alive_bonus=True, moment_jobs=left)))
    joined = Rollout.join(parts)
    assert whole.moments.count == 100 * 7
    assert same(joined, whole)


def test_observations_in_float32_have_moments_in_float64() -> None:
    env = ToyEnv(2, lambda seed: 3, dtype=torch.float32)
    moments = run(
        SignedPopulation(3), env, Episodes(torch.tensor([[1 << 23], [12345677], [3]]), moment_jobs=MOMENT_JOBS)
    ).moments
    assert moments.squares.dtype == torch.float64
    assert moments.squares[0] == 3 * ((1 << 23) ** 2 + 12345677**2 + 9)  # float32 would round all of the squares


def toys(slots: list[int], obs_dim: int, action_dim: int = 6, cap: int | None = None) -> list[ToyEnv]:
    box = gymnasium.spaces.Box(-1, 1, (action_dim,), np.float32)
    return [ToyEnv(s, lambda seed: 1 + seed % 23, obs_dim=obs_dim, action_space=box, caller_cap=cap) for s in slots]


LAYOUTS = [[1], [3], [50], [2, 3], [20, 20]]


@pytest.mark.parametrize("episodes", [1, 2])
def test_slots_do_not_matter_to_the_bit(family: Family, episodes: int) -> None:
    """Compares one slot per episode with few, many, and two batches; the environment amplifies the last bit."""
    population = population_of(MLP(17, 6, hidden=(16,), output_gain=1.0), family, 14)
    one_each = run(population, toys([14 * episodes], 17), episodes)
    assert len(one_each.episode_returns.unique()) == 14 * episodes
    for slots in LAYOUTS if episodes == 1 else [[3], [2, 3]]:
        assert same(run(population, toys(slots, 17), episodes), one_each), f"{slots} slots"


def test_slots_do_not_matter_to_the_bit_with_the_default_row_block() -> None:
    population = population_of(MLP(17, 6, output_gain=1.0), Flipout(), 300, row_block=256)
    seeds = coded_seeds(300, 1) % 50  # short episodes, many of them with equal seeds
    one_each = run(population, toys([300], 17, cap=3), Episodes(seeds, step_cap=3))
    assert same(run(population, toys([11, 90], 17, cap=3), Episodes(seeds, step_cap=3)), one_each)


def test_slots_do_not_matter_to_the_bit_for_a_linear_policy() -> None:
    """Sizes of Hopper's observations and actions; rows of 11 numbers are not aligned in memory."""
    policy = Linear(11, 3)
    nn.init.normal_(policy.layer.weight)
    population = population_of(policy, Flipout(), 14)
    one_each = run(population, toys([14], 11, 3))
    for slots in LAYOUTS:
        assert same(run(population, toys(slots, 11, 3)), one_each), f"{slots} slots"


def test_a_shard_gives_its_part_of_the_returns() -> None:
    module = MLP(17, 6, hidden=(16,), output_gain=1.0)
    whole = run(population_of(module, Flipout(bases=3), 12), toys([4], 17), 2)
    for first, size in ((0, 4), (4, 8)):
        shard = population_of(module, Flipout(bases=3), size, first=first, of=12)
        part = run(shard, toys([3], 17), 2)
        assert torch.equal(part.episode_returns, whole.episode_returns[first : first + size])
        assert torch.equal(part.lengths, whole.lengths[first : first + size])


def played_alone(
    policy: Callable[[Tensor], Tensor], seed: int, prepare: Callable[[Tensor], Tensor]
) -> tuple[float, list[Tensor]]:
    """Play one episode of one plain module; return its return and the observations that it acted on."""
    (env,) = toys([1], 5)
    obs, total, seen, over = env.reset(torch.tensor([seed])), 0.0, [], False
    while not over:
        seen.append(obs[0])
        with torch.no_grad():
            action = policy(prepare(obs)).clamp(-1, 1)
        obs, reward, terminated, truncated = env.step(action)
        total += float(reward)
        over = bool(terminated | truncated)
    return total, seen


@pytest.mark.parametrize(("slots", "normalized"), [([4], False), ([3, 2], True)])
def test_equals_playing_every_member_alone(family: Family, slots: list[int], normalized: bool) -> None:
    population = population_of(MLP(5, 6, hidden=(8,), output_gain=1.0), family, 6)
    seeds = coded_seeds(6, 2) % 6  # short episodes: the dynamics are chaotic
    norm = ObservationNorm(5)
    norm.update(Moments(4.0, torch.full((5,), 2.0, dtype=torch.float64), torch.full((5,), 2.0, dtype=torch.float64)))
    settings: dict[str, Any] = {"observation_norm": norm} if normalized else {}
    rollout = run(population, toys(slots, 5), Episodes(seeds, moment_jobs=MOMENT_JOBS), **settings)
    observed = []
    for n in range(6):
        for episode in range(2):
            prepare = norm if normalized else Tensor.float
            expected, seen = played_alone(population.member(n), int(seeds[n, episode]), prepare)
            assert rollout.episode_returns[n, episode] == pytest.approx(expected, abs=1e-4)
            assert rollout.lengths[n, episode] == len(seen)
            observed += seen
    stacked = torch.stack(observed)
    assert rollout.moments.count == len(stacked)
    torch.testing.assert_close(rollout.moments.total, stacked.sum(0), rtol=0, atol=1e-3)
    torch.testing.assert_close(rollout.moments.squares, stacked.square().sum(0), rtol=0, atol=1e-3)


@pytest.mark.parametrize("slots", [[1], [3], [12], [2, 3]])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_memory_begins_anew_with_every_episode(family: Family, slots: list[int], cell: Literal["gru", "lstm"]) -> None:
    """Slots take the next job immediately, and rows move late in a generation; recurrent states must follow members."""
    policy = Recurrent(5, 6, hidden=(4, 3), cell=cell, output_gain=1.0)
    population = population_of(policy, family, 6)
    seeds = coded_seeds(6, 2) % 6  # short episodes: the dynamics are chaotic
    rollout = run(population, toys(slots, 5), Episodes(seeds))
    for n in range(6):
        member = population.member(n)
        for episode in range(2):
            state = torch.zeros(1, policy.state_size)

            def remembering(x: Tensor, member: nn.Module = member) -> Tensor:
                nonlocal state
                output, state = member(x, state)
                return output

            expected, seen = played_alone(remembering, int(seeds[n, episode]), Tensor.float)
            assert rollout.episode_returns[n, episode] == pytest.approx(expected, abs=1e-4)
            assert rollout.lengths[n, episode] == len(seen)


def test_slots_do_not_matter_to_the_bit_with_memory() -> None:
    population = population_of(Recurrent(17, 6, hidden=(16,), output_gain=1.0), Flipout(), 14)
    one_each = run(population, toys([14], 17))
    for slots in LAYOUTS:
        assert same(run(population, toys(slots, 17)), one_each), f"{slots} slots"


def test_moments_only_where_they_are_wanted() -> None:
    population = population_of(MLP(5, 6), Flipout(), 6)
    without = run(population, toys([4], 5), Episodes(start_seeds(population, 1)))
    assert without.moments.count == 0
    assert torch.equal(without.returns, run(population, toys([4], 5)).returns)


def test_moments_equal_the_observations_of_live_steps() -> None:
    envs = toys([4, 3], 5)
    population = population_of(MLP(5, 6, hidden=(8,), output_gain=1.0), Flipout(), 10)
    rollout = run(population, envs)
    acted_on = torch.stack([step.obs for env in envs for step in env.trace])
    assert rollout.moments.count == len(acted_on) == rollout.env_steps == int(rollout.lengths.sum())
    torch.testing.assert_close(rollout.moments.total, acted_on.sum(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rollout.moments.squares, acted_on.square().sum(0), rtol=1e-12, atol=1e-12)


def test_action_map_may_be_given() -> None:
    population = population_of(MLP(5, 6, hidden=(8,), output_gain=5.0), Flipout(), 6)
    (clipping,), (squashing,) = toys([6], 5), toys([6], 5)
    run(population, clipping)
    run(population, squashing, action_map=ActionMap(UNIT_BOX, squash="tanh"))
    clipped = torch.stack([step.action for step in clipping.trace])
    squashed = torch.stack([step.action for step in squashing.trace])
    assert clipped.abs().max() == 1
    assert squashed.abs().max() < 1
    # the first step of every episode is the same, so its actions can be compared
    torch.testing.assert_close(squashed[:6].atanh().clamp(-1, 1), clipped[:6], rtol=0, atol=1e-3)


@pytest.mark.parametrize("slots", [[2], [2, 1]])
def test_discrete_actions(slots: list[int]) -> None:
    space = gymnasium.spaces.Discrete(3, start=5)
    envs = [ToyEnv(s, lambda seed: 1 + seed % 4, action_space=space) for s in slots]
    population = population_of(Linear(3, 3), Flipout(), 8)
    run(population, envs, Episodes(coded_seeds(8, 1)))
    chosen = set()
    for seed, steps in by_seed(envs).items():
        member = population.member((seed - 7) // 3)
        for step in steps:
            assert step.action.dtype == torch.int64
            scores = member(step.obs.float())
            best = scores.topk(2).values
            if best[0] - best[1] > 1e-3:
                assert int(step.action) == 5 + int(scores.argmax())
            chosen.add(int(step.action))
    assert chosen == {5, 6, 7}


def test_unperturbed_module_plays_many_episodes() -> None:
    module = MLP(5, 6, hidden=(8,), output_gain=1.0)
    seeds = coded_seeds(7, 1) % 6
    rollout = run(Unperturbed(module, 7), toys([3, 2], 5), Episodes(seeds))
    for n in range(7):
        assert rollout.returns[n].item() == pytest.approx(
            played_alone(module, int(seeds[n]), Tensor.float)[0], abs=1e-4
        )


def test_antithetic_partners_share_their_start_and_nobody_else() -> None:
    seeds = start_seeds(population_of(nn.Linear(2, 1), Flipout(), 40), 3)
    assert (seeds.shape, seeds.dtype) == ((40, 3), torch.int64)
    assert torch.equal(seeds[0::2], seeds[1::2])
    assert len(seeds.unique()) == 60
    assert int(seeds.min()) >= 0


def test_members_without_partners_have_starts_of_their_own() -> None:
    seeds = start_seeds(population_of(nn.Linear(2, 1), Flipout(), 41, antithetic=False), 3)
    assert len(seeds.unique()) == 123


def test_common_starts() -> None:
    seeds = start_seeds(population_of(nn.Linear(2, 1), Flipout(), 10), 3, common=True)
    assert torch.equal(seeds, seeds[:1].expand(10, 3))
    assert len(seeds[0].unique()) == 3


@pytest.mark.parametrize("common", [False, True])
def test_every_generation_starts_elsewhere_and_a_shard_where_the_whole_does(common: bool) -> None:
    module = nn.Linear(2, 1)
    whole = start_seeds(population_of(module, Flipout(), 20), 2, common)
    later = start_seeds(population_of(module, Flipout(), 20, generation=3), 2, common)
    assert not (whole == later).any()
    shard = population_of(module, Flipout(), 8, first=6, of=20)
    assert torch.equal(start_seeds(shard, 2, common), whole[6:14])


def test_fewer_episodes_start_like_the_first_of_more() -> None:
    population = population_of(nn.Linear(2, 1), Flipout(), 20)
    assert torch.equal(start_seeds(population, 2), start_seeds(population, 5)[:, :2])


def test_seeds_are_the_addressed_ones_by_default() -> None:
    population = population_of(Linear(5, 6), Flipout(), 6)
    envs = toys([2, 1], 5, cap=1)
    run(population, envs, Episodes(start_seeds(population, 2), step_cap=1))
    played = sorted(seed for env in envs for seed in env.reset_seeds)
    assert played == sorted(start_seeds(population, 2).flatten().tolist())


def physics_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "physics" in thread.name]


@pytest.mark.parametrize("after", [0, 1, 5])
def test_should_stop_interrupts_before_the_next_step(after: int) -> None:
    env = ToyEnv(2, lambda seed: 50)
    asked = iter(range(100))
    with pytest.raises(RolloutInterrupted):
        run(SignedPopulation(4), env, Episodes(coded_seeds(4, 1)), should_stop=lambda: next(asked) == after)
    assert len(env.masks) == after


def test_should_stop_interrupts_two_batches_and_leaves_no_thread() -> None:
    envs = [ToyEnv(2, lambda seed: 50) for _ in range(2)]
    asked = iter(range(100))
    with pytest.raises(RolloutInterrupted):
        run(SignedPopulation(8), envs, Episodes(coded_seeds(8, 1)), should_stop=lambda: next(asked) == 5)
    assert all(4 <= len(env.masks) <= 7 for env in envs)
    assert not physics_threads()


def test_should_stop_that_never_does_changes_nothing() -> None:
    def play(**settings: Any) -> Rollout:
        return run(SignedPopulation(4), ToyEnv(2, lambda seed: 5), Episodes(coded_seeds(4, 1)), **settings)

    assert same(play(), play(should_stop=lambda: False))


@pytest.mark.parametrize("call", [1, 4])
@pytest.mark.parametrize("failing", [[True], [True, False], [False, True]])
def test_failure_of_an_environment_reaches_the_caller(failing: list[bool], call: int) -> None:
    envs = [ToyEnv(2, lambda seed: 5, fail_at_call=call if fails else None) for fails in failing]
    with pytest.raises(EnvironmentFailureError, match="the toy broke"):
        run(SignedPopulation(8), envs, Episodes(coded_seeds(8, 1)))
    assert not physics_threads()


@pytest.mark.parametrize("slots", [[2], [2, 2]])
def test_failure_of_the_policy_reaches_the_caller(slots: list[int]) -> None:
    def broken(obs: Tensor) -> Tensor:
        raise ZeroDivisionError("the policy broke")

    envs = [ToyEnv(s, lambda seed: 5) for s in slots]
    with pytest.raises(ZeroDivisionError, match="the policy broke"):
        run(SignedPopulation(8), envs, Episodes(coded_seeds(8, 1)), observation_norm=broken)
    assert not physics_threads()


@pytest.mark.parametrize("slots", [[9, 4], [4, 9], [1, 9]])
def test_second_batch_may_have_nothing_to_do(slots: list[int]) -> None:
    envs = [ToyEnv(s, lambda seed: 3) for s in slots]
    rollout = run(SignedPopulation(4), envs, Episodes(coded_seeds(4, 1)))
    assert rollout.lengths.flatten().tolist() == [3] * 4


@pytest.mark.parametrize("episodes", [0, -1])
def test_no_episodes(episodes: int) -> None:
    population = population_of(Linear(3, 1), Flipout(), 2)
    with pytest.raises(ValueError, match=f"at least 1, got {episodes}"):
        run(population, ToyEnv(1, lambda seed: 1), episodes)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Episodes(torch.zeros(2, 0, dtype=torch.int64))
    with pytest.raises(ValueError, match=f"step_cap must be at least 1, got {episodes}"):
        Episodes(torch.zeros(2, 1, dtype=torch.int64), step_cap=episodes)


@pytest.mark.parametrize("shape", [(1, 2), (3, 2), (4, 1)])
def test_seeds_of_another_population(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"\(2, {shape[1]}\), got \({shape[0]}, {shape[1]}\)"):
        run(SignedPopulation(2), ToyEnv(1, lambda seed: 1), Episodes(torch.zeros(shape, dtype=torch.int64)))


@pytest.mark.parametrize("seeds", [torch.zeros(2, dtype=torch.int64), torch.zeros(2, 1, 1, dtype=torch.int64)])
def test_seeds_are_a_matrix(seeds: Tensor) -> None:
    with pytest.raises(ValueError, match=r"seeds must have shape \(P, E\)"):
        Episodes(seeds)


def test_seeds_are_whole_numbers() -> None:
    with pytest.raises(ValueError, match="seeds must be int64"):
        Episodes(torch.zeros(2, 1))


def test_seeds_are_needed_without_a_population() -> None:
    with pytest.raises(ValueError, match="seeds are needed"):
        run(SignedPopulation(2), ToyEnv(1, lambda seed: 1))
