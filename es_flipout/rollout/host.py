"""The rollout on the host: a population plays its episodes in a batch of environments.

The ``P * E`` episodes are jobs in a queue. Every slot of the environments plays one job; when its episode ends, it
takes the next job immediately. Dead slots are neither stepped nor counted. With two batches of environments, physics
and policy are double-buffered: the physics of one batch runs in a thread (which releases the GIL) during the forward
for the other.

Letters: ``P`` members, ``E`` episodes per member, ``J = P * E`` jobs, ``S`` slots of one batch, ``O`` observation size.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from es_flipout.envs.base import BatchEnv
from es_flipout.envs.native import ArrayOutcome, NativeBatchEnv, SteppedInArrays
from es_flipout.envs.observed import ObservedBatchEnv
from es_flipout.policies.action_map import ActionMap
from es_flipout.policies.observation_norm import Identity
from es_flipout.rollout.episodes import (
    MOMENT_JOBS,
    Ends,
    Episodes,
    JobResults,
    Rollout,
    RolloutInterrupted,
    ShouldStop,
    start_seeds,
)
from es_flipout.strategy.population import Population

_Outcome = tuple[Tensor, Tensor, Tensor, Tensor] | ArrayOutcome  # of a step
_Numbers = Tensor | NDArray[Any]


class PopulationLike(Protocol):
    """What a rollout requires of a population."""

    size: int

    @property
    def device(self) -> torch.device:
        """Device of the inputs."""
        ...

    def initial_state(self, rows: int) -> Tensor | None:
        """Return the recurrent state at the start of an episode, ``(rows, state_size)``; None without memory."""
        ...

    def select(self, members: Tensor) -> PolicyBatch:
        """Return the forward of the given members."""
        ...


class PolicyBatch(Protocol):
    """A forward in which every row belongs to one member and can be reassigned to another."""

    def __call__(self, *inputs: Tensor) -> Any:
        """Map ``(n, O)`` to ``(n, outputs)``; with memory, also the state to the next state."""
        ...

    def replace(self, rows: Tensor, members: Tensor) -> None:
        """Assign other members to rows."""
        ...


@torch.no_grad()
def run(
    population: PopulationLike,
    env: BatchEnv | Sequence[BatchEnv],
    episodes: int | Episodes = 1,
    *,
    observation_norm: Callable[[Tensor], Tensor] | None = None,
    action_map: ActionMap | None = None,
    should_stop: ShouldStop | None = None,
) -> Rollout:
    """Play episodes of every member.

    Args:
        population: the members.
        env: one batch of environments, or two (of any sizes) to double-buffer physics and policy.
        episodes: the number of episodes per member, with start states addressed by the population's seed and
            generation; or a complete request.
        observation_norm: applied to observations before the policy; by default, they are only converted to float32.
        action_map: maps outputs to actions; by default, that of the environment's action space.
        should_stop: called once per step; if it returns true, :class:`RolloutInterrupted` is raised.

    Returns:
        Returns, lengths and observation moments.

    Raises:
        ValueError: the request does not fit the population.
        EnvironmentFailureError: the environment's own code raised an exception.
    """
    envs = [env] if isinstance(env, BatchEnv) else list(env)
    if not isinstance(episodes, Episodes):
        if episodes < 1:
            raise ValueError(f"episodes must be at least 1, got {episodes}")
        if not isinstance(population, Population):
            raise ValueError("seeds are needed (pass Episodes) unless the population is a Population")
        episodes = Episodes(start_seeds(population, episodes), moment_jobs=MOMENT_JOBS)
    episodes.check(population.size)
    jobs = Jobs(episodes, envs[0])
    norm = observation_norm if observation_norm is not None else Identity()
    actions = action_map if action_map is not None else ActionMap(envs[0].action_space)
    own_actions = copy.copy(actions).to(population.device)  # the caller's map is not moved
    lanes = [Lane(e, population, jobs, norm, own_actions) for e in envs]
    if len(lanes) == 1:
        _run_alone(lanes[0], should_stop)
    else:
        _run_overlapped(lanes, should_stop)
    return Rollout.of(jobs.results(), envs[0].alive_bonus if episodes.remove_alive_bonus else 0.0)


def _run_alone(lane: Lane, should_stop: ShouldStop | None) -> None:
    while lane.any_live:
        if should_stop is not None and should_stop():
            raise RolloutInterrupted
        lane.absorb(*lane.step(lane.act(), lane.live_mask))


def _run_overlapped(lanes: list[Lane], should_stop: ShouldStop | None) -> None:
    """Step every lane in its own thread; this thread serves the lanes in turn, so the order is fixed."""
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
    """Steps the environments of one lane in a thread. Uses plain queues: a future costs as much as a small network."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self._todo: SimpleQueue[Tensor | None] = SimpleQueue()
        self._done: SimpleQueue[_Outcome | BaseException] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="physics", daemon=True)
        self._thread.start()

    def send(self) -> None:
        """Start the next step, with actions for the current observations."""
        self._todo.put(self.lane.act())

    def receive(self) -> None:
        """Wait for the step and process its outcome."""
        outcome = self._done.get()
        if isinstance(outcome, BaseException):
            raise outcome
        self.lane.absorb(*outcome)

    def close(self) -> None:
        """Stop the thread after its current step."""
        self._todo.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (action := self._todo.get()) is not None:
            try:
                self._done.put(self.lane.step(action, self.lane.live_mask))
            except BaseException as error:
                self._done.put(error)


