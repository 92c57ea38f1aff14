"""One builder: training, measurements for ``--device auto`` and plans build the same objects."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from es_flipout.config import TrainConfig
from es_flipout.envs import make_env
from es_flipout.policies.networks import MLP
from es_flipout.rollout import builder, plan
from es_flipout.rollout.builder import build, row_block_of, slots_for
from es_flipout.rollout.placement import measured
from es_flipout.rollout.plan import make_plan
from es_flipout.strategy.evolution_strategy import EvolutionStrategy
from es_flipout.strategy.row_block import row_block_for

MIXED = TrainConfig.of(
    "Hopper-v5", population_size=512, perturbation="dense", hidden=(256, 256), device="cuda", physics="cpu", threads=1
)


class Stop(Exception):  # noqa: N818
    """Raised instead of creating the strategy."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Record the arguments of strategies; none is created, as there is no GPU for it."""
    arguments: list[dict[str, Any]] = []

    def record(module: torch.nn.Module, population_size: int, sigma: float, **settings: Any) -> EvolutionStrategy:
        arguments.append({"population_size": population_size, "sigma": sigma, **settings})
        raise Stop

    monkeypatch.setattr(builder, "EvolutionStrategy", record)
    monkeypatch.setattr(builder.make_strategy, "__defaults__", (None, record))
    return arguments


@pytest.mark.parametrize("compile", ["off", "on"])
def test_players_compile_what_is_asked_for(compile: str) -> None:
    config = TrainConfig.of("CartPole-v1", compile=compile)
    _, player = builder.device_player(config, torch.device("cpu"))
    assert player._launch.compiled == (compile == "on")


@pytest.mark.parametrize("changes", [{}, {"row_block": 64}, {"slots": 100}, {"perturbation": "flipout", "bases": 3}])
def test_a_measurement_builds_what_training_builds(changes: dict[str, Any], asked: list[dict[str, Any]]) -> None:
    """A GPU with physics on the CPU used to be timed in blocks of 128 rows, and trained in blocks of 512."""
    config = MIXED.replace(**changes)
    for make in (build, measured):
        with pytest.raises(Stop):
            make(config)
    trained, timed = asked
    assert trained == timed
    assert trained["row_block"] == (changes.get("row_block") or slots_for(config))
    assert trained["row_block"] != row_block_for(MLP(11, 3, (256, 256)), slots_for(config)), "compare something else"


@pytest.mark.parametrize("physics", ["cpu", "gpu"])
@pytest.mark.parametrize("row_block", [None, 48])
def test_a_plan_has_the_row_block_of_the_run(physics: str, row_block: int | None) -> None:
    """A plan used to ignore an explicit row block on CUDA, which the players do not."""
    config = TrainConfig.of(
        "CartPole-v1", population_size=96, hidden=(8,), device="cuda", physics=physics, row_block=row_block, slots=90
    )
    planned = make_plan(config)
    assert planned.row_block == (row_block or 90)
    assert planned.blocks == (2 if row_block else 1)
    assert row_block_of(config, MLP(4, 2, (8,))) == (row_block or (90 if physics == "cpu" else None))


def test_a_plan_selects_members_where_the_population_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan used to select from a population on CUDA with an index on the CPU."""
    devices: list[torch.device] = []

    class Elsewhere:
        device = torch.device("meta")

        def select(self, members: Tensor) -> None:
            devices.append(members.device)

    strategy = SimpleNamespace(ask=Elsewhere)
    monkeypatch.setattr(plan, "make_strategy", lambda *arguments: strategy)
    make_plan(TrainConfig.of("CartPole-v1", population_size=8, device="cpu", physics="cpu"))
    assert set(devices) == {torch.device("meta")}


def test_the_row_block_does_not_depend_on_lanes_or_the_size_of_a_shard() -> None:
    module = MLP(17, 6)
    config = TrainConfig.of("HalfCheetah-v5", population_size=512, device="cpu", physics="cpu")
    assert row_block_of(config, module) == row_block_for(module, 512) == 512
    assert row_block_of(config.replace(overlap=True), module) == 512
    assert row_block_of(config.replace(population_size=4096), module) == 1024


def test_environments_can_be_wrapped() -> None:
    made = []

    def wrap(env: Any) -> Any:
        made.append(env)
        return env

    config = TrainConfig.of("Hopper-v5", population_size=4, device="cpu", physics="cpu", threads=1, overlap=True)
    agent, strategy, player = build(config, wrap_env=wrap)
    assert [env.num_envs for env in made] == [2, 2]
    assert player.agent is agent
    assert strategy.population_size == 4
    player.close()


def test_a_space_that_is_not_supported_leaves_no_environment_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    def make(*arguments: Any, **kwargs: Any) -> Any:
        env = make_env(*arguments, **kwargs)
        env.close = lambda: closed.append(env)
        return env

    monkeypatch.setattr(builder, "make_env", make)
    with pytest.raises(ValueError, match="ConvNet needs observations"):
        build(TrainConfig.of("CartPole-v1", policy="convnet", device="cpu", physics="cpu"))
    assert len(closed) == 1
