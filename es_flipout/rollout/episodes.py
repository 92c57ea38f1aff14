"""What is asked of a rollout and what comes of it: :class:`Episodes` and :class:`Rollout`.

Letters: ``P`` members, ``E`` episodes of each, ``J = P * E`` jobs, ``O`` observation size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from es_flipout.policies.observation_norm import Moments
from es_flipout.randomness import Address, Stream, integers
from es_flipout.strategy.population import Population

# Observation statistics come from this many episodes of a generation at most: their mean is known long before that.
MOMENT_JOBS = 4096
# Jobs whose observations are summed together: sums of whole blocks can be joined without changing a bit.
MOMENT_BLOCK = 16

ShouldStop = Callable[[], bool]


class RolloutInterrupted(Exception):  # noqa: N818  (not an error: the caller asked for it)
    """The caller's ``should_stop`` returned true; nothing of the rollout is kept."""


@dataclass(frozen=True)
class Episodes:
    """A request: which episodes to play, and what to record.

    Attributes:
        seeds: ``(P, E)`` int64, start states of every member's episodes.
        step_cap: end episodes after this many steps, if that is before the environment's own limit.
        remove_alive_bonus: leave the environment's alive bonus out of :attr:`Rollout.fitness`.
        moment_jobs: sum up the observations of this many jobs, the first ones; 0 for none.

    Raises:
        ValueError: ``seeds`` is no int64 matrix of at least one column, or ``step_cap`` is less than 1.
    """

    seeds: Tensor
    step_cap: int | None = None
    remove_alive_bonus: bool = False
    moment_jobs: int = 0

    def __post_init__(self) -> None:
        if self.seeds.ndim != 2:
            raise ValueError(f"seeds must have shape (P, E), got {tuple(self.seeds.shape)}")
        if self.seeds.dtype != torch.int64:
            raise ValueError(f"seeds must be int64, got {self.seeds.dtype}")
        if self.count < 1:
            raise ValueError(f"episodes must be at least 1, got {self.count}")
        if self.step_cap is not None and self.step_cap < 1:
            raise ValueError(f"step_cap must be at least 1, got {self.step_cap}")

    @property
    def count(self) -> int:
        """Episodes of each member, ``E``."""
        return self.seeds.shape[1]

    @property
    def jobs(self) -> int:
        """Episodes of all members, ``J``."""
        return self.seeds.numel()

    @property
    def observed_jobs(self) -> int:
        """Jobs whose observations are summed up."""
        return min(self.moment_jobs, self.jobs)

    def check(self, size: int) -> None:
        """Check that these are episodes of ``size`` members.

        Raises:
            ValueError: they are not.
        """
        if len(self.seeds) != size:
            raise ValueError(f"seeds must have shape ({size}, {self.count}), got {tuple(self.seeds.shape)}")

    def cap_below(self, limit: int | None) -> int | None:
        """The cap, where it is below the environment's own limit; else None."""
        return self.step_cap if self.step_cap is not None and (limit is None or self.step_cap < limit) else None


@dataclass(frozen=True)
class JobResults:
    """What the host or a device knows of every job when all have been played.

    Attributes:
        returns: ``(P, E)`` float64.
        lengths: ``(P, E)`` int64.
        total, squares: ``(jobs, O)`` float64, sums over the observations of each of the first jobs, and of their squares.
        diverged: episodes that ended because the environment's state was no longer finite.
    """

    returns: Tensor
    lengths: Tensor
    total: Tensor
    squares: Tensor
    diverged: int


@dataclass
class Rollout:
    """The results of a population's episodes.

    Attributes:
        episode_returns: ``(P, E)`` float64, the environment's undiscounted returns.
        lengths: ``(P, E)`` int64, steps of every episode.
        moment_blocks: sums over the observations that the policies acted on in the first ``Episodes.moment_jobs`` jobs,
            ``(B, O)``: a row for each ``MOMENT_BLOCK`` jobs, or one for all of them where rollouts are never joined.
        diverged: episodes that ended because the environment's state was no longer finite.
        alive_bonus: the reward of a step's mere survival, which ``fitness`` leaves out; 0 to leave it in.
    """

    episode_returns: Tensor
    lengths: Tensor
    moment_blocks: Moments
    diverged: int
    alive_bonus: float = 0.0

    @classmethod
    def of(cls, jobs: JobResults, alive_bonus: float) -> Rollout:
        """The rollout from the results of its jobs."""
        assert bool((jobs.lengths > 0).all()), "a job was lost"
        steps = float(jobs.lengths.flatten()[: len(jobs.total)].sum())
        moments = Moments(steps, _block_sums(jobs.total), _block_sums(jobs.squares))
        return cls(jobs.returns, jobs.lengths, moments, jobs.diverged, alive_bonus)

    @classmethod
    def join(cls, parts: Sequence[Rollout]) -> Rollout:
        """The rollout of all members from those of consecutive shards of them, bitwise identical to playing them at once.

        The jobs of every shard but the last must fill whole blocks of ``MOMENT_BLOCK``.
        """
        blocks = [part.moment_blocks for part in parts]
        return cls(
            torch.cat([part.episode_returns for part in parts]),
            torch.cat([part.lengths for part in parts]),
            Moments(
                sum(block.count for block in blocks),
                torch.cat([block.total for block in blocks]),
                torch.cat([block.squares for block in blocks]),
            ),
            sum(part.diverged for part in parts),
            parts[0].alive_bonus,
        )

    @cached_property
    def returns(self) -> Tensor:
        """``(P,)`` float64, mean over the member's episodes."""
        return self.episode_returns.mean(1)

    @cached_property
    def fitness(self) -> Tensor:
        """``(P,)`` float64, what to train on: the returns, without the alive bonus where that was asked for."""
        return (self.episode_returns - self.alive_bonus * self.lengths).mean(1)

    @cached_property
    def env_steps(self) -> int:
        """Live environment steps, all episodes together."""
        return int(self.lengths.sum())

    @cached_property
    def moments(self) -> Moments:
        """Sums over the observations, ``(O,)``."""
        blocks = self.moment_blocks
        return Moments(blocks.count, blocks.total.sum(0), blocks.squares.sum(0))

    @cached_property
    def nan_returns(self) -> int:
        """Members whose return is NaN."""
        return int(self.returns.isnan().sum())


def start_seeds(population: Population, episodes: int, common: bool = False) -> Tensor:
    """Seeds of the start states of a generation's episodes, ``(P, E)`` int64; antithetic partners share theirs.

    Args:
        population: its seed and generation address the seeds.
        episodes: ``E``.
        common: give all members the same start states (common random numbers).
    """
    members = population.members
    sources = torch.zeros_like(members.sources) if common else members.sources
    drawn = integers(Address(population.seed, population.generation), Stream.START_STATE, sources, episodes)
    return drawn[members.source_of(torch.arange(members.size, device=drawn.device))].cpu()


def _block_sums(sums: Tensor) -> Tensor:
    """Sums over blocks of jobs, one job after the other: bitwise identical for any slots and shards the jobs were played in."""
    blocks, size = -(-len(sums) // MOMENT_BLOCK), sums.shape[1]
    jobs = torch.cat([sums, sums.new_zeros(blocks * MOMENT_BLOCK - len(sums), size)]).view(blocks, MOMENT_BLOCK, size)
    total = sums.new_zeros(blocks, size)
    for job in range(MOMENT_BLOCK):
        total += jobs[:, job]
    return total
