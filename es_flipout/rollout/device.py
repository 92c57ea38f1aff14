"""The rollout on a device: policy, physics, rewards and the queue of episodes stay there.

:class:`DeviceRollout` plays the same episodes as :func:`es_flipout.rollout.host.run`. Nothing it does depends on a
value that the host would have to know: all shapes are fixed, every slot is computed at every step, and slots that must
not count are masked. A *launch* (some control steps of all slots, after which finished slots take the next jobs) is
therefore one CUDA graph. The host launches it repeatedly and learns one launch later whether a slot is still live, so
the device never waits; surplus launches at the end step no live slot. Everything that changes between generations
(weights, signs, sigma, statistics, start states) is copied into the captured memory, so a graph is captured once per
run.

The solver of mujoco-warp loops with conditional nodes. CUDA rejects these in child graphs, and recording one suspends
torch's capture, so warp's physics has its own graph (``capturable`` is false). A control step then consists of one
torch graph, from the outcome of one physics step to the actions of the next, and one warp graph, alternating on one
stream; the refill, which also runs physics, is launched without a graph. The device still never waits. Without CUDA,
every graph is a plain call of the same code, which is how it is tested.

On the CPU, results are bitwise identical to those of ``run``, for any number of slots and steps per launch (policies
are computed in the population's row blocks). On CUDA all slots form one block, so their number may affect the last
bits.

Letters: ``P`` members, ``E`` episodes per member, ``J = P * E`` jobs, ``S`` slots, ``O`` observation size, ``K``
numbers that describe a start state.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import gymnasium
import torch
from torch import Tensor

from es_flipout.envs.base import ActionSpace
from es_flipout.envs.native import SteppedInParts
from es_flipout.errors import UserError
from es_flipout.policies.agent import Agent
from es_flipout.rollout.episodes import (
    NO_LIMIT,
    Ends,
    Episodes,
    JobResults,
    Rollout,
    RolloutInterrupted,
    ShouldStop,
)
from es_flipout.strategy.population import Population
from es_flipout.strategy.unperturbed import Unperturbed

STEPS_PER_LAUNCH = 8  # a finished slot waits for the end of the launch: for half of these steps on average
_WARM_UP = 3  # launches before the capture, for the one-time work of libraries and compilers


class DeviceEnv(Protocol):
    """What a device rollout requires of a batch of environments; see :class:`es_flipout.envs.native.NativeBatchEnv`.

    The state never moves in memory, and :meth:`step` and :meth:`restart_where` do not synchronize with the device.
    """

    env_id: str
    num_envs: int
    device: torch.device
    observation_space: gymnasium.spaces.Box
    action_space: ActionSpace
    max_episode_steps: int | None
    alive_bonus: float

    @property
    def capturable(self) -> bool:
        """See :class:`es_flipout.envs.native.NativeBatchEnv`."""
        ...

    @property
    def observation_shape(self) -> tuple[int, ...]:
        """See :class:`es_flipout.envs.BatchEnv`."""
        ...

    @property
    def diverged(self) -> Tensor:
        """See :class:`es_flipout.envs.BatchEnv`."""
        ...

    def starts(self, seeds: Tensor) -> Tensor:
        """See :meth:`es_flipout.envs.native.NativeBatchEnv.starts`."""
        ...

    def draw_ahead(self, seeds: Tensor) -> None:
        """See :meth:`es_flipout.envs.native.NativeBatchEnv.draw_ahead`."""
        ...

    def states(self) -> Tensor:
        """See :meth:`es_flipout.envs.native.NativeBatchEnv.states`."""
        ...

    def restart_where(self, mask: Tensor, starts: Tensor) -> Tensor:
        """See :meth:`es_flipout.envs.native.NativeBatchEnv.restart_where`."""
        ...

    def step(self, action: Tensor, live: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See :meth:`es_flipout.envs.BatchEnv.step`."""
        ...

    def close(self) -> None:
        """See :meth:`es_flipout.envs.BatchEnv.close`."""
        ...


@dataclass(frozen=True)
class LaunchOptions:
    """How a device rollout is launched.

    Attributes:
        steps: control steps between two refills.
        captured: whether to use CUDA graphs on CUDA devices.
        compiled: whether ``torch.compile`` fuses the operations around physics that has its own graph (about 75 without
            the policy), before they are captured. This changes last bits.
    """

    steps: int = STEPS_PER_LAUNCH
    captured: bool = True
    compiled: bool = False


DEFAULT_LAUNCH = LaunchOptions()


def layout(population: Population | Unperturbed, episodes: Episodes) -> Hashable:
    """Return a key that is equal for everything that the same :class:`DeviceRollout` can play."""
    return type(population), population.layout, episodes.count, episodes.observed_jobs, episodes.segments is None


