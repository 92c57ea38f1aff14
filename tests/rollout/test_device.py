"""The rollout on a device: bitwise identical to ``run`` for any number of slots, steps per launch and refills."""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import gymnasium
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from no_synchronization import no_synchronization
from numpy.typing import NDArray
from populations import agent_of, build_on_device, population_of
from torch import Tensor

from es_flipout.config import TrainConfig
from es_flipout.envs import make_env
from es_flipout.envs.native import NativeBatchEnv
from es_flipout.envs.observed import observe
from es_flipout.envs.torch_env import TorchBatchEnv, TorchTask
from es_flipout.errors import UserError
from es_flipout.perturbations import Family, Flipout
from es_flipout.policies.action_map import ActionMap
from es_flipout.policies.networks import MLP, Recurrent
from es_flipout.policies.observation_norm import ObservationNorm
from es_flipout.rollout.device import DeviceEnv, LaunchOptions
from es_flipout.rollout.device_player import DevicePlayer
from es_flipout.rollout.episodes import (
    MOMENT_JOBS,
    Ends,
    Episodes,
    Rollout,
    RolloutInterrupted,
    Segments,
    start_seeds,
)
from es_flipout.rollout.host import run
from es_flipout.strategy.population import Population
from es_flipout.strategy.unperturbed import Unperturbed
from es_flipout.training.setup import make_trainer

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Chaos(TorchTask):
    """Three numbers that move chaotically under the actions, so that a single wrong bit shows; the number of steps is
    drawn at the start. With ``breaking``, about every fourth episode becomes non-finite in its second step."""

    observation_space = gymnasium.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    longest: int = 9
    breaking: bool = False

    def start(self, rng: np.random.Generator) -> NDArray[np.float64]:
        return np.array([rng.integers(1, self.longest + 1), 0, rng.uniform() < 0.25, *rng.uniform(-1, 1, 3)])

    def advance(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        length, t, breaks, *place = state.unbind()
        push = torch.stack([*action.double().T, action[:, 0].double()])
        moved = 1 - 1.9 * (0.75 * torch.stack(place) + 0.25 * push).abs()
        if self.breaking:
            moved = torch.where((breaks > 0) & (t == 1), torch.nan, moved)
        reward = moved[0] + 2 * moved[1]
        return torch.stack([length, t + 1, breaks, *moved]), reward, t + 1 >= length

    def observe(self, state: Tensor) -> Tensor:
        return state[3:].T.float()


class ChaosInParts(TorchBatchEnv):
    """Behaves like an environment whose physics cannot be captured; parts in the wrong order give NaN."""

    capturable = False

    def begin_step(self, action: Tensor, live: Tensor | None = None) -> None:
        if not hasattr(self, "_action"):
            self._action, self._to_step = torch.empty_like(action), torch.empty_like(self.diverged)
        self._action.copy_(action)
        self._to_step.copy_(torch.ones_like(self.diverged) if live is None else live)

    def run_physics(self) -> None:
        outcome = super().step(self._action, self._to_step)
        self._action.fill_(torch.nan)
        if not hasattr(self, "_outcome"):
            self._outcome = tuple(torch.empty_like(part) for part in outcome)
        for own, part in zip(self._outcome, outcome, strict=True):
            own.copy_(part)

    def end_step(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        obs, reward, terminated, truncated = (part.clone() for part in self._outcome)
        self._outcome[1].fill_(torch.nan)
        return obs, reward, terminated, truncated

    def step(self, action: Tensor, live: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        self.begin_step(action, live)
        self.run_physics()
        return self.end_step()


def chaos(
    slots: int, limit: int = -1, kind: type[TorchBatchEnv] = TorchBatchEnv, device: torch.device = CPU, **task: Any
) -> TorchBatchEnv:
    env = kind("CartPole-v1", Chaos(**task), slots, {"max_episode_steps": limit}, device)
    env.alive_bonus = 0.25
    return env


def seeds_of(count: int, episodes: int, first: int = 7) -> Tensor:
    return (3 * torch.arange(count * episodes) + first).view(count, episodes)


def tensors_in(item: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Yield all tensors reachable through attributes and containers: an oracle for what a rollout holds."""
    seen = set() if seen is None else seen
    if isinstance(item, Tensor):
        yield item
    elif id(item) not in seen and not isinstance(item, type):
        seen.add(id(item))
        parts = item.values() if isinstance(item, dict) else item if isinstance(item, list | tuple | set) else None
        for part in getattr(item, "__dict__", {}).values() if parts is None else parts:
            yield from tensors_in(part, seen)


def same(a: Rollout, b: Rollout) -> bool:
    """Return whether two rollouts are bitwise identical."""
    return (
        torch.equal(a.episode_returns, b.episode_returns)
        and torch.equal(a.lengths, b.lengths)
        and torch.equal(a.fitness, b.fitness)
        and a.moment_blocks.count == b.moment_blocks.count
        and torch.equal(a.moment_blocks.total, b.moment_blocks.total)
        and torch.equal(a.moment_blocks.squares, b.moment_blocks.squares)
        and a.diverged == b.diverged
        and (a.ends is None) == (b.ends is None)
        and (a.ends is None or b.ends is None or same_ends(a.ends, b.ends))
    )


def same_ends(a: Ends, b: Ends) -> bool:
    return torch.equal(a.running, b.running) and torch.equal(a.states.nan_to_num(), b.states.nan_to_num())


def play(player: DevicePlayer, population: Population | Unperturbed, seeds: Tensor, **settings: Any) -> Rollout:
    return player.play(population, Episodes(seeds, moment_jobs=MOMENT_JOBS), **settings)


def player_of(
    make: Callable[[int], Any], slots: int, say: Callable[[str], None] | None = None, *, steps: int = 8, **agent: Any
) -> DevicePlayer:
    return DevicePlayer(agent_of(chaos(1), **agent), make, slots, say, LaunchOptions(steps))


@settings(max_examples=60)
@given(
    pairs=st.integers(1, 6),
    episodes=st.integers(1, 3),
    slots=st.integers(1, 14),
    steps=st.integers(1, 11),
    longest=st.integers(1, 14),
    limit=st.sampled_from([-1, 1, 4, 9]),
    cap=st.one_of(st.none(), st.integers(1, 12)),
    moment_jobs=st.sampled_from([0, 1, 5, 99]),
    kind=st.sampled_from([TorchBatchEnv, ChaosInParts]),
    first=st.integers(0, 10**6),
)
def test_equals_the_rollout_on_the_host_to_the_bit(
    pairs: int,
    episodes: int,
    slots: int,
    steps: int,
    longest: int,
    limit: int,
    cap: int | None,
    moment_jobs: int,
    kind: type[TorchBatchEnv],
    first: int,
) -> None:
    population = population_of(MLP(3, 2, hidden=(4,), output_gain=1.0), Flipout(), 2 * pairs)
    seeds = seeds_of(2 * pairs, episodes, first)
    request = Episodes(seeds, step_cap=cap, remove_alive_bonus=True, moment_jobs=moment_jobs)
    task = {"longest": longest, "breaking": first % 2 == 1}
    expected = run(population, chaos(5, limit, **task), request)
    player = player_of(lambda n: chaos(n, limit, kind, **task), slots, steps=steps)
    assert same(player.play(population, request), expected)
    # The same episodes in segments, of which each continues the one before it.
    segments = Segments(torch.zeros(2 * pairs, episodes, 1), torch.zeros(2 * pairs, episodes, dtype=torch.int64))
    for _ in range(3):
        request = dataclasses.replace(request, step_cap=cap or 3, segments=segments)
        expected, found = run(population, chaos(5, limit, **task), request), player.play(population, request)
        assert same(found, expected)
        assert found.ends is not None
        segments = Segments(found.ends.states, (segments.elapsed + found.lengths) * found.ends.running)


@pytest.mark.parametrize(("slots", "rows"), [(3, 3), (4, 4), (12, 4)])
def test_observations_are_summed_only_where_they_count(slots: int, rows: int) -> None:
    """With more slots than observed jobs, these are in the first slots, and refills there are not observed."""
    population, request = population_of(MLP(3, 2, (4,)), Flipout(), 20), Episodes(seeds_of(20, 1), moment_jobs=4)
    player = player_of(lambda n: chaos(n), slots, steps=2)
    assert same(player.play(population, request), run(population, chaos(5), request))
    (rollout,) = player._rollouts.values()
    assert rollout._total.shape == rollout._squares.shape == (rows, 3)


def test_the_toy_ends_in_every_way() -> None:
    """Otherwise the comparison above would prove little."""
    population = population_of(MLP(3, 2, hidden=(4,), output_gain=1.0), Flipout(), 40)
    player = player_of(lambda n: chaos(n, 6, breaking=True), 7, steps=4)
    rollout = play(player, population, seeds_of(40, 1))
    assert set(rollout.lengths.flatten().tolist()) == {1, 2, 3, 4, 5, 6}
    assert 0 < rollout.diverged < 20
    assert len(rollout.episode_returns.unique()) > 30


@pytest.mark.parametrize(("policy", "kind"), [("mlp", ChaosInParts), ("lstm", TorchBatchEnv)])
def test_the_same_memory_serves_every_generation(
    family: Family, policy: Literal["mlp", "lstm"], kind: type[TorchBatchEnv]
) -> None:
    """Mean, noise, sigma, statistics and start states change; the chaotic dynamics would reveal a stale value."""
    mlp = MLP(3, 2, (4,), output_gain=1.0)
    module = mlp if policy == "mlp" else Recurrent(3, 2, (3, 2), policy, output_gain=1.0)
    envs: list[DeviceEnv] = []

    def make(slots: int) -> DeviceEnv:
        envs.append(chaos(slots, kind=kind))
        return envs[-1]

    norm = ObservationNorm(3)
    player = player_of(make, 5, steps=3, norm=norm, squash="tanh")
    settings = {"observation_norm": norm, "action_map": player.agent.action_map}
    for generation in range(3):
        population = population_of(module, family, 8, generation=generation, sigma=0.1 * (generation + 1))
        before = {name: p.clone() for name, p in population._module.named_parameters()}
        seeds = start_seeds(population, 2)
        expected = run(population, chaos(3), Episodes(seeds, moment_jobs=MOMENT_JOBS), **settings)
        assert same(play(player, population, seeds), expected), f"generation {generation}"
        score, episodes = Unperturbed(population.member(0), 3, 8), Episodes(seeds[:3, :1])
        assert same(player.play(score, episodes), run(score, chaos(2), episodes, **settings))
        # the memory of the population is not used
        assert all(torch.equal(p, before[name]) for name, p in population._module.named_parameters())
        norm.update(expected.moments)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.1)
    assert len(player._rollouts) == 2
    assert [env.num_envs for env in envs] == [5, 3]


def test_shards_of_one_size_share_memory_and_graphs(family: Family) -> None:
    module = Recurrent(3, 2, (4,), output_gain=1.0)
    player, rollouts = player_of(lambda n: chaos(n), 5), []
    for first in (0, 16, 8):
        shard = population_of(module, family, 8, first=first, of=24)
        seeds = start_seeds(shard, 1)
        assert same(play(player, shard, seeds), run(shard, chaos(3), Episodes(seeds, moment_jobs=MOMENT_JOBS)))
        rollouts += player._rollouts.values()
    assert rollouts == [rollouts[0]] * 3


def test_state_stays_where_it_is_in_memory() -> None:
    """A graph keeps using the addresses that tensors had when it was captured."""
    module, norm = Recurrent(3, 2, (4,), output_gain=1.0), ObservationNorm(3)
    player, places = player_of(lambda n: chaos(n), 3, norm=norm), []
    for generation in range(3):
        population = population_of(module, Flipout(bases=3), 8, generation=generation)
        norm.update(play(player, population, start_seeds(population, 1)).moments)
        (rollout,) = player._rollouts.values()
        own = {name: value for name, value in vars(rollout).items() if name != "_agent"}
        places.append(sorted(tensor.data_ptr() for tensor in tensors_in(own)))
    assert len(places[0]) > 30
    assert places[0] == places[1] == places[2]


@pytest.mark.parametrize(
    "env_id", ["CartPole-v1", "Pendulum-v1", "Acrobot-v1", "MountainCarContinuous-v0", "Hopper-v5"]
)
@pytest.mark.parametrize("slots", [3, 16, 40])
def test_environments_of_this_package(env_id: str, slots: int) -> None:
    env = make_env(env_id, 16, threads=1, max_episode_steps=25)
    size = env.observation_space.shape[0]
    actions = ActionMap(env.action_space)
    population = population_of(MLP(size, actions.size, (8,), output_gain=1.0), Flipout(), 20, row_block=16)
    seeds = start_seeds(population, 2)
    expected = run(population, env, Episodes(seeds, moment_jobs=MOMENT_JOBS))
    player = DevicePlayer(agent_of(env), lambda n: make_env(env_id, n, threads=1, max_episode_steps=25), slots)  # pyright: ignore[reportArgumentType]
    assert same(play(player, population, seeds), expected)


def test_some_entries_of_the_observation() -> None:
    def make(slots: int) -> Any:
        return make_env("CartPole-v1", slots, observed=(2, 0))

    population = population_of(MLP(2, 2, (8,), output_gain=1.0), Flipout(), 10)
    seeds = start_seeds(population, 1)
    expected = run(population, make(6), Episodes(seeds, moment_jobs=MOMENT_JOBS))
    assert same(play(DevicePlayer(agent_of(make(1)), make, 4), population, seeds), expected)


def test_parts_of_the_step_stay_parts_behind_a_partial_observation() -> None:
    """Otherwise the whole step, with its bookkeeping, would run outside of the graphs."""
    population = population_of(MLP(2, 2, (4,), output_gain=1.0), Flipout(), 8)
    seeds, rollouts = seeds_of(8, 1), []
    for kind in (TorchBatchEnv, ChaosInParts):
        player = DevicePlayer(agent_of(chaos(1)), lambda n, kind=kind: observe(chaos(n, kind=kind), (2, 0)), 3)
        rollouts.append(play(player, population, seeds))
        (rollout,) = player._rollouts.values()
        assert (rollout._parts is not None) == (kind is ChaosInParts)
    assert same(*rollouts)


def addresses(rollout: Any) -> dict[str, int]:
    return {name: value.data_ptr() for name, value in vars(rollout).items() if isinstance(value, Tensor)}


def test_compiled_parts_change_no_bit_and_move_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same kernels as without compilation: only what is traced is seen here, not how it is fused."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    population, seeds = population_of(MLP(3, 2, (4,), output_gain=1.0), Flipout(), 8), seeds_of(8, 2)
    expected = run(population, chaos(4), Episodes(seeds, moment_jobs=MOMENT_JOBS))
    options = LaunchOptions(3, compiled=True)
    player = DevicePlayer(agent_of(chaos(1)), partial(chaos, kind=ChaosInParts), 3, launch=options)
    torch._dynamo.utils.counters.clear()
    assert same(play(player, population, seeds), expected)
    (rollout,) = player._rollouts.values()
    before = addresses(rollout)
    assert same(play(player, population, seeds), expected)
    assert addresses(rollout) == before
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]


def test_what_cannot_be_compiled_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no compiler\nset CC")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    population = population_of(MLP(3, 2, (4,)), Flipout(), 8)
    options = LaunchOptions(compiled=True)
    player = DevicePlayer(agent_of(chaos(1)), partial(chaos, kind=ChaosInParts), 3, launch=options)
    with pytest.raises(UserError, match=r"--compile on does not work here: .*no compiler$"):
        play(player, population, seeds_of(8, 1))


def test_starts_are_drawn_ahead_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig.of(
        "CartPole-v1", population_size=8, generations=3, hidden=(4,), score_every=9, score_episodes=2
    )
    here = make_trainer(config.replace(device="cpu", physics="cpu"))
    here.train()
    draw, drawn = NativeBatchEnv._draw, []

    def listening(self: NativeBatchEnv, seeds: NDArray[np.int64]) -> NDArray[np.float64]:
        drawn.append((threading.current_thread() is threading.main_thread(), *seeds[::2].tolist()))
        return draw(self, seeds)

    monkeypatch.setattr(NativeBatchEnv, "_draw", listening)
    there = make_trainer(config.replace(row_block=8), build=build_on_device)
    there.train()
    assert all(torch.equal(there.tensors()[name], value) for name, value in here.tensors().items())
    monkeypatch.undo()
    of_training = [seeds for _, *seeds in drawn if len(seeds) == 4]
    assert len({tuple(seeds) for seeds in of_training}) == len(of_training) == 4  # one generation ahead, each once
    # Only the first generation, memory that is allocated and scores wait for their starts.
    assert [own for own, *seeds in drawn if len(seeds) == 4].count(True) == 1


@pytest.mark.parametrize("asked", [0, 1, 3])
def test_should_stop_is_asked_once_a_launch_and_nothing_is_left_behind(asked: int) -> None:
    population = population_of(MLP(3, 2, (4,), output_gain=1.0), Flipout(), 8)
    seeds, calls = seeds_of(8, 1), []
    env = chaos(2, longest=20)
    steps = [0]
    step = env.step

    def counted(action: Tensor, live: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        steps[0] += 1
        return step(action, live)

    env.step = counted
    player = player_of(lambda n: env, 2, steps=4)

    def should_stop() -> bool:
        calls.append(steps[0])
        return len(calls) > asked

    expected = run(population, chaos(8, longest=20), Episodes(seeds, moment_jobs=MOMENT_JOBS))
    with pytest.raises(RolloutInterrupted):
        play(player, population, seeds, should_stop=should_stop)
    assert np.diff(calls).tolist() == [4] * asked
    assert same(play(player, population, seeds), expected)


def test_launches_too_many_at_the_end_step_nothing() -> None:
    population = population_of(MLP(3, 2, (4,)), Flipout(), 4)
    env = chaos(4, longest=3)
    lives: list[int] = []
    step = env.step

    def listening(action: Tensor, live: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        lives.append(-1 if live is None else int(live.sum()))
        return step(action, live)

    env.step = listening
    rollout = play(player_of(lambda n: env, 4, steps=2), population, seeds_of(4, 1))
    longest = int(rollout.lengths.max())
    assert sum(lives) == rollout.env_steps
    # one call when memory is allocated, and one more launch after the one that ends the last episode
    assert len(lives) == 1 + 2 * (-(-longest // 2) + 1)


@pytest.mark.parametrize("fails", [False, True])
def test_an_error_at_synchronization_ends_with_its_block(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch sets the mode, and then warns that it is a prototype; warnings are errors here."""
    modes: list[str] = []

    def set_mode(mode: str) -> None:
        modes.append(mode)
        warnings.warn("Synchronization debug mode is a prototype feature", UserWarning, stacklevel=1)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    inside = []
    with pytest.raises(RuntimeError, match="waits") if fails else nullcontext(), no_synchronization():
        inside.append(modes[-1])
        if fails:
            raise RuntimeError("waits")
    assert (inside, modes) == (["error"], ["error", "default"])


@pytest.mark.parametrize(("kind", "graphs"), [(TorchBatchEnv, 1), (ChaosInParts, 3)])
def test_all_graphs_share_one_pool(kind: type[TorchBatchEnv], graphs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with a pool of its own would keep the temporary memory of a step three times."""
    pools: list[Any] = []
    events: list[str] = []

    def graph(function: Callable[[], None], pool: Any) -> Callable[[], None]:
        pools.append(pool)
        return function

    population = population_of(MLP(3, 2, (4,), output_gain=1.0), Flipout(), 4)
    player = player_of(lambda n: chaos(n, kind=kind), 4)
    play(player, population, seeds_of(4, 1))
    (rollout,) = player._rollouts.values()
    rollout._use_graphs = True
    monkeypatch.setattr("es_flipout.rollout.device._graph", graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: events.append("waited"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("emptied"))
    rollout._captured()
    assert (len(pools), len(set(map(id, pools)))) == (graphs, 1)
    assert events == ["waited", "waited", "emptied"]


class Greedy(TorchBatchEnv):
    """Runs out of memory with more than ``most`` slots: when it is created, or when it first steps a live slot."""

    most = 3
    at_start = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._look(self.at_start)

    def _look(self, now: bool) -> None:
        if now and self.num_envs > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    def step(self, action: Tensor, live: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        self._look(live is not None and bool(live.any()))
        return super().step(action, live)


@pytest.mark.parametrize("at_start", [False, True])
def test_too_little_memory_halves_the_slots_and_plays_again(at_start: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Greedy, "at_start", at_start)
    population = population_of(MLP(3, 2, (4,), output_gain=1.0), Flipout(), 16)
    seeds, said = seeds_of(16, 1), []
    player = player_of(lambda n: chaos(n, kind=Greedy), 16, said.append)
    assert same(play(player, population, seeds), run(population, chaos(16), Episodes(seeds, moment_jobs=MOMENT_JOBS)))
    assert player.slots == 2
    assert [line for line in said if "too little memory for 16" in line and "continuing with 8" in line]
    assert len(said) == 3


def test_too_little_memory_for_one_slot_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Greedy, "most", 0)
    with pytest.raises(UserError, match="even for one environment"):
        player_of(lambda n: chaos(n, kind=Greedy), 16)


def test_other_errors_are_not_taken_for_too_little_memory() -> None:
    def make(slots: int) -> DeviceEnv:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        player_of(make, 16)


class Crowded(TorchBatchEnv):
    def overflow(self) -> int:
        return 2


def test_overflow_of_contacts_is_told_once() -> None:
    said: list[str] = []
    population = population_of(MLP(3, 2, (4,)), Flipout(), 4)
    player = player_of(lambda n: chaos(n, kind=Crowded), 4, said.append)
    for _ in range(2):
        play(player, population, seeds_of(4, 1))
    (line,) = said
    assert "2 of 4 environments exceeded the maximum number of contacts" in line


# On a GPU: the captured code is the code that is tested above.

gpu = pytest.mark.gpu
CUDA = torch.device("cuda")


def on_cuda(module: torch.nn.Module, family: Family, size: int, generation: int = 2) -> Population:
    return population_of(module.to(CUDA), family, size, generation=generation, row_block=None)


def close(a: Rollout, b: Rollout) -> None:
    assert torch.equal(a.lengths, b.lengths)
    torch.testing.assert_close(a.episode_returns, b.episode_returns, rtol=0, atol=1e-3)
    torch.testing.assert_close(a.moment_blocks.total, b.moment_blocks.total, rtol=0, atol=1e-3)


@gpu
@pytest.mark.parametrize("kind", [TorchBatchEnv, ChaosInParts])
@pytest.mark.parametrize("slots", [3, 16])
def test_graphs_replay_what_plain_calls_do(
    slots: int, kind: type[TorchBatchEnv], family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Recurrent(3, 2, (4,), output_gain=1.0)
    player = player_of(lambda n: chaos(n, kind=kind, device=CUDA, longest=5), slots, steps=3)
    plain = player_of(lambda n: chaos(n, kind=kind, device=CUDA, longest=5), slots, steps=3)
    for generation in range(3):
        population = on_cuda(module, family, 16, generation)
        seeds = start_seeds(population, 1)
        captured = play(player, population, seeds)
        with monkeypatch.context() as patched:
            patched.setattr("es_flipout.rollout.device._graph", lambda function, pool: function)
            eager = play(plain, population, seeds)
        assert same(captured, eager), f"generation {generation}"
        on_host = population_of(module.cpu(), family, 16, generation=generation)
        close(captured, run(on_host, chaos(5, longest=5), Episodes(seeds)))


@gpu
def test_nothing_waits_for_the_device() -> None:
    population = on_cuda(MLP(3, 2, (4,), output_gain=1.0), Flipout(bases=3), 64)
    player = player_of(lambda n: chaos(n, device=CUDA, longest=40), 16)
    seeds = start_seeds(population, 1)
    first = play(player, population, seeds)
    (rollout,) = player._rollouts.values()
    rollout._load(population, Episodes(seeds))
    with no_synchronization():
        rollout._begin()
        rollout._watch.forget()
        launch: Callable[[], None] | None = rollout._launch
        assert launch is not None
        for _ in range(3):
            launch()
            rollout._watch.look(rollout._remaining)
        rollout._whole_launch()  # also without capture
    assert same(play(player, population, seeds), first)


@gpu
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "MountainCarContinuous-v0"])
def test_torch_environments_on_the_gpu(env_id: str) -> None:
    env = make_env(env_id, 8, max_episode_steps=20)
    actions = ActionMap(env.action_space)
    module = MLP(env.observation_space.shape[0], actions.size, (8,), output_gain=1.0)
    seeds = start_seeds(population_of(module, Flipout(), 16), 1)
    expected = run(population_of(module, Flipout(), 16), env, Episodes(seeds))
    player = DevicePlayer(agent_of(env), lambda n: make_env(env_id, n, "cuda", max_episode_steps=20), 6)  # pyright: ignore[reportArgumentType]
    found = play(player, on_cuda(module, Flipout(), 16), seeds)
    assert (found.lengths == expected.lengths).double().mean() > 0.8
    torch.testing.assert_close(found.returns.mean(), expected.returns.mean(), rtol=0.05, atol=1.0)
