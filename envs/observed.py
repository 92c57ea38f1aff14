"""Environments with only some entries of their observations, such as positions without velocities.

:class:`SelectObservation` wraps a Gymnasium environment and :class:`ObservedBatchEnv` wraps a batch; both select the
same.
"""

from __future__ import annotations

from collections.abc import Sequence

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box
from gymnasium.wrappers import TransformObservation
from torch import Tensor

from es_flipout.envs.base import BatchEnv, UnsupportedEnvironmentError
from es_flipout.envs.native import NativeBatchEnv, SteppedInParts


class SelectObservation(TransformObservation):
    """Keeps the entries ``observed`` of a one-dimensional observation, in the given order."""

    def __init__(self, env: gymnasium.Env, observed: Sequence[int]) -> None:
        """Wrap ``env``.

        Raises:
            UnsupportedEnvironmentError: the observation is not a one-dimensional ``Box``, or an entry does not exist.
        """
        chosen = list(observed)
        name = env.spec.id if env.spec is not None else "the environment"
        super().__init__(env, lambda obs: obs[chosen], _selected(name, env.observation_space, chosen))


class ObservedBatchEnv(BatchEnv):
    """Keeps the entries ``observed`` of a batch's observations, in the given order."""

    def __init__(self, env: BatchEnv, observed: Sequence[int]) -> None:
        """Wrap ``env``.

        Raises:
            UnsupportedEnvironmentError: an entry does not exist.
        """
        self._env = env
        self._chosen = torch.tensor(list(observed), device=env.device)
        self.env_id, self.kwargs, self.num_envs = env.env_id, env.kwargs, env.num_envs
        self.observation_space = _selected(env.env_id, env.observation_space, list(observed))
        self.action_space, self.max_episode_steps = env.action_space, env.max_episode_steps
        self.alive_bonus, self.terminates = env.alive_bonus, env.terminates
        self.device, self.backend = env.device, env.backend

    @property
    def diverged(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See :class:`BatchEnv`."""
        return self._env.diverged

    def reset(self, seeds: Tensor, mask: Tensor | None = None) -> Tensor:
        """See :meth:`BatchEnv.reset`."""
        return self._env.reset(seeds, mask)[:, self._chosen]

    def step(self, action: Tensor, live: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See :meth:`BatchEnv.step`."""
        observation, *rest = self._env.step(action, live)
        reward, terminated, truncated = rest
        return observation[:, self._chosen], reward, terminated, truncated

    def starts(self, seeds: Tensor) -> Tensor:
        """See :meth:`NativeBatchEnv.starts`."""
        return self._native.starts(seeds)

    def draw_ahead(self, seeds: Tensor) -> None:
        """See :meth:`NativeBatchEnv.draw_ahead`."""
        self._native.draw_ahead(seeds)

    def states(self) -> Tensor:
        """See :meth:`NativeBatchEnv.states`."""
        return self._native.states()

    def restart_where(self, mask: Tensor, starts: Tensor) -> Tensor:
        """See :meth:`NativeBatchEnv.restart_where`."""
        return self._native.restart_where(mask, starts)[:, self._chosen]

    @property
    def capturable(self) -> bool:
        """See :class:`NativeBatchEnv`."""
        return self._native.capturable

    def overflow(self) -> int:
        """See :meth:`es_flipout.envs.mujoco_gpu.MujocoWarpBatchEnv.overflow`; 0 for other environments."""
        return getattr(self._env, "overflow", int)()

    def temporary_bytes(self) -> int:
        """See :meth:`es_flipout.envs.mujoco_gpu.MujocoWarpBatchEnv.temporary_bytes`; 0 for other environments."""
        return getattr(self._env, "temporary_bytes", int)()

    @property
    def _native(self) -> NativeBatchEnv:
        if not isinstance(self._env, NativeBatchEnv):
            raise NotImplementedError(f"{self.env_id}: the {self.backend} backend does not run on a device")
        return self._env

    def close(self) -> None:
        """See :meth:`BatchEnv.close`."""
        self._env.close()


class ObservedInParts(ObservedBatchEnv):
    """The same for environments whose step consists of parts, so that a rollout can capture what is around physics."""

    _env: SteppedInParts  # pyright: ignore[reportIncompatibleVariableOverride]

    def begin_step(self, action: Tensor, live: Tensor | None = None) -> None:
        """See :class:`es_flipout.envs.native.SteppedInParts`."""
        self._env.begin_step(action, live)

    def run_physics(self) -> None:
        """See :class:`es_flipout.envs.native.SteppedInParts`."""
        self._env.run_physics()

    def end_step(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See :class:`es_flipout.envs.native.SteppedInParts`."""
        observation, *rest = self._env.end_step()
        reward, terminated, truncated = rest
        return observation[:, self._chosen], reward, terminated, truncated


def observe(env: BatchEnv, observed: Sequence[int]) -> ObservedBatchEnv:
    """Return ``env`` with only the entries ``observed`` of its observations, and with its parts if it has any.

    Raises:
        UnsupportedEnvironmentError: an entry does not exist.
    """
    kind = ObservedInParts if isinstance(env, SteppedInParts) else ObservedBatchEnv
    return kind(env, observed)


def _selected(env_id: str, space: gymnasium.Space, observed: list[int]) -> Box:
    if not isinstance(space, Box) or len(space.shape) != 1:
        raise UnsupportedEnvironmentError(
            f"{env_id}: entries can only be selected from a one-dimensional Box, not from {space}"
        )
    size = space.shape[0]
    wrong = [entry for entry in observed if not 0 <= entry < size]
    if wrong or not observed:
        got = wrong[0] if wrong else "none"
        raise UnsupportedEnvironmentError(f"{env_id}: observed entries must be in [0, {size}), got {got}")
    dtype = space.dtype if space.dtype is not None else np.dtype(np.float64)
    return Box(space.low[observed], space.high[observed], dtype=dtype.type)
