"""Rollout: a population plays its episodes in a batch of environments.

The ``P * E`` episodes are jobs in a queue. Every slot of the environments plays one job; a slot whose episode ends takes
the next job at once. Dead slots are not stepped and not counted. Given two environments, the physics of one runs in a
thread (which releases the GIL) while the policy works on the other.

Letters: ``P`` members, ``E`` episodes of each, ``J = P * E`` jobs, ``S`` slots of one environment, ``O`` observation size.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from es_flipout.envs.base import BatchEnv
from es_flipout.observation_norm import Identity, Moments
from es_flipout.policies import ActionMap
from es_flipout.population import Population
from es_flipout.randomness import Address, Stream, integers

# Observation statistics come from this many episodes of a generation at most: their mean is known long before that.
MOMENT_JOBS = 4096
# Jobs whose observations are summed together: sums of whole blocks can be joined without changing a bit.
MOMENT_BLOCK = 16

_Outcome = tuple[Tensor, Tensor, Tensor, Tensor]  # what BatchEnv.step returns


class RolloutInterrupted(Exception):  # noqa: N818  (not an error: the caller asked for it)
    """The caller's ``should_stop`` said so; nothing of the rollout is kept."""


class Policies(Protocol):
    """What a rollout needs of a population."""

    size: int

    @property
    def device(self) -> torch.device:
        """Where observations are expected."""
        ...

    def initial_state(self, rows: int) -> Tensor | None:
        """What policies with memory remember at the start of an episode, ``(rows, state size)``; None without memory."""
        ...

    def select(self, members: Tensor) -> Rows:
        """A forward for the given members."""
        ...


class Rows(Protocol):
    """A forward whose row ``i`` belongs to one member, and can be given to another."""

    def __call__(self, *inputs: Tensor) -> Any:
        """``(n, O)`` to ``(n, outputs)``; with memory, that and the state to the outputs and the next state."""
        ...

    def replace(self, rows: Tensor, members: Tensor) -> None:
        """Give rows to other members."""
        ...