def _array(values: Tensor | NDArray[Any]) -> NDArray[Any]:
    return values.cpu().numpy() if isinstance(values, Tensor) else values


class Jobs:
    """The queue of episodes, and the result of each."""

    def __init__(self, episodes: Episodes, env: BatchEnv) -> None:
        self.episodes = episodes
        self.cap = episodes.cap_below(env.max_episode_steps)
        self.seeds = episodes.seeds.flatten()
        self.segments = None if episodes.segments is None else _SegmentJobs(episodes, env)
        self.next = 0
        count, size = len(self.seeds), env.observation_space.shape[0]
        # Invalid values, so that a job that was never played is detected.
        self.returns = torch.full((count,), torch.nan, dtype=torch.float64)
        self.lengths = torch.full((count,), -1, dtype=torch.int64)
        self.diverged = 0
        self.observed = episodes.observed_jobs
        self.total = torch.zeros(self.observed, size, dtype=torch.float64)
        self.squares = torch.zeros(self.observed, size, dtype=torch.float64)

    def take(self, count: int) -> Tensor:
        """Return the next jobs, at most ``count``."""
        first, self.next = self.next, min(self.next + count, len(self.seeds))
        return torch.arange(first, self.next)

    def member_of(self, jobs: Tensor) -> Tensor:
        """Return the members that play jobs."""
        return jobs // self.episodes.count

    def results(self) -> JobResults:
        """Return the results of all jobs, once they are played."""
        shape = self.episodes.seeds.shape
        ends = None if self.segments is None else self.segments.ends()
        returns, lengths = self.returns.view(shape), self.lengths.view(shape)
        return JobResults(returns, lengths, self.total, self.squares, self.diverged, ends)


class _SegmentJobs:
    """Start and end states of jobs that are segments of longer episodes."""

    def __init__(self, episodes: Episodes, env: BatchEnv) -> None:
        assert episodes.segments is not None
        if not isinstance(env, NativeBatchEnv | ObservedBatchEnv):
            raise ValueError(f"{env.env_id} has no states to continue from")
        self.starts = episodes.starts(env).cpu()
        self.caps = episodes.caps(env.max_episode_steps)
        self._elapsed, self._limit = episodes.segments.elapsed.flatten(), env.max_episode_steps
        self._shape = episodes.seeds.shape
        self._states = torch.full_like(self.starts, torch.nan)
        self._running = torch.zeros(episodes.jobs, dtype=torch.bool)

    def record(self, jobs: Tensor, states: Tensor, over: Tensor, lengths: Tensor) -> None:
        """Store the last states of jobs, whether their episodes ended, and their lengths, with one row per job."""
        self._states[jobs] = states
        at_limit = self._limit is not None and self._elapsed[jobs] + lengths >= self._limit
        self._running[jobs] = ~(over | at_limit)

    def ends(self) -> Ends:
        return Ends(self._states.view(*self._shape, -1), self._running.view(self._shape))


