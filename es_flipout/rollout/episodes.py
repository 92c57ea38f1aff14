"""The request to a player and its result: :class:`Episodes` and :class:`Rollout`.

Letters: ``P`` members, ``E`` episodes per member, ``J = P * E`` jobs, ``O`` observation size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from es_flipout.policies.observation_norm import Moments
from es_flipout.randomness import Address, Stream, integers
from es_flipout.strategy.population import Population

# At most this many episodes of a generation contribute observation statistics; more would hardly improve them.
MOMENT_JOBS = 4096
# Number of jobs whose observations are summed together: sums of whole blocks can be joined without changing a bit.
MOMENT_BLOCK = 16

NO_LIMIT = torch.iinfo(torch.int64).max

ShouldStop = Callable[[], bool]


class StartsEnv(Protocol):
    """An environment whose start states are vectors."""

    device: torch.device

    def starts(self, seeds: Tensor) -> Tensor:
        """See :meth:`es_flipout.envs.native.NativeBatchEnv.starts`."""
        ...


class RolloutInterrupted(Exception):  # noqa: N818  (not an error: the caller requested it)
    """The caller's ``should_stop`` returned true; the results of the rollout are discarded."""


@dataclass(frozen=True)
class Segments:
    """States from which interrupted episodes continue.

    Attributes:
        states: ``(P, E, K)`` float64, states of the environments as
            :meth:`es_flipout.envs.native.NativeBatchEnv.states` returns them; ignored for episodes that start from
            their seed.
        elapsed: ``(P, E)`` int64, number of steps so far; 0 for an episode that starts from its seed.
        begins: whether an episode may start from its seed; otherwise no start states are drawn, which takes long.
    """

    states: Tensor
    elapsed: Tensor
    begins: bool = True


@dataclass(frozen=True)
class Episodes:
    """A request: which episodes to play, and what to record.

    Attributes:
        seeds: ``(P, E)`` int64, seeds of the start states.
        step_cap: maximum number of steps per episode, if below the environment's own limit.
        remove_alive_bonus: whether :attr:`Rollout.fitness` excludes the environment's alive bonus.
        moment_jobs: the number of first jobs whose observations are summed; 0 for none.
        segments: continue these episodes instead of starting new ones, and record :attr:`Rollout.ends`; requires
            environments that are a :class:`es_flipout.envs.native.NativeBatchEnv`. None to play from the start.

    Raises:
        ValueError: ``seeds`` is not an int64 matrix with at least one column, ``step_cap`` is less than 1, or
            ``segments`` and ``seeds`` have different shapes.
    """

    seeds: Tensor
    step_cap: int | None = None
    remove_alive_bonus: bool = False
    moment_jobs: int = 0
    segments: Segments | None = None

    def __post_init__(self) -> None:
        if self.seeds.ndim != 2:
            raise ValueError(f"seeds must have shape (P, E), got {tuple(self.seeds.shape)}")
        if self.seeds.dtype != torch.int64:
            raise ValueError(f"seeds must be int64, got {self.seeds.dtype}")
        if self.count < 1:
            raise ValueError(f"episodes must be at least 1, got {self.count}")
        if self.step_cap is not None and self.step_cap < 1:
            raise ValueError(f"step_cap must be at least 1, got {self.step_cap}")
        if self.segments is not None and self.segments.elapsed.shape != self.seeds.shape:
            shapes = tuple(self.seeds.shape), tuple(self.segments.elapsed.shape)
            raise ValueError("segments must have shape {}, got {}".format(*shapes))

    @property
    def count(self) -> int:
        """Episodes per member, ``E``."""
        return self.seeds.shape[1]

    @property
    def jobs(self) -> int:
        """Episodes of all members, ``J``."""
        return self.seeds.numel()

    @property
    def observed_jobs(self) -> int:
        """Number of jobs whose observations are summed."""
        return min(self.moment_jobs, self.jobs)

    def check(self, size: int) -> None:
        """Check that these are episodes of ``size`` members.

        Raises:
            ValueError: the number of members differs.
        """
        if len(self.seeds) != size:
            raise ValueError(f"seeds must have shape ({size}, {self.count}), got {tuple(self.seeds.shape)}")

    def cap_below(self, limit: int | None) -> int | None:
        """Return the cap if it is below the environment's own limit, otherwise None."""
        return self.step_cap if self.step_cap is not None and (limit is None or self.step_cap < limit) else None

    def starts(self, env: StartsEnv) -> Tensor:
        """Return the start states of the jobs, ``(J, K)`` float64 on the device of ``env``."""
        if self.segments is None:
            return env.starts(self.seeds.flatten())
        states = self.segments.states.flatten(0, 1)
        if not self.segments.begins:
            return states.to(env.device, torch.float64, copy=True)
        starts = env.starts(self.seeds.flatten())
        return torch.where(self._continues(self.segments).to(starts.device)[:, None], states.to(starts), starts)

    def caps(self, limit: int | None) -> Tensor:
        """Return the maximum number of steps of every job, ``(J,)`` int64, given the environment's own limit."""
        cap = torch.full((self.jobs,), NO_LIMIT if self.step_cap is None else self.step_cap)
        if limit is None or self.segments is None:
            return cap if limit is None else cap.clamp(max=limit)
        return torch.minimum(cap, limit - self.segments.elapsed.flatten())

    @staticmethod
    def _continues(segments: Segments) -> Tensor:
        return segments.elapsed.flatten() > 0


