import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

from es_flipout.bench.classic.noise_table import noise_table, table_size
from es_flipout.bench.classic.player import ClassicPlayer, _parts, build_classic, center_of, worker_spec
from es_flipout.bench.classic.strategy import ClassicStrategy, TablePopulation, flat_parameters
from es_flipout.bench.classic.worker import BLOCK, Center, ClassicWorker, NumpyActionMap, NumpyPolicy, Played, Task
from es_flipout.cluster.connect import Connection
from es_flipout.config import TrainConfig
from es_flipout.envs import EnvironmentFailureError, make_env
from es_flipout.errors import UserError
from es_flipout.policies.action_map import ActionMap
from es_flipout.policies.agent import Agent
from es_flipout.policies.networks import MLP, Linear
from es_flipout.policies.observation_norm import ObservationNorm
from es_flipout.rollout.episodes import MOMENT_JOBS, Episodes, Rollout, start_seeds
from es_flipout.rollout.host import run
from es_flipout.rollout.placement import place
from es_flipout.strategy.unperturbed import Unperturbed
from es_flipout.training.setup import make_trainer


class Breaks(gymnasium.Env):
    """Raises in its second step."""

    observation_space = Box(-1, 1, (3,), np.float32)
    action_space = Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.steps = 0
        return np.zeros(3, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        if self.steps == 2:
            raise RuntimeError("the motor is hot")
        return np.zeros(3, np.float32), 1.0, False, False, {}


def config_of(env_id: str, **settings: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "population_size": 12,
        "score_episodes": 3,
        "hidden": (8, 8),
        "sigma": 0.3,
        "output_gain": 1.0,
    }
    return TrainConfig.of(env_id, generations=2, **(defaults | settings))


def agent_of(config: TrainConfig) -> Agent:
    env = make_env(config.task.env_id, 1, observed=config.task.observed)
    agent = Agent(config, env.observation_space, env.action_space)
    env.close()
    return agent


def table_population(config: TrainConfig, agent: Agent) -> TablePopulation:
    return ClassicStrategy(
        agent.module, config.strategy.population_size, config.strategy.sigma, antithetic=config.strategy.antithetic
    ).ask()


def normalized(agent: Agent) -> Agent:
    """Set statistics that change every entry."""
    assert isinstance(agent.norm, ObservationNorm)
    size = len(agent.norm.mean)
    agent.norm.count = torch.tensor(10.0, dtype=torch.float64)
    agent.norm.mean = torch.linspace(-0.02, 0.03, size, dtype=torch.float64)
    agent.norm.deviations = torch.linspace(0.1, 4.0, size, dtype=torch.float64)
    agent.norm._freeze()
    return agent


def played(
    config: TrainConfig, agent: Agent, population: TablePopulation, cap: int | None = None, jobs: int = 4096
) -> Played:
    """Play all members by one worker in this process."""
    worker = ClassicWorker(worker_spec(config, agent.module))
    worker.begin(center_of(population, agent.norm, cap, jobs))
    seeds = start_seeds(population, config.task.episodes).numpy()
    return worker.play(Task(0, population.offsets, population.signs, seeds))


# Noise and members.


def test_the_table_holds_standard_normal_numbers_and_room_for_many_windows() -> None:
    table = noise_table(table_size(1))
    assert table.mean() == pytest.approx(0, abs=5 / len(table) ** 0.5)
    assert table.std() == pytest.approx(1, abs=5 / len(table) ** 0.5)
    assert not table.flags.writeable
    assert table_size(1 << 20) == 1 << 24


def test_members_are_the_mean_and_a_window_of_the_table() -> None:
    module = MLP(3, 2, (4,))
    population = ClassicStrategy(module, 6, 0.5, seed=3).ask()
    table, mean = noise_table(table_size(30)), flat_parameters(module)
    assert len(mean) == 3 * 4 + 4 + 4 * 2 + 2
    assert len(set(population.offsets.tolist())) == 3
    for n in range(6):
        window = table[population.offsets[n] :][: len(mean)]
        expected = mean + np.float32(0.5 if n % 2 == 0 else -0.5) * window
        np.testing.assert_allclose(flat_parameters(population.member(n)), expected, rtol=1e-6, atol=1e-7)


def test_windows_follow_from_seed_and_generation() -> None:
    module = Linear(3, 2)
    strategies = [ClassicStrategy(module, 8, 0.5, seed=seed) for seed in (0, 0, 1)]
    first = [strategy.ask().offsets.tolist() for strategy in strategies]
    assert first[0] == first[1] != first[2]
    strategies[0].tell(torch.arange(8.0))
    assert strategies[0].ask().offsets.tolist() != first[0]


@pytest.mark.parametrize("antithetic", [True, False])
def test_population_forward_and_gradient_against_its_members(antithetic: bool) -> None:
    module = MLP(3, 2, (4,))
    strategy = ClassicStrategy(module, 6, 0.5, antithetic=antithetic)
    population = strategy.ask()
    x = torch.randn(6, 3)
    expected = torch.stack([population.member(n)(x[n]) for n in range(6)]).detach()
    torch.testing.assert_close(population(x), expected)
    u = torch.randn(6)
    names = [name for name, _ in module.named_parameters()]
    mean = dict(module.named_parameters())
    for name in names:
        noise = [(dict(population.member(n).named_parameters())[name] - mean[name]) / 0.5 for n in range(6)]
        total = sum(float(weight) * each.detach().double() for weight, each in zip(u, noise, strict=True))
        torch.testing.assert_close(population.weighted_sum(u)[name].double(), total, rtol=1e-4, atol=1e-4)


def test_tell_climbs() -> None:
    goal = torch.tensor([1.0, -2.0, 0.5])
    strategy = ClassicStrategy(torch.nn.Linear(3, 1, bias=False), 64, 0.1, learning_rate=0.1)

    def distance() -> float:
        return float((next(strategy.mean_module().parameters()) - goal).norm().detach())

    before = distance()
    for _ in range(60):
        population = strategy.ask()
        weights = torch.stack([next(population.member(n).parameters())[0] for n in range(64)])
        strategy.tell(-(weights - goal).square().sum(1).detach())
    assert distance() < before / 10


# The worker's parts.


@pytest.mark.parametrize("activation", ["tanh", "relu", "elu", "silu", "gelu"])
def test_numpy_policy_is_the_torch_one(activation: Any) -> None:
    module = MLP(5, 3, (7, 4), activation, output_gain=1.0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    policy = NumpyPolicy(((7, 5, True), (4, 7, True), (3, 4, True)), activation)
    policy.load(flat_parameters(module))
    assert policy.size == len(flat_parameters(module))
    for x in 3 * torch.randn(10, 5):
        policy.input[...] = x.numpy()
        torch.testing.assert_close(torch.from_numpy(policy()), module(x).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_numpy_policy(bias: bool) -> None:
    module = Linear(5, 3, bias)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    policy = NumpyPolicy(((3, 5, bias),), "tanh")
    policy.load(flat_parameters(module))
    x = torch.randn(5)
    policy.input[...] = x.numpy()
    torch.testing.assert_close(torch.from_numpy(policy()), module(x).detach())


@pytest.mark.parametrize("squash", ["clip", "tanh"])
@pytest.mark.parametrize(
    "space",
    [
        Box(-1, 1, (3,), np.float32),
        Box(np.array([-2.0, 0.0, -1.0]), np.array([2.0, 5.0, 1.0]), dtype=np.float64),
        Box(np.array([-np.inf, -1, 0], np.float32), np.array([np.inf, np.inf, 1], np.float32), dtype=np.float32),
        Discrete(3),
        Discrete(3, start=-1),
    ],
    ids=str,
)
def test_actions_are_those_of_the_engine(space: gymnasium.Space, squash: Any) -> None:
    ours, engine = NumpyActionMap(space, squash), ActionMap(space, squash)
    for output in 2 * torch.randn(50, 3):
        kept = output.numpy().copy()
        action = ours(kept)
        assert space.contains(action)
        np.testing.assert_allclose(action, engine(output[None])[0].numpy(), rtol=1e-6, atol=1e-6)
        if isinstance(space, Box):
            assert action.dtype == space.dtype
            assert not np.shares_memory(action, kept)


def test_actions_of_a_box_with_more_dimensions() -> None:
    action = NumpyActionMap(Box(-1, 1, (2, 2), np.float32), "clip")(np.array([0.1, 0.2, 0.3, 2.0], np.float32))
    np.testing.assert_array_equal(action, np.array([[0.1, 0.2], [0.3, 1.0]], np.float32))


# What a worker plays.


@pytest.mark.parametrize(
    ("env_id", "settings", "cap"),
    [
        ("CartPole-v1", {"episodes": 2}, None),
        ("CartPole-v1", {"antithetic": False, "population_size": 5, "policy": "linear"}, 9),
        ("CartPole-v1", {"observed": (0, 2), "observation_norm": False}, None),
        ("Pendulum-v1", {"squash": "tanh"}, 30),
        ("Hopper-v5", {}, None),
    ],
)
def test_a_worker_plays_what_the_engine_plays(env_id: str, settings: dict[str, Any], cap: int | None) -> None:
    config = config_of(env_id, **settings)
    agent = agent_of(config)
    if config.policy.observation_norm:
        normalized(agent)
    population = table_population(config, agent)
    found = played(config, agent, population, cap)
    env = make_env(env_id, 4, threads=1, observed=config.task.observed)
    expected = run(
        population,
        env,
        Episodes(start_seeds(population, config.task.episodes), step_cap=cap, moment_jobs=MOMENT_JOBS),
        observation_norm=agent.norm,
        action_map=agent.action_map,
    )
    env.close()
    assert found.failure is None
    assert found.lengths.tolist() == expected.lengths.tolist()
    assert len(set(found.lengths.flatten().tolist())) > 1 or cap is not None, (
        "all episodes have the same length, so the test proves little"
    )
    torch.testing.assert_close(torch.from_numpy(found.returns), expected.episode_returns, rtol=1e-4, atol=1e-4)
    assert found.counts.sum() == expected.moments.count == expected.env_steps
    sums = torch.from_numpy(found.moments.sum(0))
    torch.testing.assert_close(sums[0], expected.moments.total, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(sums[1], expected.moments.squares, rtol=1e-3, atol=1e-3)


def test_long_episodes_are_summed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("CartPole-v1", episodes=3)
    agent = agent_of(config)
    population = table_population(config, agent)
    whole = played(config, agent, population)
    monkeypatch.setattr("es_flipout.bench.classic.worker._ROWS", 7)
    parts = played(config, agent, population)
    assert int(parts.lengths.max()) > 7
    assert parts.counts.tolist() == whole.counts.tolist()
    np.testing.assert_allclose(parts.moments, whole.moments, rtol=1e-12)


def test_observations_of_the_first_episodes_only() -> None:
    config = config_of("CartPole-v1", episodes=2)
    agent = agent_of(config)
    found = played(config, agent, table_population(config, agent), jobs=5)
    assert found.counts.sum() == found.lengths.flatten()[:5].sum()
    assert played(config, agent, table_population(config, agent), jobs=0).counts.sum() == 0


def test_tasks_do_not_show_in_the_result() -> None:
    config = config_of("Pendulum-v1")
    agent = agent_of(config)
    population = table_population(config, agent)
    whole = played(config, agent, population, cap=5)
    worker = ClassicWorker(worker_spec(config, agent.module))
    worker.begin(center_of(population, agent.norm, 5, 4096))
    seeds = start_seeds(population, 1).numpy()
    tasks = [Task(a, population.offsets[a:b], population.signs[a:b], seeds[a:b]) for a, b in ((8, 12), (0, 8))]
    last, first = [worker.play(task) for task in tasks]
    for name in ("returns", "lengths", "counts", "moments"):
        joined = np.concatenate([getattr(first, name), getattr(last, name)])
        np.testing.assert_array_equal(joined, getattr(whole, name))


def test_the_mean_is_played_without_noise() -> None:
    config = config_of("CartPole-v1")
    agent = normalized(agent_of(config))
    worker = ClassicWorker(worker_spec(config, agent.module))
    unperturbed = Unperturbed(agent.module, 6)
    worker.begin(center_of(unperturbed, agent.norm, None, 0))
    seeds = torch.arange(6)[:, None]
    found = worker.play(Task(0, np.zeros(6, np.int64), np.ones(6, np.float32), seeds.numpy()))
    env = make_env("CartPole-v1", 6)
    expected = run(unperturbed, env, Episodes(seeds), observation_norm=agent.norm)
    assert found.lengths.tolist() == expected.lengths.tolist()


def test_profile_measures_the_environment_and_changes_nothing() -> None:
    config = config_of("CartPole-v1")
    agent = agent_of(config)
    population = table_population(config, agent)
    worker = ClassicWorker(worker_spec(config, agent.module))
    worker.begin(center_of(population, agent.norm, None, 0))
    task = Task(0, population.offsets, population.signs, start_seeds(population, 1).numpy())
    plain, profiled = worker.play(task), worker.play(task, profile=True)
    np.testing.assert_array_equal(plain.returns, profiled.returns)
    assert plain.step_seconds == plain.reset_seconds == 0
    assert 0 < profiled.step_seconds + profiled.reset_seconds < profiled.seconds


def test_what_the_environment_raises_is_told() -> None:
    gymnasium.register("Breaks-v0", lambda **kwargs: Breaks())
    try:
        config = config_of("Breaks-v0")
        agent = agent_of(config)
        found = played(config, agent, table_population(config, agent))
    finally:
        del gymnasium.registry["Breaks-v0"]
    assert found.failure == "RuntimeError: the motor is hot"


def test_a_return_that_is_not_finite_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Breaks, "step", lambda self, action: (np.zeros(3, np.float32), np.nan, True, False, {}))
    gymnasium.register("Breaks-v0", lambda **kwargs: Breaks())
    try:
        config = config_of("Breaks-v0")
        agent = agent_of(config)
        found = played(config, agent, table_population(config, agent))
    finally:
        del gymnasium.registry["Breaks-v0"]
    assert found.diverged == 12
    assert np.isnan(found.returns).all()


def test_other_policies_are_refused() -> None:
    config = config_of("CartPole-v1", policy="recurrent")
    agent = agent_of(config)
    with pytest.raises(UserError, match="mlp and linear, not recurrent"):
        worker_spec(config, agent.module)


def test_a_worker_loads_neither_torch_nor_ray(tmp_path: Path) -> None:
    code = "import sys, es_flipout.bench.classic.worker; print(*sorted({'torch', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("", 0), done.stderr


@pytest.mark.parametrize(
    ("size", "workers", "least"), [(512, 2, 1), (10, 3, 1), (512, 2, 100), (4, 64, 1), (512, 1, 7)]
)
def test_parts_are_whole_blocks_that_get_smaller(size: int, workers: int, least: int) -> None:
    parts = _parts(size, workers, least)
    assert [n for part in parts for n in range(part.start, part.stop)] == list(range(size))
    assert all(part.start % BLOCK == 0 for part in parts)
    sizes = [part.stop - part.start for part in parts]
    assert sizes == sorted(sizes, reverse=True)
    assert all(length >= least for length in sizes[:-1])
    if least == 1:
        assert sizes[0] <= -(-size // (2 * workers)) + BLOCK


# On Ray.


RAY: dict[str, Any] = {"backend": "ray", "worker_kind": "classic"}


def generations(config: TrainConfig, count: int = 3) -> tuple[list[Rollout], torch.Tensor]:
    """Run some generations of a trainer and return them with the weights after them."""
    trainer = make_trainer(config, build=build_classic)
    try:
        return [trainer.generation() for _ in range(count)], torch.from_numpy(
            flat_parameters(trainer.strategy.mean_module())
        )
    finally:
        trainer.close()


def test_the_number_of_workers_does_not_show(ray: Any) -> None:
    one, weights = generations(config_of("CartPole-v1", workers=1, **RAY))
    two, same = generations(config_of("CartPole-v1", workers=2, **RAY))
    assert torch.equal(weights, same)
    for left, right in zip(one, two, strict=True):
        assert torch.equal(left.episode_returns, right.episode_returns)
        assert torch.equal(left.moments.total, right.moments.total)


def test_training_is_that_of_the_engine_with_the_same_noise(ray: Any) -> None:
    config = config_of("CartPole-v1", workers=2, episodes=2, **RAY)
    found, weights = generations(config)
    agent = agent_of(config)
    strategy = ClassicStrategy(
        agent.module,
        config.strategy.population_size,
        config.strategy.sigma,
        learning_rate=config.strategy.learning_rate,
    )
    env = make_env(config.task.env_id, 8)
    for rollout in found:
        expected = run(strategy.ask(), env, 2, observation_norm=agent.norm, action_map=agent.action_map)
        assert torch.equal(rollout.lengths, expected.lengths)
        strategy.tell(expected.fitness)
        assert isinstance(agent.norm, ObservationNorm)
        agent.norm.update(expected.moments)
    torch.testing.assert_close(torch.from_numpy(flat_parameters(strategy.mean_module())), weights, rtol=1e-5, atol=1e-6)


def test_a_killed_worker_changes_nothing(ray: Any) -> None:
    config = config_of("Pendulum-v1", population_size=64, workers=2, **RAY)
    agent, _, player = build_classic(place(config))
    assert isinstance(player, ClassicPlayer)
    try:
        population = table_population(config, agent)

        def play() -> Rollout:
            seeds = start_seeds(population, 1)
            return player.play(population, Episodes(seeds, moment_jobs=MOMENT_JOBS))

        expected = play()
        victim = player.pool._workers[0].actor

        def kill() -> None:
            time.sleep(0.05)
            ray.kill(victim)

        killer = threading.Thread(target=kill)
        killer.start()
        found = play()
        killer.join()
        assert player.pool.replaced == 1
        assert torch.equal(found.episode_returns, expected.episode_returns)
        assert torch.equal(found.moments.squares, expected.moments.squares)
        assert torch.equal(play().episode_returns, expected.episode_returns)
    finally:
        player.close()


def test_more_workers_than_cores_are_warned_of(ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "cores", 1)
    player = build_classic(place(config_of("CartPole-v1", workers=2, **RAY))).player
    player.close()
    assert "2 classic workers share 1 cores" in player.warnings[0]


def test_classic_workers_need_ray_and_no_gpu() -> None:
    with pytest.raises(UserError, match="worker-kind must be engine unless the backend is ray, got classic"):
        config_of("CartPole-v1", worker_kind="classic")
    with pytest.raises(UserError, match="device must be cpu"):
        config_of("CartPole-v1", device="cuda", **RAY)


def test_errors_of_environments_end_the_run(ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("Pendulum-v1", workers=1, **RAY)
    agent, _, player = build_classic(place(config))
    population = table_population(config, agent)
    broken = Center(np.zeros(3, np.float32), 1.0, None, None, 0)
    monkeypatch.setattr("es_flipout.bench.classic.player.center_of", lambda *args: broken)
    try:
        with pytest.raises(EnvironmentFailureError, match="Pendulum-v1 failed: ValueError"):
            player.play(population, Episodes(start_seeds(population, 1)))
    finally:
        player.close()