@dataclass
class Rollout:
    """What the episodes of a population gave.

    Attributes:
        episode_returns: ``(P, E)`` float64, the environment's undiscounted returns.
        lengths: ``(P, E)`` int64, steps of every episode.
        moment_blocks: sums over the observations that the policies acted on, ``(B, O)``: a row for each ``MOMENT_BLOCK`` jobs,
            of the first ``MOMENT_JOBS`` jobs at most (no rows where they were not wanted).
        diverged: episodes that ended because the environment's state was no longer finite.
        alive_bonus: what a step's mere survival pays and ``fitness`` leaves out; 0 to leave it in.
    """

    episode_returns: Tensor
    lengths: Tensor
    moment_blocks: Moments
    diverged: int
    alive_bonus: float = 0.0

    @classmethod
    def join(cls, parts: Sequence[Rollout]) -> Rollout:
        """The rollout of all members, to the bit, from those of consecutive shares of them.

        The jobs of every share but the last must fill whole blocks of ``MOMENT_BLOCK``.
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
        """``(P,)`` float64, the returns less the alive bonus that was asked to be removed: what to train on."""
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


def run(
    population: Policies,
    env: BatchEnv | Sequence[BatchEnv],
    episodes: int = 1,
    *,
    observation_norm: Callable[[Tensor], Tensor] | None = None,
    action_map: ActionMap | None = None,
    seeds: Tensor | None = None,
    max_episode_steps: int | None = None,
    remove_alive_bonus: bool = False,
    collect_moments: bool = True,
    moment_jobs: int = MOMENT_JOBS,
    should_stop: Callable[[], bool] | None = None,
) -> Rollout:
    """Play ``episodes`` episodes of every member.

    Args:
        population: the members.
        env: one environment batch, or two (of any sizes) to overlap physics with the policy.
        episodes: ``E``.
        observation_norm: applied to observations before the policy; only converts to float32 by default.
        action_map: turns outputs into actions; by default the one of the environment's action space.
        seeds: ``(P, E)`` int64, start states; by default addressed by the population's seed and generation.
        max_episode_steps: end episodes after this many steps, if that is before the environment's own limit.
        remove_alive_bonus: leave the environment's alive bonus out of ``fitness``.
        collect_moments: sum up the observations for a normalisation.
        moment_jobs: of this many jobs at most, the first ones.
        should_stop: asked once a step; true ends the rollout with :class:`RolloutInterrupted`.

    Returns:
        The returns, lengths and observation moments.

    Raises:
        ValueError: ``episodes`` or ``max_episode_steps`` is less than 1, or ``seeds`` has another shape.
        EnvironmentFailureError: the environment's own code raised.
    """
    envs = [env] if isinstance(env, BatchEnv) else list(env)
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}")
    if max_episode_steps is not None and max_episode_steps < 1:
        raise ValueError(f"max_episode_steps must be at least 1, got {max_episode_steps}")
    if seeds is None:
        if not isinstance(population, Population):
            raise ValueError("seeds are needed for anything but a Population")
        seeds = start_seeds(population, episodes)
    if seeds.shape != (population.size, episodes):
        raise ValueError(f"seeds must have shape ({population.size}, {episodes}), got {tuple(seeds.shape)}")
    size = envs[0].observation_space.shape[0]
    jobs = _Jobs(population.size, episodes, seeds, size, moment_jobs if collect_moments else 0)
    norm = observation_norm if observation_norm is not None else Identity()
    actions = action_map if action_map is not None else ActionMap(envs[0].action_space)
    limit = envs[0].max_episode_steps
    cap = max_episode_steps if max_episode_steps is not None and (limit is None or max_episode_steps < limit) else None
    own_actions = copy.copy(actions).to(population.device)  # the caller's stays where it is
    lanes = [_Lane(e, population, jobs, norm, own_actions, cap) for e in envs]
    if len(lanes) == 1:
        _run_alone(lanes[0], should_stop)
    else:
        _run_overlapped(lanes, should_stop)
    return jobs.result(envs[0].alive_bonus if remove_alive_bonus else 0.0)


def _run_alone(lane: _Lane, should_stop: Callable[[], bool] | None) -> None:
    while lane.any_live:
        if should_stop is not None and should_stop():
            raise RolloutInterrupted
        lane.absorb(*lane.env.step(lane.act(), lane.live_mask))


def _run_overlapped(lanes: list[_Lane], should_stop: Callable[[], bool] | None) -> None:
    """Every lane has a thread that steps its environment; this one serves the lanes in turn, so the order is fixed."""
    steppers = [_Stepper(lane) for lane in lanes if lane.any_live]
    try:
        for stepper in steppers:
            stepper.send()
        waiting = steppers
        while waiting:
            if should_stop is not None and should_stop():
                raise RolloutInterrupted
            for stepper in waiting:
                stepper.receive()
                if stepper.lane.any_live:
                    stepper.send()
            waiting = [stepper for stepper in waiting if stepper.lane.any_live]
    finally:
        for stepper in steppers:
            stepper.close()


class _Stepper:
    """Steps one lane's environment in a thread. Plain queues: a future costs as much as a small network."""

    def __init__(self, lane: _Lane) -> None:
        self.lane = lane
        self._todo: SimpleQueue[Tensor | None] = SimpleQueue()
        self._done: SimpleQueue[_Outcome | BaseException] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="physics", daemon=True)
        self._thread.start()

    def send(self) -> None:
        """Begin the step that follows from the observations at hand."""
        self._todo.put(self.lane.act())

    def receive(self) -> None:
        """Wait for the step and take it in."""
        outcome = self._done.get()
        if isinstance(outcome, BaseException):
            raise outcome
        self.lane.absorb(*outcome)

    def close(self) -> None:
        """End the thread, after the step that it may be in."""
        self._todo.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (action := self._todo.get()) is not None:
            try:
                self._done.put(self.lane.env.step(action, self.lane.live_mask))
            except BaseException as error:
                self._done.put(error)


