"""The contract of a batch of environments stepped side by side: :class:`BatchEnv`.

Letters: ``S`` slots (environments), ``O`` observation size, ``A`` action size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import gymnasium
import torch
from torch import Tensor


class UnsupportedEnvironmentError(ValueError):
    """The environment does not exist or cannot be run; the message is one line and names what would do."""


class EnvironmentFailureError(RuntimeError):
    """The environment's own code raised; the message names the environment and repeats what it said."""


class BatchEnv(ABC):
    """``S`` copies of one environment, stepped side by side as torch tensors; no autoreset.

    A slot is either live or frozen. The caller says which with the ``live`` mask of :meth:`step`: a frozen slot keeps its
    state, gives reward 0 and neither flag, and costs nothing where the backend can skip it (``"mujoco-warp"`` parks it
    instead: it is lost until it is reset). :meth:`reset` starts new episodes in any chosen slots while the others stay
    where they are, so a slot can take a new episode at once.

    Attributes:
        env_id: the Gymnasium id, for instance ``"HalfCheetah-v5"``.
        kwargs: the keyword arguments of ``gymnasium.make`` that select the same environment variant.
        num_envs: ``S``.
        observation_space: of one slot, as ``gymnasium.make(env_id, **kwargs)`` has it (flattened to one dimension);
            ``"mujoco-warp"`` has it in float32.
        action_space: of one slot: ``Box`` (continuous) or ``Discrete``.
        max_episode_steps: the time limit; reaching it is truncation. ``None`` where the environment has none.
        alive_bonus: the part of every step's reward that is paid for merely not having ended (0 where there is none).
        device: where the tensors of :meth:`reset` and :meth:`step` live.
        backend: ``"torch"``, ``"mujoco"``, ``"mujoco-warp"`` or ``"gymnasium"``.
        diverged: ``(S,)`` bool, the slots whose last step gave a state that is not finite (such a step terminates,
            with reward 0).
    """

    env_id: str
    kwargs: dict[str, object]
    num_envs: int
    observation_space: gymnasium.spaces.Box
    action_space: gymnasium.spaces.Box | gymnasium.spaces.Discrete
    max_episode_steps: int | None
    alive_bonus: float
    device: torch.device
    backend: str
    diverged: Tensor

    @property
    def observation_shape(self) -> tuple[int, ...]:
        """The shape of one slot's observation before it was flattened to ``(O,)``, for instance of an image."""
        return self.observation_space.shape

    @abstractmethod
    def reset(self, seeds: Tensor, mask: Tensor | None = None) -> Tensor:
        """Start a new episode in the slots chosen by ``mask``; the other slots are untouched.

        Args:
            seeds: ``(S,)`` int64. Slot ``i`` starts exactly as ``gymnasium.make(env_id, **kwargs).reset(seed=seeds[i])``.
            mask: ``(S,)`` bool, ``None`` for all slots. Seeds outside the mask are ignored.

        Returns:
            Observations of all slots, ``(S, O)``, in the dtype of ``observation_space``.
        """

    @abstractmethod
    def step(self, action: Tensor, live: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One control step of the live slots.

        Args:
            action: ``(S, A)`` floating point for ``Box``, ``(S,)`` int64 for ``Discrete``; rows of frozen slots are ignored.
            live: ``(S,)`` bool, ``None`` for all slots.

        Returns:
            ``(observation, reward, terminated, truncated)``: ``(S, O)``, ``(S,)`` float64, ``(S,)`` bool, ``(S,)`` bool.
            The reward of the step that terminates is included. A slot at its time limit is truncated.

        Raises:
            EnvironmentFailureError: the environment's own code raised.
        """

    def close(self) -> None:  # noqa: B027 (most environments hold nothing)
        """Release what the environments hold (processes, threads, windows)."""
