"""Start states that are drawn together are those that are drawn one after the other."""

import numpy as np
import pytest
import torch
from gymnasium.utils import seeding

from es_flipout.envs import generators, make_env
from es_flipout.envs.classic import CLASSIC_TASKS
from es_flipout.envs.generators import Generators
from es_flipout.envs.make import make_native_env
from es_flipout.envs.mujoco_tasks import MUJOCO_TASKS

SEEDS = np.array([0, 1, 2**31 - 1, 2**32, 2**40 + 5, 2**63 - 1, *range(7, 3000, 2)])


def test_numbers_are_those_of_numpy() -> None:
    many, high = Generators(SEEDS), np.array([np.pi, 1.0])
    assert many.exact.all()
    drawn = [many.uniform(-0.3, 0.7, 5), many.uniform(low=-high, high=high), many.standard_normal(4)]
    drawn.append(many.uniform(size=(2,)))
    for row, seed in enumerate(SEEDS.tolist()):
        one = seeding.np_random(seed)[0]
        expected = [one.uniform(-0.3, 0.7, 5), one.uniform(low=-high, high=high), one.standard_normal(4), one.random(2)]
        for numbers, same in list(zip(drawn, expected, strict=True))[: 4 if many.exact[row] else 2]:
            np.testing.assert_array_equal(numbers[row], same)
    assert 0.9 < many.exact.mean() < 1


@pytest.mark.parametrize("env_id", [*CLASSIC_TASKS, *MUJOCO_TASKS])
def test_starts(env_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    env = make_native_env(env_id, 1, threads=1)
    expected = np.stack([env.draw_start(seeding.np_random(seed)[0]) for seed in range(100, 300)])
    singly, one_by_one = [], env._drawn_one_by_one
    monkeypatch.setattr(env, "_drawn_one_by_one", lambda seeds: singly.append(len(seeds)) or one_by_one(seeds))
    seeds = torch.arange(299, 99, -1)
    np.testing.assert_array_equal(env.starts(seeds.repeat(2)).numpy(), np.tile(expected[::-1], (2, 1)))
    assert (sum(singly) < 100) == env.starts_together


def test_numbers_that_are_not_those_of_numpy_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = torch.arange(100)
    expected = make_env("Hopper-v5", 100, threads=1).reset(seeds)
    monkeypatch.setattr(generators, "_MULTIPLIER", generators._MULTIPLIER + 4)
    assert torch.equal(make_env("Hopper-v5", 100, threads=1).reset(seeds), expected)