@dataclass(frozen=True)
class Ends:
    """How segments of episodes ended.

    Attributes:
        states: ``(P, E, K)`` float64, the last state of every segment.
        running: ``(P, E)`` bool, whether the episode itself continues: it neither ended nor reached the time limit.
    """

    states: Tensor
    running: Tensor


@dataclass(frozen=True)
class JobResults:
    """The results of all jobs.

    Attributes:
        returns: ``(P, E)`` float64.
        lengths: ``(P, E)`` int64.
        total, squares: ``(observed jobs, O)`` float64, sums over the observations of each job, and over their squares.
        diverged: number of episodes that ended because the environment's state was no longer finite.
        ends: see :class:`Rollout`.
    """

    returns: Tensor
    lengths: Tensor
    total: Tensor
    squares: Tensor
    diverged: int
    ends: Ends | None = None


@dataclass
class Rollout:
    """The results of a population's episodes.

    Attributes:
        episode_returns: ``(P, E)`` float64, the environment's undiscounted returns.
        lengths: ``(P, E)`` int64, number of steps of every episode.
        moment_blocks: sums over the observations that the policies acted on in the first ``Episodes.moment_jobs`` jobs,
            ``(B, O)``: one row per ``MOMENT_BLOCK`` jobs, or a single row if rollouts are never joined.
        diverged: number of episodes that ended because the environment's state was no longer finite.
        alive_bonus: the reward per step for being alive, which ``fitness`` excludes; 0 to include it.
        ends: how the episodes' segments ended, if segments were requested.
    """

    episode_returns: Tensor
    lengths: Tensor
    moment_blocks: Moments
    diverged: int
    alive_bonus: float = 0.0
    ends: Ends | None = None

    @classmethod
    def of(cls, jobs: JobResults, alive_bonus: float) -> Rollout:
        """Create a rollout from the results of its jobs."""
        assert bool((jobs.lengths > 0).all()), "a job was lost"
        steps = float(jobs.lengths.flatten()[: len(jobs.total)].sum())
        moments = Moments(steps, _block_sums(jobs.total), _block_sums(jobs.squares))
        return cls(jobs.returns, jobs.lengths, moments, jobs.diverged, alive_bonus, jobs.ends)

    @classmethod
    def join(cls, parts: Sequence[Rollout]) -> Rollout:
        """Join the rollouts of consecutive shards; the result is bitwise identical to playing all members at once.

        The jobs of every shard except the last must fill whole blocks of ``MOMENT_BLOCK``.
        """
        blocks = [part.moment_blocks for part in parts]
        ends = [part.ends for part in parts if part.ends is not None]
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
            Ends(torch.cat([end.states for end in ends]), torch.cat([end.running for end in ends])) if ends else None,
        )

    @cached_property
    def returns(self) -> Tensor:
        """``(P,)`` float64, mean over each member's episodes."""
        return self.episode_returns.mean(1)

    @cached_property
    def fitness(self) -> Tensor:
        """``(P,)`` float64, what is ranked: the returns, without the alive bonus if that was requested."""
        return (self.episode_returns - self.alive_bonus * self.lengths).mean(1)

    @cached_property
    def env_steps(self) -> int:
        """Live environment steps of all episodes."""
        return int(self.lengths.sum())

    @cached_property
    def moments(self) -> Moments:
        """Sums over the observations, ``(O,)``."""
        blocks = self.moment_blocks
        return Moments(blocks.count, blocks.total.sum(0), blocks.squares.sum(0))

    @cached_property
    def nan_returns(self) -> int:
        """Number of members whose return is NaN."""
        return int(self.returns.isnan().sum())


def start_seeds(population: Population, episodes: int, common: bool = False, ahead: int = 0) -> Tensor:
    """Draw seeds of start states for a generation, ``(P, E)`` int64; antithetic partners have the same seeds.

    Args:
        population: its seed and generation address the seeds.
        episodes: ``E``.
        common: whether all members have the same start states (common random numbers).
        ahead: draw them for so many generations later.
    """
    members = population.members
    sources = torch.zeros_like(members.sources) if common else members.sources
    address = Address(population.seed, population.generation + ahead)
    drawn = integers(address, Stream.START_STATE, sources, episodes)
    return drawn[members.source_of(torch.arange(members.size, device=drawn.device))].cpu()


def _block_sums(sums: Tensor) -> Tensor:
    """Sum over blocks of jobs, job by job, so that bits do not depend on the slots and shards that played the jobs."""
    blocks, size = -(-len(sums) // MOMENT_BLOCK), sums.shape[1]
    jobs = torch.cat([sums, sums.new_zeros(blocks * MOMENT_BLOCK - len(sums), size)]).view(blocks, MOMENT_BLOCK, size)
    total = sums.new_zeros(blocks, size)
    for job in range(MOMENT_BLOCK):
        total += jobs[:, job]
    return total
