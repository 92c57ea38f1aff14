"""The compiled rollout plays what the plain one plays, and its bits depend neither on slots nor on threads.

Fast tests run the recorded graph as it is, without a compiler: it must be bitwise identical to the plain rollout.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
from torch import Tensor, nn

from es_flipout.config import TrainConfig
from es_flipout.errors import UserError
from es_flipout.policies import networks
from es_flipout.policies.action_map import ActionMap
from es_flipout.rollout import compiled, placement
from es_flipout.rollout.builder import build, slots_for
from es_flipout.rollout.compiled import CompilationError, CompiledPlayer, tile_slots
from es_flipout.rollout.episodes import MOMENT_JOBS, Episodes, Rollout, RolloutInterrupted, Segments, start_seeds
from es_flipout.rollout.placement import LEAST_CONTROL_STEPS, with_compilation
from es_flipout.strategy.population import Population
from es_flipout.training.metrics import Silent
from es_flipout.training.setup import make_trainer, resume_trainer

TORCH_ENVS = ("CartPole-v1", "Pendulum-v1", "Acrobot-v1", "MountainCar-v0", "MountainCarContinuous-v0")

# torch's compiler still imports what it has deprecated.
OF_TORCH = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


class Told(Silent):
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Call graphs as they were recorded, on small tiles."""
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
    monkeypatch.setattr(compiled, "_MOST_SLOTS", 32)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def config_of(env_id: str, compile_: str, **fields: Any) -> TrainConfig:
    """Return a configuration with 80 episodes."""
    defaults = {"population_size": 40, "episodes": 2, "sigma": 0.3, "output_gain": 2.0, "activation": "relu"}
    where = {"device": "cpu", "physics": "cpu", "generations": 3, "compile": compile_}
    return TrainConfig.of(env_id, **defaults | where | fields)


def play(config: TrainConfig, *, cap: int | None = 15, segments: bool = False) -> tuple[Population, Rollout, Rollout]:
    """Play the first generation and a second one with another mean and sigma, and close the environments."""
    torch.set_num_threads(1)
    _, strategy, player = build(config)
    try:
        population = strategy.ask()
        rollouts = []
        for sigma in (config.strategy.sigma, config.strategy.sigma / 3):
            strategy.sigma = sigma
            population, shape = strategy.ask(), (config.strategy.population_size, config.task.episodes)
            own = Segments(torch.zeros(*shape, 1, dtype=torch.float64), torch.zeros(shape, dtype=torch.int64))
            request = Episodes(
                start_seeds(population, config.task.episodes),
                step_cap=cap,
                moment_jobs=MOMENT_JOBS if config.policy.observation_norm else 0,
                segments=own if segments else None,
            )
            rollouts.append(player.play(population, request))
            strategy.tell(rollouts[-1].fitness)
    finally:
        player.close()
    return population, *rollouts


def values(rollout: Rollout) -> list[Tensor]:
    ends = [] if rollout.ends is None else [rollout.ends.states, rollout.ends.running]
    return [rollout.episode_returns, rollout.lengths, *vars(rollout.moment_blocks).values(), *ends]


def assert_same(one: Rollout, other: Rollout) -> None:
    for a, b in zip(values(one), values(other), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("env_id", "fields", "segments"),
    [
        *((env_id, {}, False) for env_id in TORCH_ENVS),
        ("CartPole-v1", {"bases": 4, "row_block": 16}, False),
        ("Pendulum-v1", {"perturbation": "low_rank", "rank": 2, "observation_norm": False}, True),
        ("Acrobot-v1", {"perturbation": "dense", "policy": "linear", "observed": (0, 2)}, True),
        ("MountainCar-v0", {"policy": "recurrent", "hidden": (5,), "cell": "lstm"}, False),
        ("Pendulum-v1", {"sigma": 1e30}, False),  # actions that are no numbers
    ],
)
def test_the_recorded_step_is_that_of_the_plain_rollout(env_id: str, fields: dict[str, Any], segments: bool) -> None:
    """Bitwise, with refills, caps, tails of dead slots, and numbers that change between generations."""
    fields = {"row_block": tile_slots(80)} | fields
    _, *plain = play(config_of(env_id, "off", **fields), segments=segments)
    _, *recorded = play(config_of(env_id, "on", slots=50, threads=2, **fields), segments=segments)
    assert len(plain[0].lengths.unique()) > 1 or env_id != "CartPole-v1", "no slot is refilled early"
    for a, b in zip(plain, recorded, strict=True):
        assert_same(a, b)
        assert a.diverged == b.diverged
    assert (plain[0].diverged > 0) == (fields.get("sigma") == 1e30)


