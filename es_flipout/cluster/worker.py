"""A worker of the engine on Ray, and its messages: it plays shards of a population, and sums blocks of weighted noise.

Messages are packed into bytes here, because that takes Ray a multiple of the time of :mod:`pickle`, which it uses too.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from es_flipout.config import TrainConfig
from es_flipout.perturbations import Family, Members
from es_flipout.policies.networks import initial_state
from es_flipout.randomness import Address
from es_flipout.rollout.builder import build, family_of, forward_settings, slots_for
from es_flipout.rollout.episodes import Episodes, Segments
from es_flipout.rollout.plan import device_slots
from es_flipout.runinfo import versions
from es_flipout.strategy.population import ForwardSettings, Population
from es_flipout.strategy.row_block import tensors_in

_FEWEST_LIKE = 16  # every BLAS has special kernels for fewer rows

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Generation:
    """What all shards of a generation have in common; see :class:`es_flipout.rollout.episodes.Episodes`."""

    number: int
    sigma: float
    step_cap: int | None
    remove_alive_bonus: bool


@dataclass(frozen=True)
class Shard:
    """Consecutive members: the number of the first, and their episodes.

    Attributes:
        first: number of the first member.
        seeds: ``(n, E)`` int64.
        moment_jobs: the number of first jobs of the shard whose observations are summed.
        segments: states ``(n, E, K)`` and elapsed steps ``(n, E)`` of episodes that continue, see
            :class:`es_flipout.rollout.episodes.Segments`; None to play from the start.
    """

    first: int
    seeds: NDArray[np.int64]
    moment_jobs: int
    segments: tuple[NDArray[np.float64], NDArray[np.int64]] | None = None

    def split(self, size: int) -> list[Shard]:
        """Return shards of at most ``size`` members."""
        parts, episodes = [], self.seeds.shape[1]
        for start in range(0, len(self.seeds), size):
            here = slice(start, start + size)
            seeds, segments = self.seeds[here], self.segments
            moment_jobs = min(max(self.moment_jobs - start * episodes, 0), seeds.size)
            own = None if segments is None else (segments[0][here], segments[1][here])
            parts.append(Shard(self.first + start, seeds, moment_jobs, own))
        return parts


@dataclass(frozen=True)
class Outcome:
    """The parts of a shard's rollout that are sent back."""

    returns: NDArray[np.float64]
    lengths: NDArray[np.int64]
    steps_observed: float
    total: NDArray[np.float64]
    squares: NDArray[np.float64]
    diverged: int
    alive_bonus: float
    ends: tuple[NDArray[np.float64], NDArray[np.bool_]] | None = None

    @classmethod
    def join(cls, parts: Sequence[Outcome]) -> Outcome:
        """Join the outcomes of consecutive shards into that of one."""

        def joined(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
            return np.concatenate(arrays)

        ends = [part.ends for part in parts if part.ends is not None]
        return cls(
            joined([part.returns for part in parts]),
            joined([part.lengths for part in parts]),
            sum(part.steps_observed for part in parts),
            joined([part.total for part in parts]),
            joined([part.squares for part in parts]),
            sum(part.diverged for part in parts),
            parts[0].alive_bonus,
            (joined([states for states, _ in ends]), joined([running for _, running in ends])) if ends else None,
        )


@dataclass(frozen=True)
class Block:
    """Consecutive members whose weighted noise is summed: the number of the first, and the weights ``(n,)`` float32."""

    first: int
    weights: NDArray[np.float32]


def packed(message: Any) -> bytes:
    """Pack a message."""
    return pickle.dumps(message, pickle.HIGHEST_PROTOCOL)


def unpacked(message: bytes) -> Any:
    """Unpack a message."""
    return pickle.loads(message)


class ShardWorker:
    """Plays shards; used as a Ray actor, and in tests as an ordinary object."""

    def __init__(self, config: TrainConfig, size: int, threads: int) -> None:
        """Create environments and a policy.

        Args:
            config: configuration of the run.
            size: members per shard.
            threads: number of physics threads.
        """
        torch.set_num_threads(1)
        own = config.replace(threads=threads, overlap=False, backend="local")
        if config.compute.physics == "gpu" and config.compute.slots is None:
            slots = device_slots(own.replace(population_size=size))  # from the memory of this worker's GPU
        else:
            slots = min(size * config.task.episodes, slots_for(config))
        self._agent, strategy, self._player = build(own.replace(slots=slots))
        self._config, module, self._device = config, self._agent.module, strategy.device
        self._forward = forward_settings(config, module)
        if self._device.type == "cpu":
            self._forward = settings_like(self._forward, module, family_of(config), self._agent.obs_dim, slots)
        module.to(self._device)

    def ready(self) -> dict[str, str]:
        """Return the worker's package versions."""
        return versions()

    def play(self, generation: Generation, shard: Shard, weights: Arrays) -> Outcome:
        """Play all episodes of a shard's members with the generation's mean weights and statistics."""
        self._agent.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in weights.items()})
        population = self._population(generation, shard.first, len(shard.seeds))
        seeds, segments = torch.from_numpy(shard.seeds.copy()), None
        if shard.segments is not None:
            states, elapsed = (torch.from_numpy(values.copy()) for values in shard.segments)
            segments = Segments(states, elapsed, begins=bool((elapsed == 0).any()))
        episodes = Episodes(seeds, generation.step_cap, generation.remove_alive_bonus, shard.moment_jobs, segments)
        rollout = self._player.play(population, episodes)
        blocks = rollout.moment_blocks
        return Outcome(
            rollout.episode_returns.numpy(),
            rollout.lengths.numpy(),
            blocks.count,
            blocks.total.numpy(),
            blocks.squares.numpy(),
            rollout.diverged,
            rollout.alive_bonus,
            None if rollout.ends is None else (rollout.ends.states.numpy(), rollout.ends.running.numpy()),
        )

    @torch.no_grad()
    def weighted_sum(self, generation: Generation, block: Block) -> Arrays:
        """Return the sum of the weights of a block's members times their noise, by the names of the parameters."""
        population = self._population(generation, block.first, len(block.weights))
        sums = population.weighted_sum(torch.from_numpy(block.weights.copy()))
        return {name: total.numpy() for name, total in sums.items()}

    def play_packed(self, message: bytes, weights: Arrays) -> bytes:
        """Do :meth:`play` with a packed generation and shard, and pack the outcome."""
        generation, shard = unpacked(message)
        return packed(self.play(generation, shard, weights))

    def sum_packed(self, message: bytes) -> bytes:
        """Do :meth:`weighted_sum` with a packed generation and block, and pack the sums."""
        return packed(self.weighted_sum(*unpacked(message)))

    def _population(self, generation: Generation, first: int, size: int) -> Population:
        strategy = self._config.strategy
        members = Members(strategy.population_size, strategy.antithetic, self._device, size, first)
        address = Address(self._config.schedule.seed, generation.number)
        family = family_of(self._config)
        return Population(self._agent.module, family, members, generation.sigma, address, self._forward)