class DeviceRollout:
    """Plays populations and episodes of one :func:`layout` in one batch of environments, in preallocated memory."""

    def __init__(
        self,
        env: DeviceEnv,
        agent: Agent,
        population: Population | Unperturbed,
        episodes: Episodes,
        launch: LaunchOptions = DEFAULT_LAUNCH,
    ) -> None:
        """Allocate the memory.

        Args:
            env: the environments; others may use them between two calls of :meth:`play`.
            agent: its normalization and action map are applied around the members' networks.
            population: a population of the layout; it is not kept.
            episodes: episodes of the layout; they are not kept.
            launch: how the rollout is launched.
        """
        self._agent, self._launch_options = agent, launch
        self._use_graphs = launch.captured and env.device.type == "cuda"
        device, slots, jobs = env.device, env.num_envs, episodes.jobs
        self.env, self.episodes, self.jobs = env, episodes.count, jobs
        self._parts = env if isinstance(env, SteppedInParts) else None
        self.moment_jobs = episodes.observed_jobs
        self.refills = jobs > slots
        self._norm, self._actions = agent.norm.fixed_copy(device), copy.copy(agent.action_map).to(device)
        self._population = population.fixed_copy()
        self._rows = self._population.select(torch.zeros(slots, dtype=torch.int64, device=device))
        self._memory = self._population.initial_state(slots)

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        # The queue and the state of the slots. No slot has a job yet, and the queue is empty.
        self._next = zeros().fill_(jobs)
        self._caps, self._cap = zeros(jobs).fill_(NO_LIMIT), zeros(slots)  # per job, and per slot
        self._job, self._elapsed = zeros(slots).fill_(jobs), zeros(slots)
        self._live = zeros(slots, dtype=torch.bool)
        self._return = zeros(slots, dtype=torch.float64)
        # The first jobs are observed, and jobs are assigned in order: they are only played in the first slots.
        observed, size = min(slots, self.moment_jobs), env.observation_space.shape[0]
        self._total, self._squares = zeros(2, observed, size, dtype=torch.float64).unbind()
        # Results; an additional last row receives writes that must be discarded.
        self._returns, self._lengths = zeros(jobs + 1, dtype=torch.float64), zeros(jobs + 1)
        self._totals = zeros(self.moment_jobs + 1, size, dtype=torch.float64)
        self._all_squares = torch.zeros_like(self._totals)
        self._diverged, self._remaining = zeros(), zeros(dtype=torch.bool)
        # What is exchanged between policy, environment and bookkeeping.
        self._starts = zeros(jobs, env.starts(torch.zeros(1, dtype=torch.int64)).shape[1], dtype=torch.float64)
        self._obs = env.restart_where(self._live, self._starts[:1].expand(slots, -1)).clone()
        self._action = self._actions(torch.zeros(slots, agent.action_map.size, device=device))
        outcome = env.step(self._action, self._live)
        self._reward, self._terminated, self._truncated = (part.clone() for part in outcome[1:])
        self._env_diverged = env.diverged.clone()
        # Segments: how episodes ended, per slot and per job.
        self._segments = episodes.segments is not None
        kept, all_jobs = (slots, jobs + 1) if self._segments else (0, 0)
        self._end, self._over = zeros(kept, self._starts.shape[1], dtype=torch.float64), zeros(kept, dtype=torch.bool)
        self._ends, self._overs = (
            zeros(all_jobs, self._starts.shape[1], dtype=torch.float64),
            zeros(all_jobs, dtype=torch.bool),
        )
        self._begin_step, self._end_step = self._store_actions, self._take_outcome
        if launch.compiled and self._parts is not None:
            torch.compiler.reset()  # it limits how often the same code is compiled, also for different objects
            self._begin_step, self._end_step = _compiled(self._begin_step), _compiled(self._end_step)
        self._watch = _Watch(device)
        self._launch: Callable[[], None] | None = None

    def stored(self) -> tuple[object, ...]:
        """Return everything this rollout stores in addition to its environments, its population and its selection."""
        queue = (
            self._next,
            self._caps,
            self._cap,
            self._job,
            self._elapsed,
            self._live,
            self._return,
            self._total,
            self._squares,
        )
        results = (self._returns, self._lengths, self._totals, self._all_squares, self._diverged, self._remaining)
        between = (self._starts, self._obs, self._action, self._reward, self._terminated, self._truncated)
        segments = (self._end, self._over, self._ends, self._overs)
        return *queue, *results, *between, *segments, self._env_diverged, self._norm, self._actions, self._memory

    def play(
        self, population: Population | Unperturbed, episodes: Episodes, should_stop: ShouldStop | None = None
    ) -> Rollout:
        """Play episodes of every member, see :meth:`es_flipout.rollout.players.Player.play`.

        Raises:
            RolloutInterrupted: ``should_stop``, which is called once per launch, returned true.
        """
        episodes.check(population.size)
        if self._launch is None:
            self._launch = self._captured()
        self._load(population, episodes)
        self._begin()
        self._watch.forget()
        while self._watch.remaining:
            if should_stop is not None and should_stop():
                raise RolloutInterrupted
            self._launch()
            self._watch.look(self._remaining)
        shape, ends = episodes.seeds.shape, None
        if episodes.segments is not None:
            running = ~self._overs[:-1].cpu().view(shape)
            if self.env.max_episode_steps is not None:
                elapsed = episodes.segments.elapsed + self._lengths[:-1].cpu().view(shape)
                running &= elapsed < self.env.max_episode_steps
            ends = Ends(self._ends[:-1].cpu().view(*shape, -1), running)
        results = JobResults(
            self._returns[:-1].cpu().view(shape),
            self._lengths[:-1].cpu().view(shape),
            self._totals[:-1].cpu(),
            self._all_squares[:-1].cpu(),
            int(self._diverged),
            ends,
        )
        return Rollout.of(results, self.env.alive_bonus if episodes.remove_alive_bonus else 0.0)

    def _load(self, population: Population | Unperturbed, episodes: Episodes) -> None:
        """Copy everything that changes from one rollout to the next."""
        self._population.load_(population)  # pyright: ignore[reportArgumentType]  (both are of one layout)
        self._norm.load_(self._agent.norm)
        self._starts.copy_(episodes.starts(self.env))
        self._caps.copy_(episodes.caps(self.env.max_episode_steps))
        self._next.zero_()
        self._diverged.zero_()
        self._job.fill_(self.jobs)
        self._live.fill_(False)
        # Invalid values, so that a job that was never played is detected.
        self._returns.fill_(torch.nan)
        self._lengths.fill_(-1)

    # The following methods are captured: no value reaches the host, no shape depends on one, and all results go to
    # fixed memory.

    def _whole_launch(self) -> None:
        for _ in range(self._launch_options.steps):
            self._before()
            self._physics()
            self._after()
        self._finish()

    def _before(self) -> None:
        self._act()
        self._begin_step()

    def _store_actions(self) -> None:
        if self._parts is not None:
            self._parts.begin_step(self._action, self._live)

    def _physics(self) -> None:
        if self._parts is not None:
            self._parts.run_physics()
        else:
            self._keep(*self.env.step(self._action, self._live))

    def _after(self) -> None:
        self._end_step()

    def _take_outcome(self) -> None:
        if self._parts is not None:
            self._keep(*self._parts.end_step())
        self._absorb()

    def _between(self) -> None:
        self._after()
        self._before()

    def _finish(self) -> None:
        self._record()
        if self.refills:
            self._begin()
        self._remaining.copy_(self._live.any())

    @torch.no_grad()
    def _act(self) -> None:
        """Compute the actions of all slots for the current observations."""
        if self.moment_jobs:
            observed = slice(len(self._total))
            shown = torch.where(self._live[observed, None], self._obs[observed], 0)
            self._total += shown
            self._squares.addcmul_(shown, shown)
        output = self._rows(self._norm(self._obs), *(() if self._memory is None else (self._memory,)))
        if self._memory is not None:
            output, after = output
            self._memory.copy_(after)
        self._action.copy_(self._actions(output))

    def _keep(self, obs: Tensor, reward: Tensor, terminated: Tensor, truncated: Tensor) -> None:
        """Copy the outcome of a step to the captured memory."""
        self._obs.copy_(obs)
        self._reward.copy_(reward)
        self._terminated.copy_(terminated)
        self._truncated.copy_(truncated)
        self._env_diverged.copy_(self.env.diverged)

    def _absorb(self) -> None:
        """Process the outcome of a step; slots whose episodes ended are frozen."""
        self._return += self._reward
        self._elapsed += self._live
        self._diverged += self._env_diverged.sum()
        over = self._terminated | self._truncated
        done = over | (self._elapsed >= self._cap)
        if self._segments:  # now, because GPU physics does not keep the state of dead slots
            ended = self._live & done
            self._end.copy_(torch.where(ended[:, None], self.env.states(), self._end))
            self._over.copy_(torch.where(ended, over, self._over))
        self._live &= ~done

    def _record(self) -> None:
        """Write the results of finished slots."""
        at = torch.where(self._live, self.jobs, self._job)
        self._returns.index_copy_(0, at, self._return)
        self._lengths.index_copy_(0, at, self._elapsed)
        if self._segments:
            self._ends.index_copy_(0, at, self._end)
            self._overs.index_copy_(0, at, self._over)
        if self.moment_jobs:
            at = at[: len(self._total)].clamp(max=self.moment_jobs)
            self._totals.index_copy_(0, at, self._total)
            self._all_squares.index_copy_(0, at, self._squares)
        self._job.masked_fill_(~self._live, self.jobs)

    def _begin(self) -> None:
        """Assign the next jobs to slots without one, in the order of the slots, until the queue is empty."""
        place = self._next + (~self._live).cumsum(0) - 1
        new = ~self._live & (place < self.jobs)
        chosen = place.clamp(0, self.jobs - 1)
        self._obs.copy_(self.env.restart_where(new, self._starts.index_select(0, chosen)))
        self._rows.replace_where(new, chosen // self.episodes)
        self._job.copy_(torch.where(new, place, self._job))
        self._cap.copy_(torch.where(new, self._caps.index_select(0, chosen), self._cap))
        for counted in (self._elapsed, self._return):
            counted.masked_fill_(new, 0)
        for rows in (self._total, self._squares) if self.moment_jobs else ():
            rows.masked_fill_(new[: len(rows), None], 0)
        if self._memory is not None:
            self._memory.masked_fill_(new[:, None], 0)
        self._next += new.sum()
        self._live |= new

    def _captured(self) -> Callable[[], None]:
        """Return a function that runs a launch, with as few graphs as the environment allows."""
        if self._use_graphs:
            # The queue is empty, so all slots are frozen.
            torch.cuda.synchronize(self.env.device)
            with torch.cuda.stream(torch.cuda.Stream(self.env.device)):
                for _ in range(_WARM_UP):
                    self._whole_launch()
            # What the warm-up used stays with its stream, where nothing else could use it.
            torch.cuda.synchronize(self.env.device)
            torch.cuda.empty_cache()
        # One pool for all graphs: they are replayed one after the other, and results are in memory outside of it.
        graph = partial(_graph, pool=torch.cuda.graph_pool_handle()) if self._use_graphs else _plain_call
        if self.env.capturable:
            return graph(self._whole_launch)
        before, between, after = graph(self._before), graph(self._between), graph(self._after)

        def launch() -> None:
            before()
            for _ in range(self._launch_options.steps - 1):
                self._physics()
                between()
            self._physics()
            after()
            self._finish()

        return launch


class _Watch:
    """Tells the host whether any slot is live, with a delay of one launch so that it does not wait for the last one.

    Attributes:
        remaining: whether any slot was live after the last launch whose flag has arrived.
    """

    def __init__(self, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self._flags = torch.ones(2, dtype=torch.bool, pin_memory=is_cuda)
        self._events = [torch.cuda.Event() for _ in range(2)] if is_cuda else None
        self.forget()

    def forget(self) -> None:
        """Reset, for a new rollout."""
        self.remaining, self._looks = True, 0

    def look(self, flag: Tensor) -> None:
        """Start copying ``flag``, a scalar on the device, to the host, and read the flag that was copied before."""
        now, before = self._looks % 2, (self._looks + 1) % 2
        self._flags[now].copy_(flag, non_blocking=True)
        if self._events is not None:
            self._events[now].record()
        if self._looks:
            if self._events is not None:
                self._events[before].synchronize()
            self.remaining = bool(self._flags[before])
        self._looks += 1


def _graph(function: Callable[[], None], pool: Any) -> Callable[[], None]:
    """Capture the function as a CUDA graph, with its temporary memory in a pool."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        function()
    return graph.replay


def _compiled(function: Callable[[], None]) -> Callable[[], None]:
    """Compile the function when it is first called.

    Raises:
        UserError: there, if it cannot be compiled; compilers and drivers raise anything.
    """
    fused = torch.compile(function, fullgraph=True, dynamic=False)
    called = False

    def call() -> None:
        nonlocal called
        try:
            fused()
        except Exception as error:
            if called or is_out_of_memory(error):
                raise
            cause = getattr(error, "inner_exception", error)
            reason = str(cause).strip().partition("\n")[0]
            raise UserError(f"--compile on does not work here: {type(cause).__name__}: {reason}") from error
        called = True

    return call


def _plain_call(function: Callable[[], None]) -> Callable[[], None]:
    return function


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a device ran out of memory; warp raises a RuntimeError, and a failed capture hides its cause."""
    said = str(error).lower()
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in said or "failed to allocate" in said:
        return True
    return error.__context__ is not None and is_out_of_memory(error.__context__)