@pytest.mark.usefixtures("uncompiled")
def test_values_from_outside_of_the_step_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What NumPy computes would become a constant of the program."""
    monkeypatch.setattr(networks, "is_in_torch_dispatch_mode", lambda: False)
    with pytest.raises(CompilationError, match="values that are not in its memory"):
        play(config_of("CartPole-v1", "on", activation="tanh"))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("after", [0, 3])
def test_stops_when_asked(after: int) -> None:
    _, strategy, player = build(config_of("Pendulum-v1", "on", threads=2))
    answers = iter([False] * after)
    population = strategy.ask()
    with pytest.raises(RolloutInterrupted):
        player.play(population, Episodes(start_seeds(population, 2)), lambda: next(answers, True))
    player.close()


@pytest.mark.usefixtures("uncompiled")
def test_an_error_in_a_thread_ends_the_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    _, strategy, player = build(config_of("Pendulum-v1", "on", threads=2))
    assert isinstance(player, CompiledPlayer)
    population, first = strategy.ask(), player.envs[0]
    request = Episodes(start_seeds(population, 2))
    player.prepare(population, request)
    finish = compiled._Tile.finish

    def failing(tile: compiled._Tile, lock: Any) -> None:
        if tile.env is not first:
            raise ValueError("of the other thread")
        finish(tile, lock)

    monkeypatch.setattr(compiled._Tile, "finish", failing)
    with pytest.raises(ValueError, match="of the other thread"):
        player.play(population, request)
    player.close()


@pytest.mark.parametrize(
    ("jobs", "slots"), [(1, 32), (64, 32), (65, 64), (500, 256), (512, 256), (513, 160), (10**6, 256)]
)
def test_an_even_number_of_tiles_holds_all_episodes(jobs: int, slots: int) -> None:
    assert tile_slots(jobs) == slots


@pytest.mark.parametrize(
    ("env_id", "fields", "choice"),
    [
        ("CartPole-v1", {"env_steps": 80 * LEAST_CONTROL_STEPS, "generations": None}, "on"),
        ("CartPole-v1", {"env_steps": 80 * LEAST_CONTROL_STEPS - 1, "generations": None}, "off"),
        ("CartPole-v1", {"generations": LEAST_CONTROL_STEPS // 500}, "on"),
        ("CartPole-v1", {"generations": LEAST_CONTROL_STEPS // 500 - 1}, "off"),
        ("CartPole-v1", {"generations": LEAST_CONTROL_STEPS // 500, "horizon": 100}, "off"),
        ("CartPole-v1", {"generations": 2, "horizon": 10**12}, "off"),
        ("CartPole-v1", {"generations": LEAST_CONTROL_STEPS // 1000, "slots": 40}, "on"),
        ("CartPole-v1", {"generations": 10**9, "compile": "off"}, "off"),
        ("CartPole-v1", {"generations": 1, "compile": "on"}, "on"),
        ("CartPole-v1", {"generations": 10**9, "backend": "ray"}, "off"),
        ("CartPole-v1", {"generations": 10**9, "device": "cuda", "physics": "gpu"}, "off"),
        ("Hopper-v5", {"generations": 10**9}, "off"),
    ],
)
def test_auto_compiles_long_runs(env_id: str, fields: dict[str, Any], choice: str) -> None:
    assert with_compilation(config_of(env_id, "auto").replace(**fields)).compute.compile == choice


@pytest.mark.parametrize("env_id", TORCH_ENVS)
def test_the_preset_with_most_control_steps_is_compiled(env_id: str) -> None:
    from es_flipout.presets import preset

    config = preset(env_id).replace(device="cpu", physics="cpu")
    assert slots_for(config) > 0
    assert with_compilation(config).compute.compile == ("on" if env_id == "Pendulum-v1" else "off")


@pytest.mark.parametrize(
    ("env_id", "fields"), [("Hopper-v5", {}), ("CartPole-v1", {"backend": "ray"}), ("CartPole-v1", {"device": "cuda"})]
)
def test_on_is_an_error_where_nothing_is_compiled(env_id: str, fields: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"compile on needs an environment written in torch .*{env_id}"):
        with_compilation(config_of(env_id, "on").replace(**fields))


@pytest.mark.slow
@OF_TORCH
def test_without_a_compiler_auto_goes_on_and_on_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh_compiler: None
) -> None:
    from torch._inductor import config as inductor

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    told = Told()
    with inductor.patch({"cpp.cxx": (None, "no-such-compiler")}):
        trainer = make_trainer(config_of("CartPole-v1", "auto", generations=10**9), reporter=told)
        trainer.close()
        with pytest.raises(UserError, match=r"cannot be compiled: .*no-such-compiler.*; use --compile off"):
            make_trainer(config_of("CartPole-v1", "on"))
    assert trainer.config.compute.compile == "off"
    assert not isinstance(trainer.player, CompiledPlayer)
    assert [line for line in told.lines if "going on without compilation" in line and "\n" not in line]


@pytest.mark.usefixtures("uncompiled")
def test_resume_keeps_what_auto_decided(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = config_of("CartPole-v1", "auto", generations=4, score_every=2, track=())
    whole = make_trainer(config.replace(compile="on"))
    whole.train()
    monkeypatch.setattr(placement, "LEAST_CONTROL_STEPS", 1)
    first = make_trainer(config, tmp_path / "run")
    first.create()
    first.step()
    first.step()
    first.save()
    first.close()
    monkeypatch.setattr(placement, "LEAST_CONTROL_STEPS", LEAST_CONTROL_STEPS)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["compute"]["compile"] == "on"
    resumed = resume_trainer(tmp_path / "run")
    assert isinstance(resumed.player, CompiledPlayer)
    resumed.train()
    for name, value in whole.tensors().items():
        assert torch.equal(value, resumed.tensors()[name]), name
    whole.close()
    resumed.close()


@pytest.mark.slow
@OF_TORCH
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_compiled_bits_do_not_depend_on_slots_and_threads(env_id: str, fresh_compiler: None) -> None:
    fields = {"activation": "tanh", "hidden": (16, 16), "observation_norm": False}
    population, *compiled_ = play(config_of(env_id, "on", threads=2, **fields), cap=None)
    for slots, threads in ((1, 1), (65, 2), (None, 1)):
        _, *others = play(config_of(env_id, "on", slots=slots, threads=threads, **fields), cap=None)
        for a, b in zip(compiled_, others, strict=True):
            assert_same(a, b)
    for member in range(0, 40, 3):  # and they are, up to rounding, what Gymnasium plays
        seed = int(start_seeds(population, 2)[member, 0])
        expected, length = in_gymnasium(env_id, population.member(member), seed)
        assert compiled_[1].lengths[member, 0] == length
        assert float(compiled_[1].episode_returns[member, 0]) == pytest.approx(expected, rel=1e-3)


@torch.no_grad()
def in_gymnasium(env_id: str, policy: nn.Module, seed: int) -> tuple[float, int]:
    """Play one episode in Gymnasium's own environment, and return its return and length."""
    env = gymnasium.make(env_id)
    observation, _ = env.reset(seed=seed)
    actions, total, length, over = ActionMap(env.action_space), 0.0, 0, False
    while not over:
        action = actions(policy(torch.as_tensor(observation)[None]))[0].numpy()
        observation, reward, terminated, truncated, _ = env.step(action)
        total, length, over = total + float(reward), length + 1, terminated or truncated
    env.close()
    return total, length