class _Jobs:
    """The queue of episodes, and what came of each."""

    def __init__(self, size: int, episodes: int, seeds: Tensor, obs_dim: int, moment_jobs: int) -> None:
        self.shape = (size, episodes)
        self.count = size * episodes
        self.seeds = seeds.flatten()
        self.next = 0
        # Poisoned, so that a job that never ran cannot pass for one that did.
        self.returns = torch.full((self.count,), torch.nan, dtype=torch.float64)
        self.lengths = torch.full((self.count,), -1, dtype=torch.int64)
        self.diverged = 0
        self.moment_jobs = min(self.count, moment_jobs)
        self.total = torch.zeros(self.moment_jobs, obs_dim, dtype=torch.float64)
        self.squares = torch.zeros(self.moment_jobs, obs_dim, dtype=torch.float64)

    def take(self, count: int) -> Tensor:
        """The next jobs, at most ``count``."""
        first, self.next = self.next, min(self.next + count, self.count)
        return torch.arange(first, self.next)

    def member_of(self, jobs: Tensor) -> Tensor:
        return jobs // self.shape[1]

    def result(self, alive_bonus: float) -> Rollout:
        returns, lengths = self.returns.view(self.shape), self.lengths.view(self.shape)
        return rollout_of(returns, lengths, self.total, self.squares, self.diverged, alive_bonus)


def rollout_of(
    returns: Tensor, lengths: Tensor, total: Tensor, squares: Tensor, diverged: int, alive_bonus: float
) -> Rollout:
    """The rollout from the sums over each job.

    ``returns`` and ``lengths`` are ``(P, E)``; ``total`` and ``squares`` ``(jobs, O)`` float64, sums over the observations of
    each of the first jobs; for the others see :class:`Rollout`.
    """
    assert bool((lengths > 0).all()), "a job was lost"
    steps = float(lengths.flatten()[: len(total)].sum())
    return Rollout(returns, lengths, Moments(steps, _block_sums(total), _block_sums(squares)), diverged, alive_bonus)


