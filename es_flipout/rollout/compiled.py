"""The compiled rollout on the CPU: ``torch.compile`` of a few control steps, for environments written in torch.

The environments are split into *tiles* of a fixed number of slots. A few control steps of a tile, from observations to
bookkeeping, are recorded as a graph of torch operations on fixed shapes (policy, environment and sums of all slots, the
dead ones masked) and compiled once; threads step the tiles with it, each its own ones, and hold Python's lock only
between two calls. After a call in which an episode has ended, the slot takes the next job, as in
:mod:`es_flipout.rollout.host`, whose bookkeeping this is.

All tiles run the same program on the same shapes, so a row's bits depend neither on the number of slots nor on threads.
They differ in the last bits from those of the plain rollout, because the compiler fuses operations and has other
implementations of tanh, sin and cos.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from typing_extensions import override

from es_flipout.envs.base import BatchEnv
from es_flipout.policies.agent import Agent
from es_flipout.rollout.device import layout
from es_flipout.rollout.episodes import NO_LIMIT, Episodes, Rollout, RolloutInterrupted, ShouldStop
from es_flipout.rollout.host import Jobs, Lane, run
from es_flipout.rollout.memory import reachable
from es_flipout.rollout.players import LocalPlayer
from es_flipout.strategy.population import Population
from es_flipout.strategy.selection import Selection
from es_flipout.strategy.unperturbed import Unperturbed

_STEPS = 4  # of a call, which costs two thirds of a step in Python, under the lock; they are compiled one by one
_POLL_S = 0.02  # between two questions whether to stop, while this thread has no tile left
_MOST_SLOTS = 256  # of a tile
_STEP_OF_SLOTS = 32  # a multiple of the width of a vector, so that no slot is computed alone
# A C++ program around the kernels releases Python's lock while it runs; one made in Python would hold it.
_OPTIONS: dict[str, str | int | bool | Callable[..., object]] = {
    "cpp_wrapper": True,
    "cpp.threads": 1,
    "cpp.use_decompose_tanh": True,  # tanh as 2 sigmoid(2 x) - 1, three times as fast as the library's; error 2e-7
}


class CompilationError(RuntimeError):
    """The step could not be compiled on this machine; the message is one line."""


def tile_slots(jobs: int) -> int:
    """Return the slots of a tile, from the number of episodes alone: an even number of equal tiles hold all of them."""
    tiles = 2 * -(-jobs // (2 * _MOST_SLOTS))
    return -(-jobs // (tiles * _STEP_OF_SLOTS)) * _STEP_OF_SLOTS


class _Tile(Lane):
    """A lane whose control steps consist of torch operations on fixed memory."""

    def __init__(self, env: BatchEnv, population: Population, jobs: Jobs, agent: Agent) -> None:
        slots = env.num_envs
        self.memory = torch.zeros(slots, env.observation_space.shape[0])
        self.over, self.done = torch.zeros(2, slots, dtype=torch.bool).unbind()
        super().__init__(env, population, jobs, agent.norm, agent.action_map)
        if jobs.segments is None:
            self.caps.fill_(NO_LIMIT if jobs.cap is None else jobs.cap)

    @override
    def _start(self, jobs: Tensor, slots: Tensor, mask: Tensor) -> Tensor:
        # Only the new observations: the others were computed by the compiled step, whose last bits differ.
        self.memory[slots] = super()._start(jobs, slots, mask)[slots]
        return self.memory

    @override
    def _lay_out(self) -> None:
        self.rows, self.num_rows = None, len(self.live)
        members = self.jobs.member_of(self.job)
        selection = self.population.select(members)
        assert isinstance(selection, Selection), "kernels are not used on the CPU"
        selection.replace_where(torch.ones_like(self.live), members)  # from now on for any members, not for these
        self.policy = selection

    @override
    def _compact(self) -> None:
        """Do nothing: the rows are fixed."""

    def tensors(self) -> list[Tensor]:
        """Return the tensors that :meth:`steps` may use, each once, in an order that is the same for all tiles."""
        own = (self.memory, self.state, self.live, self.elapsed, self.returns, self.caps, self.over, self.done)
        sums = (self.total, self.squares) if self.jobs.observed else ()
        assert isinstance(self.policy, Selection)
        roots = (own, sums, self.env, self.norm, self.actions, self.policy.read())
        return list({id(x): x for x in reachable(roots) if isinstance(x, Tensor)}.values())

    @torch.no_grad()
    def steps(self) -> None:
        """Run control steps of all slots; those whose episode ends are masked from then on. No value decides what is computed."""
        diverged = torch.zeros_like(self.done)
        self.over.zero_()
        self.done.zero_()
        for _ in range(_STEPS):
            self._step(self.live & ~self.done)
            diverged |= self.env.diverged
        self.env.diverged.copy_(diverged)

    def _step(self, live: Tensor) -> None:
        obs = self.memory
        if self.jobs.observed:
            shown = torch.where(live[:, None], obs, 0)
            self.total += shown
            self.squares.addcmul_(shown, shown)
        output = self.policy(self.norm(obs), *(() if self.state is None else (self.state,)))
        if self.state is not None:
            output, after = output
            self.state.copy_(torch.where(live[(..., *[None] * (after.ndim - 1))], after, self.state))
        new, reward, terminated, truncated = self.env.step(self.actions(output), live)
        obs.copy_(new)
        self.returns += reward
        self.elapsed += live
        self.over |= terminated | truncated
        self.done |= self.over | (live & (self.elapsed >= self.caps))

    def finish(self, lock: threading.Lock) -> None:
        """Record the episodes that ended in the last steps, and start the next jobs in their slots."""
        done = self.done.numpy()
        if np.count_nonzero(done):
            with lock:
                self.end(torch.from_numpy(done.nonzero()[0]), self.over)


class _Program:
    """The compiled steps of all tiles of one layout."""

    def __init__(self, tile: _Tile) -> None:
        """Compile the steps of a tile, whose state is used up by it.

        Raises:
            CompilationError: there is no compiler, or the step cannot be compiled.
        """
        try:
            self._compile(tile)
        except Exception as error:  # a compiler may raise anything
            first, *others = [*str(error).strip().splitlines(), ""]
            reason = f"{first} {others[0]}" if first.endswith(":") else first  # the rest is advice for developers
            raise CompilationError(f"{type(error).__name__}: {reason}") from error

    @torch.no_grad()
    def _compile(self, tile: _Tile) -> None:
        tensors = tile.tensors()
        graph = make_fx(lambda *_: tile.steps())(*tensors)
        self._used = _without_unused(graph)
        self._call = torch.compile(graph, fullgraph=True, dynamic=False, options=_OPTIONS)
        self._call(*self.arguments(tile))

    def arguments(self, tile: _Tile) -> list[Tensor]:
        """Return the memory of a tile, as :meth:`__call__` takes it."""
        return [x.detach() for x in itertools.compress(tile.tensors(), self._used)]

    def __call__(self, arguments: Sequence[Tensor]) -> None:
        """Run the control steps of a tile."""
        self._call(*arguments)


def _without_unused(graph: GraphModule) -> list[bool]:
    """Remove the inputs of a graph that it does not use, and return which ones it uses.

    Raises:
        RuntimeError: the graph contains values that are no inputs, so it would repeat them for ever.
    """
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    used = [bool(node.users) for node in inputs]
    for node in inputs:
        if not node.users:
            graph.graph.erase_node(node)
    if constants := [node.name for node in graph.graph.nodes if node.op == "get_attr"]:
        raise RuntimeError(f"the step uses values that are not in its memory: {', '.join(constants)}")
    graph.recompile()
    return used


class CompiledPlayer(LocalPlayer):
    """Plays populations with a compiled step; unperturbed ones, which only score, with the plain rollout.

    Attributes:
        envs: the tiles' environments.
        threads: number of threads that step the tiles.
    """

    def __init__(self, agent: Agent, envs: Sequence[BatchEnv], threads: int) -> None:
        super().__init__(agent, envs)
        self.threads = min(threads, len(envs))
        self._programs: dict[Hashable, _Program] = {}
        self._pool = ThreadPoolExecutor(max(self.threads - 1, 1), "tiles")

    @override
    def prepare(self, population: Population, episodes: Episodes) -> None:
        if (key := layout(population, episodes)) not in self._programs:
            tile = _Tile(self.envs[0], population, Jobs(episodes, self.envs[0]), self.agent)
            self._programs[key] = _Program(tile)

    @override
    def play(
        self, population: Population | Unperturbed, episodes: Episodes, should_stop: ShouldStop | None = None
    ) -> Rollout:
        norm, action_map = self.agent.norm, self.agent.action_map
        if not isinstance(population, Population):
            return run(
                population,
                self.envs[0],
                episodes,
                observation_norm=norm,
                action_map=action_map,
                should_stop=should_stop,
            )
        episodes.check(population.size)
        self.prepare(population, episodes)
        program = self._programs[layout(population, episodes)]
        jobs = Jobs(episodes, self.envs[0])
        tiles = [_Tile(env, population, jobs, self.agent) for env in self.envs]
        _play([tile for tile in tiles if tile.any_live], program, self._pool, self.threads, should_stop)
        return Rollout.of(jobs.results(), self.envs[0].alive_bonus if episodes.remove_alive_bonus else 0.0)

    @override
    def close(self) -> None:
        self._pool.shutdown()
        super().close()


def _play(
    tiles: list[_Tile], program: _Program, pool: ThreadPoolExecutor, threads: int, should_stop: ShouldStop | None
) -> None:
    """Step all tiles to their ends: this thread and those of the pool have their own tiles each."""
    stopped, lock = threading.Event(), threading.Lock()

    def stop_here() -> bool:
        if should_stop is not None and should_stop():
            stopped.set()
        return stopped.is_set()

    others = [pool.submit(_serve, tiles[n::threads], program, lock, stopped.is_set) for n in range(1, threads)]
    try:
        _serve(tiles[::threads], program, lock, stop_here)
        while wait(others, _POLL_S).not_done:
            stop_here()
    except BaseException:
        stopped.set()
        raise
    finally:
        failures = [failure for other in others if (failure := other.exception()) is not None]
    if failures:
        raise failures[0]
    if stopped.is_set():
        raise RolloutInterrupted


@torch.no_grad()
def _serve(tiles: list[_Tile], program: _Program, lock: threading.Lock, stop: Callable[[], bool]) -> None:
    """Step tiles in turn until all their episodes have ended."""
    served = [(tile, program.arguments(tile)) for tile in tiles]
    while served and not stop():
        for tile, arguments in served:
            program(arguments)
            tile.finish(lock)
        served = [each for each in served if each[0].any_live]
