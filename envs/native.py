"""The base class of native environments, which draw start states themselves, and the parsing of their options."""

from __future__ import annotations

import dataclasses
import numbers
import types
import typing
from abc import abstractmethod
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any, Protocol, TypeVar, runtime_checkable

import gymnasium
import numpy as np
import torch
from gymnasium.utils import seeding
from numpy.typing import NDArray
from torch import Tensor

from es_flipout.envs.base import BatchEnv, UnsupportedEnvironmentError
from es_flipout.envs.generators import Generators, Rng

Task = TypeVar("Task")

# Fewer starts are drawn one after the other; of more, this many are also drawn so, to check the others.
_FEWEST_TOGETHER, _CHECKED = 64, 4
_CHUNK = 1024  # starts whose numbers fit into a core's cache

ArrayOutcome = tuple[Tensor, NDArray[np.float64], NDArray[np.bool_] | None, NDArray[np.bool_] | None]

NO_TIME_LIMIT = -1  # what gymnasium.make calls "no time limit"


class NativeBatchEnv(BatchEnv):
    """A batch whose episodes start from flat vectors, drawn on the host with a NumPy generator.

    ``K`` is the length of such a vector. :meth:`reset` draws it from seeds; the vector environment draws it from its
    generators, one per slot. Both pass it to :meth:`restart`. A rollout on a device first draws the starts of all
    episodes with :meth:`starts`, and later assigns them with :meth:`restart_where`.

    Attributes:
        capturable: whether :meth:`step` and :meth:`restart_where` consist only of torch operations that neither
            synchronize with the host nor move the state to other storage, so that one torch CUDA graph can contain many
            steps.
        starts_together: whether :meth:`draw_start` also takes :class:`es_flipout.envs.generators.Generators`, and then
            returns one start per generator, ``(n, K)``: it draws the same numbers for every start.
    """

    capturable: bool = False
    starts_together: bool = False

    @abstractmethod
    def draw_start(self, rng: Rng) -> NDArray[np.float64]:
        """Draw one start, ``(K,)``, with exactly the same calls of ``rng`` as the Gymnasium environment's ``reset``."""

    @abstractmethod
    def restart(self, rows: NDArray[np.intp], starts: NDArray[np.float64]) -> Tensor:
        """Start new episodes in the slots ``rows`` ``(n,)``, ascending, from ``starts`` ``(n, K)``.

        Returns:
            Observations of all slots, ``(S, O)``.
        """

    def reset(self, seeds: Tensor, mask: Tensor | None = None) -> Tensor:
        """See :meth:`BatchEnv.reset`. Equal seeds are drawn once."""
        rows = np.arange(self.num_envs) if mask is None else np.flatnonzero(mask.cpu().numpy())
        return self.restart(rows, self._draw(seeds.cpu().numpy()[rows]))

    def starts(self, seeds: Tensor) -> Tensor:
        """Draw the starts of episodes on the host, equal seeds once; or take those of :meth:`draw_ahead`.

        Args:
            seeds: ``(n,)`` int64, as for :meth:`reset`.

        Returns:
            ``(n, K)`` float64 on the environments' device.
        """
        asked = seeds.cpu().numpy()
        found = next((future for ahead, future in self._ahead if np.array_equal(ahead, asked)), None)
        drawn = self._draw(asked) if found is None else found.result()
        return torch.from_numpy(drawn).to(self.device)

    def draw_ahead(self, seeds: Tensor) -> None:
        """Begin to draw the starts of ``seeds`` ``(n,)`` int64 in a thread, for a later call of :meth:`starts`."""
        asked = seeds.cpu().numpy().copy()
        self._ahead.append((asked, _thread().submit(self._draw, asked)))

    @abstractmethod
    def states(self) -> Tensor:
        """Return the state of every slot, ``(S, K)`` float64 on the environments' device.

        :meth:`restart_where` continues from it; the time limit starts over.
        """

    def restart_where(self, mask: Tensor, starts: Tensor) -> Tensor:
        """Start new episodes in the slots of ``mask`` ``(S,)`` from ``starts`` ``(S, K)``; other rows are ignored.

        The other slots are unaffected. Environments on a device do this without the host.

        Returns:
            Observations of all slots, ``(S, O)``.
        """
        rows = np.flatnonzero(mask.cpu().numpy())
        return self.restart(rows, starts.cpu().numpy()[rows])

    def _draw(self, seeds: NDArray[np.int64]) -> NDArray[np.float64]:
        """Draw the starts of ``seeds`` ``(n,)``, ``(n, K)``."""
        unique, inverse = np.unique(seeds, return_inverse=True)
        if not len(unique):
            return np.empty((0, 0))
        if not self.starts_together or len(unique) < _FEWEST_TOGETHER or unique[0] < 0:
            return self._drawn_one_by_one(unique)[inverse]
        drawn = np.concatenate(
            [self._drawn_together(part) for part in np.split(unique, range(_CHUNK, len(unique), _CHUNK))]
        )
        # A version of NumPy that draws other numbers is noticed here.
        same = np.array_equal(drawn[:_CHECKED], self._drawn_one_by_one(unique[:_CHECKED]))
        return (drawn if same else self._drawn_one_by_one(unique))[inverse]

    def _drawn_one_by_one(self, seeds: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.stack([self.draw_start(seeding.np_random(int(seed))[0]) for seed in seeds])

    def _drawn_together(self, seeds: NDArray[np.int64]) -> NDArray[np.float64]:
        generators = Generators(seeds)
        drawn = self.draw_start(generators)
        if not generators.exact.all():
            drawn[~generators.exact] = self._drawn_one_by_one(seeds[~generators.exact])
        return drawn

    def _describe(self, env_id: str, kwargs: Mapping[str, object], num_envs: int, device: torch.device) -> None:
        """Set the attributes of all native environments; ``max_episode_steps`` is as in ``gymnasium.make``."""
        # The starts of this generation, which are about to be taken, and of the next one.
        self._ahead: deque[tuple[NDArray[np.int64], Future[NDArray[np.float64]]]] = deque(maxlen=2)
        self.env_id = env_id
        self.kwargs = dict(kwargs)
        self.num_envs = num_envs
        self.device = device
        self.max_episode_steps = time_limit(env_id, kwargs.get("max_episode_steps"))


@runtime_checkable
class SteppedInParts(Protocol):
    """An environment whose step consists of parts that can be captured, around physics that cannot."""

    def begin_step(self, action: Tensor, live: Tensor | None = None) -> None:
        """Store the actions."""
        ...

    def run_physics(self) -> None:
        """Run the part that cannot be captured."""
        ...

    def end_step(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the outcome of the step, as ``step`` does."""
        ...


@runtime_checkable
class SteppedInArrays(Protocol):
    """An environment on the host whose results are NumPy's: converting them takes as long as some of its computations."""

    def step_arrays(self, action: Tensor, live: Tensor | None = None) -> ArrayOutcome:
        """Do what ``step`` does; rewards and ends are NumPy arrays, ``terminated`` or ``truncated`` None if no slot is."""
        ...


@cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "starts")


def time_limit(env_id: str, max_episode_steps: object) -> int | None:
    """Return the time limit of ``gymnasium.make(env_id, max_episode_steps=max_episode_steps)``.

    Args:
        env_id: a registered Gymnasium id.
        max_episode_steps: ``None`` for the registered limit, ``-1`` for no limit.
    """
    if max_episode_steps is None:
        return gymnasium.spec(env_id).max_episode_steps
    if max_episode_steps == NO_TIME_LIMIT:
        return None
    if not isinstance(max_episode_steps, int) or max_episode_steps < 1:
        raise UnsupportedEnvironmentError(f"{env_id}: max_episode_steps must be a positive integer or -1")
    return max_episode_steps


def build_task(task_class: type[Task], env_id: str, kwargs: Mapping[str, Any]) -> Task:
    """Build the task (a dataclass) of ``env_id`` from the keyword arguments of ``gymnasium.make``.

    Raises:
        UnsupportedEnvironmentError: a keyword is not one of the task's fields.
    """
    options = {name: value for name, value in kwargs.items() if name != "max_episode_steps"}
    known = [field.name for field in dataclasses.fields(task_class)]  # pyright: ignore[reportArgumentType]
    unknown = [name for name in options if name not in known]
    if unknown:
        choices = ", ".join([*known, "max_episode_steps"])
        raise UnsupportedEnvironmentError(f"{env_id}: unsupported keyword {unknown[0]!r}; supported: {choices}")
    hints = typing.get_type_hints(task_class)
    for name, value in options.items():
        if not _fits(value, hints[name]):
            wanted = _TYPE_NAMES.get(hints[name], str(hints[name]))
            raise UnsupportedEnvironmentError(f"{env_id}: {name} must be {wanted}, got {value!r}")
    return task_class(**options)


_TYPE_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


def _fits(value: object, hint: Any) -> bool:
    """Return whether a value has the type of a field; JSON has lists in place of tuples."""
    if typing.get_origin(hint) is tuple:
        items = typing.get_args(hint)
        return isinstance(value, list | tuple) and len(value) == len(items) and all(map(_fits, value, items))
    if isinstance(hint, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    return isinstance(value, {float: numbers.Real, int: numbers.Integral}.get(hint, hint))