def _block_sums(sums: Tensor) -> Tensor:
    """Sums over blocks of jobs, one job after the other: the same bits whichever slots, and shares, the jobs were played in."""
    blocks, size = -(-len(sums) // MOMENT_BLOCK), sums.shape[1]
    jobs = torch.cat([sums, sums.new_zeros(blocks * MOMENT_BLOCK - len(sums), size)]).view(blocks, MOMENT_BLOCK, size)
    total = sums.new_zeros(blocks, size)
    for job in range(MOMENT_BLOCK):
        total += jobs[:, job]
    return total


class _Lane:
    """One environment batch and the jobs in its slots."""

    def __init__(
        self,
        env: BatchEnv,
        population: Policies,
        jobs: _Jobs,
        norm: Callable[[Tensor], Tensor],
        actions: ActionMap,
        cap: int | None,
    ) -> None:
        slots = env.num_envs
        self.env, self.population, self.jobs = env, population, jobs
        self.norm, self.actions, self.cap = norm, actions, cap
        self.job = torch.zeros(slots, dtype=torch.int64)
        self.live = torch.zeros(slots, dtype=torch.bool)
        self.elapsed = torch.zeros(slots, dtype=torch.int64)
        self.returns = torch.zeros(slots, dtype=torch.float64)
        self.total = torch.zeros(slots, jobs.total.shape[1] if jobs.moment_jobs else 0, dtype=torch.float64)
        self.squares = torch.zeros_like(self.total)
        self.state = population.initial_state(slots)
        self.obs = torch.zeros(0)
        self._begin(torch.arange(slots))
        self.any_live = bool(self.live.any())
        if self.any_live:
            self._lay_out()

    @property
    def live_mask(self) -> Tensor | None:
        """Which slots to step; None when all are live."""
        return None if self.all_live else self.live

    def _begin(self, slots: Tensor) -> Tensor:
        """Start the next jobs in the given slots, as many as there are; returns the slots that got one."""
        new = self.jobs.take(len(slots))
        started = slots[: len(new)]
        self.job[started] = new
        self.live[slots] = False
        self.live[started] = True
        self.all_live = bool(self.live.all())
        if len(new):
            self.elapsed[started], self.returns[started] = 0, 0.0
            self.total[started], self.squares[started] = 0.0, 0.0
            if self.state is not None:
                self.state[started] = 0.0
            seeds, mask = torch.zeros_like(self.job), torch.zeros_like(self.live)
            seeds[started], mask[started] = self.jobs.seeds[new], True
            self.obs = self.env.reset(seeds, mask).cpu()
        return started

    def _lay_out(self) -> None:
        """Give a policy row to every live slot and to no other."""
        self.rows = None if self.all_live else self.live.nonzero()[:, 0]
        self.num_rows = len(self.live) if self.rows is None else len(self.rows)
        jobs = self.job if self.rows is None else self.job[self.rows]
        self.policy = self.population.select(self.jobs.member_of(jobs).to(self.population.device))

    def act(self) -> Tensor:
        """Actions of all slots for the observations at hand; dead slots get zeros."""
        obs = self.obs
        if self.jobs.moment_jobs:
            self.total += obs
            self.squares.addcmul_(obs, obs)
        x = obs if self.rows is None else obs[self.rows]
        # Statistics are where the observations are: on the host.
        action = self.actions(self._outputs(self.norm(x).to(self.population.device))).to(self.env.device)
        if self.rows is None:
            return action
        full = action.new_zeros(len(self.live), *action.shape[1:])
        full[self.rows] = action
        return full

    def _outputs(self, x: Tensor) -> Tensor:
        """The policies' outputs for the rows' observations; what they remember goes on."""
        if self.state is None:
            return self.policy(x)
        if self.rows is None:
            output, self.state = self.policy(x, self.state)
        else:
            output, self.state[self.rows] = self.policy(x, self.state[self.rows])
        return output

    def absorb(self, obs: Tensor, reward: Tensor, terminated: Tensor, truncated: Tensor) -> None:
        """Take in a step's outcome; end episodes and start the next jobs."""
        if obs.device.type != "cpu":
            obs, reward, terminated, truncated = obs.cpu(), reward.cpu(), terminated.cpu(), truncated.cpu()
        self.obs = obs
        # NumPy: right after physics, with cold caches, a torch operation on a few hundred numbers takes several times as long.
        returns, elapsed = self.returns.numpy(), self.elapsed.numpy()
        np.add(returns, reward.numpy(), out=returns)
        np.add(elapsed, 1, out=elapsed)
        done = terminated.numpy() | truncated.numpy()
        if self.cap is not None:
            done |= self.live.numpy() & (elapsed >= self.cap)
        if np.count_nonzero(done):
            self._end(torch.from_numpy(done.nonzero()[0]))

    def _end(self, slots: Tensor) -> None:
        jobs, ended = self.jobs, self.job[slots]
        jobs.returns[ended] = self.returns[slots]
        jobs.lengths[ended] = self.elapsed[slots]
        jobs.diverged += int(self.env.diverged.cpu()[slots].sum())
        if jobs.moment_jobs:
            observed = ended < jobs.moment_jobs
            jobs.total[ended[observed]] = self.total[slots[observed]]
            jobs.squares[ended[observed]] = self.squares[slots[observed]]
        started = self._begin(slots)
        self.any_live = bool(self.live.any())
        if len(started):
            # While there are jobs every slot has one, so here rows are slots.
            assert self.rows is None
            self.policy.replace(started, self.jobs.member_of(self.job[started]).to(self.population.device))
        if self.any_live and 2 * int(self.live.sum()) <= self.num_rows:
            self._lay_out()
