"""A worker of the classic strategy: one core, one policy at a time, one Gymnasium environment.

Everything here is NumPy, because for one observation at a time a torch operation takes several times as long
(``scripts/speed/classic_worker.py`` measures both). The module imports neither torch nor Ray, so workers start fast and
need little memory.

Letters: ``n`` members of a task, ``E`` episodes per member, ``O`` observation size, ``A`` outputs, ``D`` parameters.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from es_flipout.bench.classic.noise_table import noise_table
from es_flipout.errors import UserError
from es_flipout.runinfo import versions

BLOCK = 4  # members whose observations are summed together; fixed, so that sums do not depend on the split into tasks
_ROWS = 1024  # size of the buffer of observations that are not yet summed
_erf = np.vectorize(math.erf, otypes=[np.float32])

Array = NDArray[Any]


def _relu(x: Array, out: Array) -> None:
    np.maximum(x, 0, out=out)


def _elu(x: Array, out: Array) -> None:
    out[...] = np.where(x > 0, x, np.expm1(x))


def _silu(x: Array, out: Array) -> None:
    np.divide(x, 1 + np.exp(-x), out=out)


def _gelu(x: Array, out: Array) -> None:
    out[...] = x * (1 + _erf(x * 0.5**0.5)) / 2


# Each overwrites its input with the result.
_ACTIVATIONS: Mapping[str, Callable[..., Any]] = {
    "tanh": np.tanh,
    "relu": _relu,
    "elu": _elu,
    "silu": _silu,
    "gelu": _gelu,
}


@dataclass(frozen=True)
class WorkerSpec:
    """What is constant over a run.

    Attributes:
        env_id: Gymnasium id of the environment.
        env_kwargs: keyword arguments of ``gymnasium.make``.
        observed: entries of the observation that the policy sees; None for all.
        layers: ``(out, in, bias)`` of every linear layer. The parameter vector holds each layer's weight, then its
            bias.
        activation: activation between the layers.
        squash: see :class:`es_flipout.policies.action_map.ActionMap`.
        table_size: length of the noise table.
    """

    env_id: str
    env_kwargs: Mapping[str, Any]
    observed: tuple[int, ...] | None
    layers: tuple[tuple[int, int, bool], ...]
    activation: str
    squash: str
    table_size: int


@dataclass(frozen=True)
class Center:
    """What all policies of a generation have in common; sent to every worker.

    Attributes:
        mean: ``(D,)`` float32, the unperturbed parameters.
        sigma: standard deviation of the perturbations; with 0, the mean policy is played.
        norm: factor, offset, minimum and maximum of the observations, ``(O,)`` float64 each; None without
            normalization.
        cap: maximum number of steps per episode; None for no cap.
        moment_jobs: the number of the generation's first episodes whose observations are summed.
    """

    mean: NDArray[np.float32]
    sigma: float
    norm: tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]] | None
    cap: int | None
    moment_jobs: int


@dataclass(frozen=True)
class Task:
    """Members to play: offsets and signs of their noise, and seeds of their episodes.

    Attributes:
        first: number of the first member, a multiple of :data:`BLOCK`.
        offsets: ``(n,)`` int64, offsets into the noise table.
        signs: ``(n,)`` float32, +1 or -1.
        seeds: ``(n, E)`` int64, seeds of the start states.
    """

    first: int
    offsets: NDArray[np.int64]
    signs: NDArray[np.float32]
    seeds: NDArray[np.int64]


@dataclass
class Played:
    """The result of a task, as a worker sends it back.

    Attributes:
        first: as in the task.
        returns: ``(n, E)`` float64.
        lengths: ``(n, E)`` int64.
        counts: ``(blocks,)`` float64, number of summed observations of each block of members.
        moments: ``(blocks, 2, O)`` float64, their sums and the sums of their squares.
        diverged: number of episodes with a non-finite observation or reward.
        seconds: time of the whole task.
        step_seconds, reset_seconds: time in the environment's own ``step`` and ``reset``; zero unless profiling is on.
        failure: the exception that the environment's own code raised; None if there was none.
    """

    first: int
    returns: NDArray[np.float64]
    lengths: NDArray[np.int64]
    counts: NDArray[np.float64]
    moments: NDArray[np.float64]
    diverged: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0
    reset_seconds: float = 0.0
    failure: str | None = None


class NumpyPolicy:
    """A fully connected policy for one observation at a time, whose parameters can be replaced.

    Attributes:
        input: ``(O,)`` float32, buffer for the normalized observation.
    """

    def __init__(self, layers: tuple[tuple[int, int, bool], ...], activation: str) -> None:
        self._activation = _ACTIVATIONS[activation]
        # The bias of a layer is an extra column of its weight, and its input has an extra entry, which is 1.
        self._weights = [np.zeros((size_out, size_in + bias), np.float32) for size_out, size_in, bias in layers]
        inputs = [np.ones(size_in + bias, np.float32) for _, size_in, bias in layers]
        self.input = inputs[0][: layers[0][1]]
        hidden = [x[:size_in] for x, (_, size_in, _) in zip(inputs[1:], layers[1:], strict=True)]
        self._output = np.zeros(layers[-1][0], np.float32)
        self._hidden = list(zip(self._weights[:-1], inputs[:-1], hidden, strict=True))
        self._last = (self._weights[-1], inputs[-1])
        self._parts: list[tuple[Array, int, int, tuple[int, ...]]] = []
        start = 0
        for weight, (size_out, size_in, bias) in zip(self._weights, layers, strict=True):
            self._parts.append((weight[:, :size_in], start, start + size_out * size_in, (size_out, size_in)))
            start += size_out * size_in
            if bias:
                self._parts.append((weight[:, size_in], start, start + size_out, (size_out,)))
                start += size_out
        self.size = start

    def load(self, parameters: NDArray[np.float32]) -> None:
        """Load a parameter vector ``(D,)``."""
        for part, start, end, shape in self._parts:
            part[...] = parameters[start:end].reshape(shape)

    def __call__(self) -> NDArray[np.float32]:
        """Compute the output ``(A,)`` for the contents of :attr:`input`; the next call overwrites it."""
        activation = self._activation
        for weight, x, y in self._hidden:
            np.dot(weight, x, out=y)
            activation(y, out=y)
        weight, x = self._last
        return np.dot(weight, x, out=self._output)


class NumpyActionMap:
    """The :class:`es_flipout.policies.action_map.ActionMap` for a single output of a NumPy policy."""

    def __init__(self, space: gymnasium.Space, squash: str) -> None:
        self._start: int | None = None
        if isinstance(space, gymnasium.spaces.Discrete):
            self._start = int(space.start)
            return
        if not isinstance(space, gymnasium.spaces.Box):
            raise UserError(f"classic workers act in Discrete and Box spaces only, not in {space}")
        self._shape, self._dtype = space.shape, np.dtype(space.dtype)
        low, high = space.low.ravel().astype(np.float32), space.high.ravel().astype(np.float32)
        self._squash = squash == "tanh"
        self._one = np.ones_like(low)
        self._is_unit = bool((low == -1).all() and (high == 1).all())
        self._bounded = np.isfinite(low) & np.isfinite(high)
        with np.errstate(invalid="ignore"):
            self._middle = np.where(self._bounded, (low + high) / 2, 0)
            self._half_range = np.where(self._bounded, (high - low) / 2, 1)
        self._low, self._high = low, high
        self._as_is = len(space.shape) == 1 and self._dtype == np.float32

    def __call__(self, output: NDArray[np.float32]) -> Any:
        """Map outputs ``(A,)`` to an action, which does not share memory with them."""
        if self._start is not None:
            return int(output.argmax()) + self._start
        # The environment may keep the action, so the last operation allocates a new array.
        action = np.tanh(output) if self._squash else np.minimum(np.maximum(output, -self._one), self._one)
        if not self._is_unit:
            action = np.where(self._bounded, self._middle + self._half_range * action, output)
            action = np.minimum(np.maximum(action, self._low), self._high)
        return action if self._as_is else action.astype(self._dtype).reshape(self._shape)


@dataclass
class _Sums:
    """Sums over observations, with a buffer so that a step only has to copy one row.

    Attributes:
        rows: ``(rows, O)``, buffer of observations that are not yet summed.
        totals: ``(2, O)``, sums of the observations and of their squares so far.
        filled: number of rows in the buffer.
        count: number of observations in ``totals``.
    """

    rows: NDArray[np.float64]
    totals: NDArray[np.float64]
    filled: int = 0
    count: float = 0.0

    def flush(self) -> None:
        """Add the buffered rows to the totals."""
        rows = self.rows[: self.filled]
        self.totals[0] += rows.sum(0)
        self.totals[1] += np.square(rows).sum(0)
        self.count += self.filled
        self.filled = 0


class ClassicWorker:
    """Plays tasks; its only state is its environment, its noise table and the center of the generation."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._env = _make_env(spec)
        self._table = noise_table(spec.table_size)
        self._policy = NumpyPolicy(spec.layers, spec.activation)
        self._actions = NumpyActionMap(self._env.action_space, spec.squash)
        self._rows = np.zeros((_ROWS, spec.layers[0][1]))
        self._scratch = np.zeros(spec.layers[0][1])
        self._parameters = np.zeros(self._policy.size, np.float32)
        self._center: Center | None = None
        self._place: Any = None

    def ready(self) -> dict[str, str]:
        """Return the worker's package versions, once it has been created."""
        return versions()

    def begin(self, center: Center) -> None:
        """Begin a generation."""
        self._center = center

    def play_at(self, task: Task, place: list[Any], profile: bool) -> Played:
        """Play a task of the generation whose center is stored in Ray's object store at ``place[0]``."""
        if place[0] != self._place:
            import ray

            self.begin(ray.get(place[0]))
            self._place = place[0]
        return self.play(task, profile)

    def play(self, task: Task, profile: bool = False) -> Played:
        """Play all episodes of the members of a task.

        Args:
            task: the members.
            profile: whether to time the environment's own ``step`` and ``reset``, which adds a little overhead.
        """
        started = time.perf_counter()
        members, episodes = task.seeds.shape
        blocks = -(-members // BLOCK)
        played = Played(
            task.first,
            returns=np.full((members, episodes), np.nan),
            lengths=np.zeros((members, episodes), np.int64),
            counts=np.zeros(blocks),
            moments=np.zeros((blocks, 2, self._rows.shape[1])),
        )
        step, reset = self._env.step, self._env.reset
        clocks = {"step": _Clock(step), "reset": _Clock(reset)} if profile else {}
        if profile:
            step, reset = clocks["step"], clocks["reset"]
        try:
            with np.errstate(over="ignore", invalid="ignore"):
                for block in range(blocks):
                    self._play_block(task, block, played, step, reset)
        except Exception as error:
            played.failure = f"{type(error).__name__}: {error}"
        played.seconds = time.perf_counter() - started
        if profile:
            played.step_seconds, played.reset_seconds = clocks["step"].seconds, clocks["reset"].seconds
        return played

    def _play_block(self, task: Task, block: int, played: Played, step: Any, reset: Any) -> None:
        center = self._center
        assert center is not None, "call begin() before play()"
        episodes = task.seeds.shape[1]
        sums = _Sums(self._rows, played.moments[block])
        for i in range(block * BLOCK, min((block + 1) * BLOCK, len(task.seeds))):
            self._load(center, int(task.offsets[i]), float(task.signs[i]))
            job = (task.first + i) * episodes
            for episode in range(episodes):
                kept = sums if job + episode < center.moment_jobs else None
                total, length = self._episode(center, int(task.seeds[i, episode]), kept, step, reset)
                played.returns[i, episode], played.lengths[i, episode] = total, length
                if not math.isfinite(total):
                    played.diverged += 1
        sums.flush()
        played.counts[block] = sums.count

    def _load(self, center: Center, offset: int, sign: float) -> None:
        """Load the parameters of a member into the policy."""
        if center.sigma:
            np.multiply(self._table[offset : offset + self._policy.size], sign * center.sigma, out=self._parameters)
            np.add(self._parameters, center.mean, out=self._parameters)
            self._policy.load(self._parameters)
        else:
            self._policy.load(center.mean)

    def _episode(self, center: Center, seed: int, sums: _Sums | None, step: Any, reset: Any) -> tuple[float, int]:
        """Play one episode (the hot loop) and return its return and length."""
        policy, actions, x = self._policy, self._actions, self._policy.input
        norm, scratch, cap, rows, row = center.norm, self._scratch, center.cap, self._rows, 0
        factor, offset, lowest, highest = norm if norm is not None else (scratch,) * 4
        multiply, add, minimum, maximum = np.multiply, np.add, np.minimum, np.maximum
        total, length = 0.0, 0
        if sums is not None:
            row = sums.filled
        obs, _ = reset(seed=seed)
        while True:
            if sums is not None:
                if row == _ROWS:
                    sums.filled = row
                    sums.flush()
                    row = 0
                rows[row] = obs
                row += 1
            if norm is None:
                x[...] = obs
            else:
                multiply(obs, factor, out=scratch)
                add(scratch, offset, out=scratch)
                maximum(scratch, lowest, out=scratch)
                minimum(scratch, highest, out=scratch)
                x[...] = scratch
            obs, reward, terminated, truncated, _ = step(actions(policy()))
            total += reward
            length += 1
            if terminated or truncated or length == cap:
                break
        if sums is not None:
            sums.filled = row
        return float(total), length


class _Clock:
    """Wraps a function and accumulates the time spent in it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.seconds = 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = self._function(*args, **kwargs)
        self.seconds += time.perf_counter() - started
        return result


def _make_env(spec: WorkerSpec) -> gymnasium.Env:
    # The environment checker slows down every step; training engines commonly disable it.
    env = gymnasium.make(spec.env_id, disable_env_checker=True, **spec.env_kwargs)
    space = env.observation_space
    if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
        env = gymnasium.wrappers.FlattenObservation(env)
    if spec.observed is None:
        return env
    from es_flipout.envs.observed import SelectObservation  # imports torch

    return SelectObservation(env, spec.observed)