def settings_like(
    settings: ForwardSettings, module: nn.Module, family: Family, obs_dim: int, rows: int
) -> ForwardSettings:
    """Find the smallest row block for ``rows`` rows at a time that rounds like the row block of ``settings``.

    How a BLAS rounds a row depends only on the shapes, so a trial with random numbers is enough: another order of
    operations would change some of the thousands of outputs.
    """
    reference = settings.row_block
    assert reference is not None, "CPU settings always have a row block"
    members = Members(reference + reference % 2, True, torch.device("cpu"), reference + reference % 2)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(reference, obs_dim, generator=generator)]
    state = initial_state(module, reference, members.device)
    if state is not None:
        inputs.append(torch.randn(state.shape, generator=generator))

    def outputs(row_block: int) -> list[Tensor]:
        population = Population(module, family, members, 0.1, Address(0), ForwardSettings(row_block))
        return tensors_in((population.select(torch.arange(reference))(*inputs),))

    expected = outputs(reference)
    block = min(max(1 << max(rows - 1, 0).bit_length(), _FEWEST_LIKE), reference)
    while block < reference:
        if all(torch.equal(a, b) for a, b in zip(outputs(block), expected, strict=True)):
            return dataclasses.replace(settings, row_block=block)
        block *= 2
    return settings
