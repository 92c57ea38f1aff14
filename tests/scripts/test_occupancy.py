"""The simulated cost of a generation is that of a device rollout."""

from typing import Any

import pytest
from populations import agent_of, population_of
from torch import Tensor

from es_flipout.envs import make_env
from es_flipout.perturbations import Flipout
from es_flipout.policies.networks import MLP
from es_flipout.rollout.device import LaunchOptions
from es_flipout.rollout.device_player import DevicePlayer
from es_flipout.rollout.episodes import Episodes, start_seeds
from scripts.speed.occupancy import compacted, in_turns


@pytest.mark.parametrize(("slots", "launch"), [(4, 8), (7, 3), (24, 8)])
def test_counts_the_steps_of_a_device_rollout(slots: int, launch: int) -> None:
    calls = []

    def make(slots: int) -> Any:
        env: Any = make_env("CartPole-v1", slots)
        step = env.step

        def counted(action: Tensor, live: Tensor | None = None) -> Any:
            calls.append(slots)
            return step(action, live)

        env.step = counted
        return env

    player = DevicePlayer(agent_of(make_env("CartPole-v1", 1)), make, slots, launch=LaunchOptions(launch))
    population = population_of(MLP(4, 2, (8,), output_gain=1.0), Flipout(), 24, sigma=2.0)
    lengths = player.play(population, Episodes(start_seeds(population, 1))).lengths.flatten()
    assert len(lengths.unique()) > 5
    cost = in_turns(lengths.tolist(), slots, launch)
    assert calls == [slots] * (cost.steps + 1)  # one call when memory is allocated
    assert cost.computed == slots * cost.steps


def test_halved_batches() -> None:
    lengths = [8] * 12 + [20] * 2 + [64] * 2
    # 16 slots for one launch, 4 for two (until 24), then the fewest until 64, and one launch more
    assert compacted(lengths, 2) == (72, 8 * 16 + 16 * 4 + 48 * 2)
    assert compacted(lengths, 16) == (72, 72 * 16)
    assert in_turns(lengths, 16) == compacted(lengths, 16)
