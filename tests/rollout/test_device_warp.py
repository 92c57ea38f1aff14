"""Device rollouts with mujoco-warp: bitwise identical on warp's CPU device, with graphs on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("mujoco_warp")

from no_synchronization import no_synchronization
from populations import agent_of, population_of

from es_flipout.envs.mujoco_gpu import make_warp_env
from es_flipout.perturbations import Flipout
from es_flipout.policies.networks import MLP
from es_flipout.presets import preset
from es_flipout.rollout.device import LaunchOptions
from es_flipout.rollout.device_player import DevicePlayer
from es_flipout.rollout.episodes import MOMENT_JOBS, Episodes, start_seeds
from es_flipout.rollout.host import run
from es_flipout.rollout.memory import stored_bytes
from es_flipout.rollout.plan import make_plan
from es_flipout.strategy.population import Population


def make(slots: int, device: str = "cpu") -> Any:
    return make_warp_env("Hopper-v5", slots, device, max_episode_steps=30)


def population_on(device: str) -> Population:
    module = MLP(11, 3, (8,), output_gain=1.0, generator=torch.Generator().manual_seed(0)).to(device)
    return population_of(module, Flipout(), 12, row_block=8 if device == "cpu" else None)


@pytest.mark.slow
def test_equals_the_rollout_on_the_host_to_the_bit() -> None:
    population, env = population_on("cpu"), make(12)
    seeds = start_seeds(population, 1)
    expected = run(population, env, Episodes(seeds, moment_jobs=MOMENT_JOBS))
    assert len(expected.lengths.unique()) > 3
    player = DevicePlayer(agent_of(env), make, 5, launch=LaunchOptions(4))
    for _ in range(2):
        found = player.play(population, Episodes(seeds, moment_jobs=MOMENT_JOBS))
        assert torch.equal(found.episode_returns, expected.episode_returns)
        assert torch.equal(found.lengths, expected.lengths)
        assert torch.equal(found.moment_blocks.squares, expected.moment_blocks.squares)


@pytest.mark.slow
def test_plan_of_a_run_on_a_gpu_that_is_not_here() -> None:
    config = preset("Hopper-v5").replace(population_size=512, slots=200, device="cuda", physics="gpu")
    predicted, env = make_plan(config).parts, make(200)
    assert predicted["environments"] == pytest.approx(stored_bytes(env), rel=0.1)
    assert predicted["environments"] > 200 * 5_000
    assert predicted["working memory of the physics"] == pytest.approx(env.temporary_bytes(), rel=0.1)
    assert predicted["working memory of the physics"] > 200 * 5 * 4 * 40, "five numbers per constraint in the solver"


@pytest.mark.gpu
def test_graphs_on_a_gpu_play_the_same_episodes_and_nothing_waits() -> None:
    population = population_on("cuda")
    seeds = start_seeds(population, 1)
    expected = run(population_on("cpu"), make(12), Episodes(seeds))
    player = DevicePlayer(agent_of(make(1)), lambda n: make(n, "cuda"), 5, launch=LaunchOptions(4))
    for _ in range(2):
        found = player.play(population, Episodes(seeds))
        # Chaotic dynamics amplify rounding differences on the GPU, so only most lengths agree.
        assert (found.lengths == expected.lengths).double().mean() > 0.6
        torch.testing.assert_close(found.returns.mean(), expected.returns.mean(), rtol=0.2, atol=5.0)
    (rollout,) = player._rollouts.values()
    rollout._load(population, Episodes(seeds))
    with no_synchronization():
        rollout._begin()
        launch = rollout._launch
        assert launch is not None
        for _ in range(3):
            launch()
            rollout._watch.look(rollout._remaining)
