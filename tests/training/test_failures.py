"""Failures that a run survives, and configurations that are refused."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from training_runs import CARTPOLE, Heard, assert_same, rows, train, weights

from es_flipout.config import TrainConfig
from es_flipout.envs.base import EnvironmentFailureError, UnsupportedEnvironmentError
from es_flipout.errors import UserError
from es_flipout.training.checkpoint import load_checkpoint
from es_flipout.training.setup import make_trainer, resume_trainer


class Odd(gymnasium.Env):
    """Gives NaN rewards in episodes whose start is above ``nan_above``; raises in its ``fail_at``-th step overall."""

    observation_space = Box(-1, 1, (1,), np.float32)
    action_space = Box(-1, 1, (1,), np.float32)
    steps = 0

    def __init__(self, nan_above: float = 2.0, fail_at: int | None = None) -> None:
        self.nan_above, self.fail_at = nan_above, fail_at

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t, self.start = 0, self.np_random.uniform(-1, 1)
        return np.array([self.start], np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        Odd.steps += 1
        if Odd.steps == self.fail_at:
            raise RuntimeError("the gearbox fell off")
        reward = math.nan if self.start > self.nan_above else float(action[0])
        return np.array([self.start], np.float32), reward, self.t == 3, False, {}


def make_odd(**kwargs: Any) -> Odd:
    return Odd(**kwargs)


@pytest.fixture
def odd() -> Iterator[TrainConfig]:
    gymnasium.register("Odd-v0", make_odd)
    Odd.steps = 0
    yield TrainConfig.of(
        "Odd-v0",
        generations=5,
        population_size=8,
        hidden=(4,),
        sigma=0.1,
        antithetic=False,
        score_every=100,
        score_episodes=2,
        checkpoint_every=2,
    )
    gymnasium.registry.pop("Odd-v0")


def test_nan_returns_are_counted_and_warned_of_once(tmp_path: Path, odd: TrainConfig) -> None:
    reporter = Heard()
    config = odd.replace(env_kwargs='{"nan_above": 0.0}')
    trainer = train(config, tmp_path, reporter)
    written = rows(tmp_path)
    assert len(written) == 5
    counts = [int(row["nan_returns"]) for row in written]
    assert sum(count > 0 for count in counts) >= 2, "too few generations with NaN to test anything"
    assert all(count < 8 for count in counts)
    assert all(math.isfinite(float(row[name])) for row in written for name in ("mean_return", "best_return"))
    (warning,) = reporter.said
    first = next(k for k, count in enumerate(counts) if count)
    assert f"{counts[first]} of 8 members" in warning
    assert f"generation {first + 1}" in warning
    assert bool(weights(trainer).isfinite().all())
    assert not torch.equal(weights(trainer), weights(make_trainer(config)))


def test_nan_returns_everywhere_change_nothing(tmp_path: Path, odd: TrainConfig) -> None:
    config = odd.replace(env_kwargs='{"nan_above": -2.0}')
    trainer = train(config, tmp_path)
    assert [row["nan_returns"] for row in rows(tmp_path)] == ["8"] * 5
    assert [row["mean_return"] for row in rows(tmp_path)] == ["nan"] * 5
    assert torch.equal(weights(trainer), weights(make_trainer(config)))


@pytest.mark.parametrize("generation", [1, 2, 4])
def test_an_environment_that_raises_keeps_the_generations_before(
    tmp_path: Path, odd: TrainConfig, generation: int
) -> None:
    whole = train(odd, tmp_path / "whole")
    per_generation = odd.strategy.population_size * 3
    Odd.steps = 0
    fail_at = (generation - 1) * per_generation + 10
    broken = odd.replace(env_kwargs=f'{{"fail_at": {fail_at}}}')
    with pytest.raises(EnvironmentFailureError, match=r"Odd-v0.*the gearbox fell off"):
        train(broken, tmp_path / "broken")
    _, progress = load_checkpoint(tmp_path / "broken" / "checkpoints")
    assert progress.generation == generation - 1
    # The environment recovers, and the run continues as if nothing had happened.
    resumed = resume_trainer(tmp_path / "broken")
    resumed.train()
    assert_same(resumed.tensors(), whole.tensors())
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")


def test_an_environment_that_raises_while_it_is_scored_loses_no_row(tmp_path: Path, odd: TrainConfig) -> None:
    odd = odd.replace(score_every=2)
    whole = train(odd, tmp_path / "whole")
    Odd.steps = 0
    fail_at = 2 * odd.strategy.population_size * 3 + 1
    with pytest.raises(EnvironmentFailureError, match="the gearbox fell off"):
        train(odd.replace(env_kwargs=f'{{"fail_at": {fail_at}}}'), tmp_path / "broken")
    resumed = resume_trainer(tmp_path / "broken")
    resumed.train()
    assert_same(resumed.tensors(), whole.tensors())
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")


# Invalid configurations.


def test_an_unknown_environment_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedEnvironmentError, match=r"HalfChetah-v5.*did you mean HalfCheetah-v5"):
        train(CARTPOLE.replace(env_id="HalfChetah-v5"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_needs_an_end() -> None:
    with pytest.raises(UserError, match="set --generations or --env-steps"):
        make_trainer(CARTPOLE.replace(generations=None))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(UserError, match=r"no CUDA GPU.*--device cpu"):
        make_trainer(CARTPOLE.replace(device="cuda"))


def test_the_action_space_must_be_one_that_a_policy_can_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Odd, "action_space", gymnasium.spaces.Text(3))
    gymnasium.register("OddActions-v0", make_odd)
    try:
        with pytest.raises(UnsupportedEnvironmentError, match=r"OddActions-v0.*Text"):
            make_trainer(CARTPOLE.replace(env_id="OddActions-v0"))
    finally:
        gymnasium.registry.pop("OddActions-v0")


def test_discrete_actions_may_start_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def step(self: Odd, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        taken.append(int(action))
        return np.array([self.start], np.float32), 0.0, True, False, {}

    monkeypatch.setattr(Odd, "action_space", Discrete(2, start=7))
    monkeypatch.setattr(Odd, "step", step)
    gymnasium.register("OddStart-v0", make_odd)
    try:
        train(CARTPOLE.replace(env_id="OddStart-v0", sigma=1.0))
    finally:
        gymnasium.registry.pop("OddStart-v0")
    assert set(taken) == {7, 8}