class Lane:
    """One batch of environments and the jobs in its slots."""

    def __init__(
        self,
        env: BatchEnv,
        population: PopulationLike,
        jobs: Jobs,
        norm: Callable[[Tensor], Tensor],
        actions: ActionMap,
    ) -> None:
        slots = env.num_envs
        self.env, self.population, self.jobs = env, population, jobs
        self.norm, self.actions = norm, actions
        self.step: Callable[..., _Outcome] = env.step_arrays if isinstance(env, SteppedInArrays) else env.step
        self.job = torch.zeros(slots, dtype=torch.int64)
        self.live = torch.zeros(slots, dtype=torch.bool)
        self.elapsed = torch.zeros(slots, dtype=torch.int64)
        self.returns = torch.zeros(slots, dtype=torch.float64)
        self._views = self.returns.numpy(), self.elapsed.numpy()
        self.total = torch.zeros(slots, jobs.total.shape[1] if jobs.observed else 0, dtype=torch.float64)
        self.squares = torch.zeros_like(self.total)
        self.state = population.initial_state(slots)
        self._on_host = population.device.type == env.device.type == "cpu"
        self.obs = torch.zeros(0)
        self.caps = torch.zeros(slots, dtype=torch.int64)
        self.cap = jobs.cap if jobs.segments is None else self.caps.numpy()
        self.steps_left = 0  # no slot reaches its cap before so many steps
        self._begin(torch.arange(slots))
        self.any_live = bool(self.live.any())
        if self.any_live:
            self._lay_out()

    @property
    def live_mask(self) -> Tensor | None:
        """Which slots to step; None when all are live."""
        return None if self.all_live else self.live

    def _begin(self, slots: Tensor) -> Tensor:
        """Start the next jobs in the given slots, and return the slots that got one."""
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
            mask = torch.zeros_like(self.live)
            mask[started] = True
            self.obs = self._start(new, started, mask).cpu()
        if self.cap is not None:
            self.steps_left = int(np.min(self.cap - self.elapsed.numpy()))
        return started

    def _start(self, jobs: Tensor, slots: Tensor, mask: Tensor) -> Tensor:
        """Start jobs in the slots of ``mask``, and return the observations of all slots."""
        if self.jobs.segments is None:
            seeds = torch.zeros_like(self.job)
            seeds[slots] = self.jobs.seeds[jobs]
            return self.env.reset(seeds, mask)
        assert isinstance(self.env, NativeBatchEnv | ObservedBatchEnv)
        starts = self.jobs.segments.starts.new_zeros(len(mask), self.jobs.segments.starts.shape[1])
        starts[slots] = self.jobs.segments.starts[jobs]
        self.caps[slots] = self.jobs.segments.caps[jobs]
        return self.env.restart_where(mask, starts)

    def _lay_out(self) -> None:
        """Assign one policy row to every live slot, and none to dead ones."""
        self.rows = None if self.all_live else self.live.nonzero()[:, 0]
        self.num_rows = len(self.live) if self.rows is None else len(self.rows)
        jobs = self.job if self.rows is None else self.job[self.rows]
        self.policy = self.population.select(self.jobs.member_of(jobs).to(self.population.device))

    def act(self) -> Tensor:
        """Compute the actions of all slots for the current observations; dead slots get zeros."""
        obs = self.obs
        if self.jobs.observed:
            self.total += obs
            self.squares.addcmul_(obs, obs)
        x = obs if self.rows is None else obs[self.rows]
        x = self.norm(x)  # statistics are on the host, like the observations
        if self._on_host:
            action = self.actions(self._outputs(x))
        else:
            action = self.actions(self._outputs(x.to(self.population.device))).to(self.env.device)
        if self.rows is None:
            return action
        full = action.new_zeros(len(self.live), *action.shape[1:])
        full[self.rows] = action
        return full

    def _outputs(self, x: Tensor) -> Tensor:
        """Compute the policies' outputs for the rows' observations, and update recurrent states."""
        if self.state is None:
            return self.policy(x)
        if self.rows is None:
            output, self.state = self.policy(x, self.state)
        else:
            output, self.state[self.rows] = self.policy(x, self.state[self.rows])
        return output

    def absorb(self, obs: Tensor, reward: _Numbers, terminated: _Numbers | None, truncated: _Numbers | None) -> None:
        """Process the outcome of a step: end episodes and start the next jobs."""
        self.obs = obs.cpu()
        # NumPy, because after physics, with cold caches, torch operations on a few hundred numbers take several times
        # as long.
        returns, elapsed = self._views
        np.add(returns, _array(reward), out=returns)
        np.add(elapsed, 1, out=elapsed)
        self.steps_left -= 1
        at_cap = self.cap is not None and self.steps_left <= 0
        if terminated is None and truncated is None and not at_cap:
            return
        over = np.zeros(len(elapsed), np.bool_)
        for ended in (terminated, truncated):
            if ended is not None:
                over |= _array(ended)
        done = over | (self.live.numpy() & (elapsed >= self.cap)) if at_cap else over
        if np.count_nonzero(done):
            self.end(torch.from_numpy(done.nonzero()[0]), torch.from_numpy(over))

    def end(self, slots: Tensor, over: Tensor) -> None:
        """Record the episodes of ``slots``, which ended (``over`` by themselves), and start the next jobs there."""
        jobs, ended = self.jobs, self.job[slots]
        if jobs.segments is not None:
            assert isinstance(self.env, NativeBatchEnv | ObservedBatchEnv)
            jobs.segments.record(ended, self.env.states().cpu()[slots], over[slots], self.elapsed[slots])
        jobs.returns[ended] = self.returns[slots]
        jobs.lengths[ended] = self.elapsed[slots]
        jobs.diverged += int(self.env.diverged.cpu()[slots].sum())
        if jobs.observed:
            observed = ended < jobs.observed
            jobs.total[ended[observed]] = self.total[slots[observed]]
            jobs.squares[ended[observed]] = self.squares[slots[observed]]
        started = self._begin(slots)
        self.any_live = bool(self.live.any())
        if len(started):
            # While there are jobs, every slot has one, so rows are slots here.
            assert self.rows is None
            self.policy.replace(started, self.jobs.member_of(self.job[started]).to(self.population.device))
        self._compact()

    def _compact(self) -> None:
        """Lay out the rows again if half of them are dead."""
        if self.any_live and 2 * int(self.live.sum()) <= self.num_rows:
            self._lay_out()
