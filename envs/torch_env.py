"""Environments written in torch: :class:`TorchTask` defines one, :class:`TorchBatchEnv` steps a batch of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from es_flipout.envs.base import ActionSpace
from es_flipout.envs.generators import Rng
from es_flipout.envs.native import NativeBatchEnv


class TorchTask(ABC):
    """An environment as functions over a batch; its dataclass fields are Gymnasium's keyword arguments.

    The state is ``(K, S)`` float64, with one row per variable. It may become non-finite: the batch environment ends
    such a slot.
    """

    observation_space: ClassVar[gymnasium.spaces.Box]
    action_space: ClassVar[ActionSpace]
    starts_together: ClassVar[bool] = False  # whether start() also takes the generators of many starts

    @abstractmethod
    def start(self, rng: Any) -> NDArray[np.float64]:
        """Draw the start state of an episode, ``(K,)``."""

    @abstractmethod
    def advance(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Compute one step.

        Args:
            state: ``(K, S)``.
            action: ``(S,)`` int64, or ``(S, A)`` float32.

        Returns:
            The next state ``(K, S)``, reward ``(S,)`` float64 and terminated ``(S,)`` bool (``None`` if never).
        """

    @abstractmethod
    def observe(self, state: Tensor) -> Tensor:
        """Compute the observation of a state, ``(S, O)`` float32."""


class TorchBatchEnv(NativeBatchEnv):
    """A batch of a :class:`TorchTask` on any device.

    :meth:`step` and :meth:`restart_where` never synchronize with the host, and the state is updated in place. A slot
    whose state becomes non-finite terminates with reward 0 and keeps its last finite state until it is reset.
    """

    capturable: bool = True

    def __init__(
        self, env_id: str, task: TorchTask, num_envs: int, kwargs: Mapping[str, object], device: torch.device
    ) -> None:
        """Create ``num_envs`` slots of ``task``, which was built from ``kwargs``, on ``device``."""
        self._describe(env_id, kwargs, num_envs, device)
        self.observation_space = task.observation_space
        self.action_space = task.action_space
        self.alive_bonus = 0.0
        self.backend = "torch"
        self.diverged = torch.zeros(num_envs, dtype=torch.bool, device=device)
        self._task, self.starts_together = task, task.starts_together
        size = len(task.start(np.random.default_rng(0)))
        self._state = torch.zeros(size, num_envs, dtype=torch.float64, device=device)
        self._elapsed = torch.zeros(num_envs, dtype=torch.int64, device=device)

    def draw_start(self, rng: Rng) -> NDArray[np.float64]:
        """See :meth:`NativeBatchEnv.draw_start`."""
        return self._task.start(rng)

    def states(self) -> Tensor:
        """See :meth:`NativeBatchEnv.states`."""
        return self._state.T.clone()

    def restart(self, rows: NDArray[np.intp], starts: NDArray[np.float64]) -> Tensor:
        """See :meth:`NativeBatchEnv.restart`."""
        if len(rows):
            index = torch.from_numpy(rows).to(self.device)
            self._state.index_copy_(1, index, torch.from_numpy(starts.T).to(self.device))
            self._elapsed.index_fill_(0, index, 0)
        return self._task.observe(self._state)

    def restart_where(self, mask: Tensor, starts: Tensor) -> Tensor:
        """See :meth:`NativeBatchEnv.restart_where`."""
        torch.where(mask, starts.T, self._state, out=self._state)
        self._elapsed.masked_fill_(mask, 0)
        return self._task.observe(self._state)

    def step(self, action: Tensor, live: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See :meth:`BatchEnv.step`. Continuous actions are converted to float32, the dtype of the action space."""
        expected = (self.num_envs, *(self.action_space.shape or ()))
        if action.shape != expected:
            raise ValueError(f"{self.env_id}: actions must have shape {expected}, got {tuple(action.shape)}")
        if action.is_floating_point():
            action = action.float()
        state, reward, terminated = self._task.advance(self._state, action)
        finite = state.isfinite().all(0) & reward.isfinite()
        moved = finite if live is None else finite & live
        self.diverged.copy_(~finite if live is None else ~finite & live)
        torch.where(moved, state, self._state, out=self._state)
        reward = torch.where(moved, reward, 0.0)
        terminated = self.diverged.clone() if terminated is None else (terminated & moved) | self.diverged
        return self._task.observe(self._state), reward, terminated, self._count_step(live)

    def _count_step(self, live: Tensor | None) -> Tensor:
        """Count a step of the live slots, and return those that reached the time limit, ``(S,)`` bool."""
        self._elapsed.add_(1 if live is None else live)
        if self.max_episode_steps is None:
            return torch.zeros_like(self.diverged)
        truncated = self._elapsed >= self.max_episode_steps
        return truncated if live is None else truncated & live
