"""The interface of a batch of environments that are stepped in parallel: :class:`BatchEnv`.

Letters: ``S`` slots (environments), ``O`` observation size, ``A`` action size.
"""

from __future__ import annotations

import sysconfig
import traceback
from abc import ABC, abstractmethod
from pathlib import Path

import gymnasium
import torch
from torch import Tensor

ActionSpace = (
    gymnasium.spaces.Box | gymnasium.spaces.Discrete | gymnasium.spaces.MultiDiscrete | gymnasium.spaces.MultiBinary
)

# The standard library, installed packages, and this one: errors are described by the code that calls them.
_OURS = (str(Path(__file__).parent), str(Path(__file__).parents[1] / "es_flipout"))
_NOT_THEIRS = (*_OURS, *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")))


class UnsupportedEnvironmentError(ValueError):
    """The environment does not exist or cannot be run; the message is one line and names alternatives."""


class EnvironmentFailureError(RuntimeError):
    """The environment's own code raised an exception; the message names the environment and repeats the error."""


def described(error: BaseException) -> str:
    """Return one line about an exception of someone else's code: its type, message, and the file and line that raised it.

    The place is the innermost one outside the standard library and installed packages, where there is one.
    """
    message = " ".join(str(error).split())
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {message}"  # which names the file and line
    frames, cause = [], error
    while cause is not None:  # Gymnasium raises some errors again; what they were raised from comes last
        frames += [frame for frame in traceback.extract_tb(cause.__traceback__) if not frame.filename.startswith("<")]
        cause = cause.__cause__ or cause.__context__
    theirs = [frame for frame in frames if not frame.filename.startswith(_NOT_THEIRS)]
    place = (theirs or frames)[-1:]
    where = f" (File {place[0].filename}, line {place[0].lineno})" if place else ""
    return f"{type(error).__name__}: {message}{where}" if message else f"{type(error).__name__}{where}"


class BatchEnv(ABC):
    """``S`` copies of one environment, stepped in parallel as torch tensors; no autoreset.

    A slot is either live or frozen, according to the ``live`` mask of :meth:`step`. A frozen slot keeps its state,
    returns reward 0 and no flags, and is free if the backend can skip it (``"mujoco-warp"`` parks it instead: its state
    is lost, and it must be reset). :meth:`reset` starts new episodes in any selected slots and leaves the others
    unchanged, so a slot can take a new episode immediately.

    Attributes:
        env_id: the Gymnasium id, such as ``"HalfCheetah-v5"``.
        kwargs: the keyword arguments of ``gymnasium.make`` that select the same environment variant.
        num_envs: ``S``.
        observation_space: space of one slot, that of ``gymnasium.make(env_id, **kwargs)`` (flattened to one dimension);
            float32 with ``"mujoco-warp"``.
        action_space: space of one slot: ``Box`` (continuous), ``Discrete``, ``MultiDiscrete`` or ``MultiBinary``, flattened
            to one dimension; discrete actions start at 0.
        max_episode_steps: the time limit, at which episodes are truncated; ``None`` if the environment has none.
        alive_bonus: the part of the reward of every step that is given for being alive (0 if there is none).
        terminates: whether an episode can end before the time limit (also true where that is not known).
        device: device of the tensors of :meth:`reset` and :meth:`step`.
        backend: ``"torch"``, ``"mujoco"``, ``"mujoco-warp"`` or ``"gymnasium"``.
        diverged: ``(S,)`` bool, slots whose last step gave a non-finite state (such a step terminates with reward 0).
    """

    env_id: str
    kwargs: dict[str, object]
    num_envs: int
    observation_space: gymnasium.spaces.Box
    action_space: ActionSpace
    max_episode_steps: int | None
    alive_bonus: float
    terminates: bool = True
    device: torch.device
    backend: str
    diverged: Tensor

    @property
    def observation_shape(self) -> tuple[int, ...]:
        """Shape of one slot's observation before it was flattened to ``(O,)``, for example of an image."""
        return self.observation_space.shape

    @abstractmethod
    def reset(self, seeds: Tensor, mask: Tensor | None = None) -> Tensor:
        """Start a new episode in the slots selected by ``mask``; the other slots are unchanged.

        Args:
            seeds: ``(S,)`` int64. Slot ``i`` starts exactly like ``gymnasium.make(env_id, **kwargs)`` after
                ``reset(seed=seeds[i])``.
            mask: ``(S,)`` bool, ``None`` for all slots. Seeds outside the mask are ignored.

        Returns:
            Observations of all slots, ``(S, O)``, in the dtype of ``observation_space``.
        """

    @abstractmethod
    def step(self, action: Tensor, live: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run one control step of the live slots.

        Args:
            action: ``(S, A)`` floating point for ``Box``, ``(S,)`` int64 for ``Discrete``, ``(S, A)`` int64 for the other
                spaces; rows of frozen slots are ignored.
            live: ``(S,)`` bool, ``None`` for all slots.

        Returns:
            ``(observation, reward, terminated, truncated)``: ``(S, O)``, ``(S,)`` float64, and twice ``(S,)`` bool.
            The reward of the terminating step is included. A slot at its time limit is truncated.

        Raises:
            EnvironmentFailureError: the environment's own code raised an exception.
        """

    def close(self) -> None:  # noqa: B027 (most environments hold no resources)
        """Release the resources of the environments (processes, threads, windows)."""
