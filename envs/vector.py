"""The native environments as standard Gymnasium vector environments: :class:`NativeVectorEnv`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from es_flipout.envs.make import make_native_env

Result = tuple[NDArray[Any], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]


class NativeVectorEnv(gymnasium.vector.VectorEnv):
    """Behaves like ``SyncVectorEnv`` over ``gymnasium.make(env_id, **kwargs)``, except that ``info`` has no details.

    Each slot has its own NumPy generator, which :meth:`reset` seeds and every new episode of the slot draws from.
    """

    def __init__(
        self,
        env_id: str,
        num_envs: int = 1,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        threads: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Create the environments.

        Args:
            env_id: one of :func:`es_flipout.envs.native_env_ids`.
            num_envs: the number of slots.
            autoreset_mode: what happens to a slot whose episode has ended.
            threads: physics threads, by default one per usable core.
            **kwargs: as for ``gymnasium.make(env_id, **kwargs)``.
        """
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self._env = make_native_env(env_id, num_envs, threads=threads, **kwargs)
        self.num_envs = num_envs
        self.metadata = {"render_modes": [], "autoreset_mode": self.autoreset_mode}
        self.single_observation_space = self._env.observation_space
        self.single_action_space = self._env.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._generators: list[np.random.Generator | None] = [None] * num_envs
        self._ended = np.zeros(num_envs, np.bool_)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[Any], dict[str, Any]]:
        """Start new episodes.

        Args:
            seed: one seed (slot ``i`` gets ``seed + i``), one per slot, or ``None`` to continue the generators.
            options: ``{"reset_mask": (num_envs,) bool}`` resets only the selected slots.

        Returns:
            Observations ``(num_envs, O)`` and an empty info.
        """
        seeds = self._seeds(seed)
        mask = self._reset_mask(options or {})
        for index in np.flatnonzero(mask).tolist():
            if seeds[index] is not None:
                self._generators[index] = seeding.np_random(seeds[index])[0]
        self._ended[mask] = False
        return self._restart(mask), {}

    def step(self, actions: NDArray[Any]) -> Result:
        """Step every slot; see ``gymnasium.vector.SyncVectorEnv.step`` for the three autoreset modes."""
        if self.autoreset_mode is AutoresetMode.DISABLED and self._ended.any():
            raise AssertionError(f"slots {np.flatnonzero(self._ended).tolist()} have ended and were not reset")
        restarted = self._ended if self.autoreset_mode is AutoresetMode.NEXT_STEP else np.zeros_like(self._ended)
        live = torch.from_numpy(~restarted)
        observation, reward, terminated, truncated = self._env.step(torch.from_numpy(np.asarray(actions)), live)
        outcome = reward.numpy(), terminated.numpy(), truncated.numpy()
        self._ended = outcome[1] | outcome[2]
        if self.autoreset_mode is AutoresetMode.SAME_STEP and self._ended.any():
            info = _final_info(observation.numpy(), self._ended)
            return self._restart(self._ended), *outcome, info
        if restarted.any():
            return self._restart(restarted), *outcome, {}
        return observation.numpy(), *outcome, {}

    def render(self) -> None:
        """Not supported; create a single environment with ``gymnasium.make`` and a ``render_mode`` instead."""
        raise NotImplementedError(f"{self} does not render; use gymnasium.make(..., render_mode=...)")

    def close_extras(self, **kwargs: Any) -> None:
        """Release the simulations."""
        del kwargs
        self._env.close()

    def _restart(self, mask: NDArray[np.bool_]) -> NDArray[Any]:
        """Start new episodes in the slots of ``mask`` from their generators, and return observations of all slots."""
        rows = np.flatnonzero(mask)
        starts = [self._env.draw_start(self._generator(index)) for index in rows.tolist()]
        return self._env.restart(rows, np.stack(starts)).numpy()

    def _generator(self, index: int) -> np.random.Generator:
        """Return the generator of a slot; one that was never seeded is seeded with entropy of the operating system."""
        generator = self._generators[index]
        if generator is None:
            generator = self._generators[index] = seeding.np_random()[0]
        return generator

    def _seeds(self, seed: int | Sequence[int | None] | None) -> Sequence[int | None]:
        if seed is None:
            return [None] * self.num_envs
        if isinstance(seed, int):
            return [seed + index for index in range(self.num_envs)]
        if len(seed) != self.num_envs:
            raise ValueError(f"expected {self.num_envs} seeds, one per slot, got {len(seed)}")
        return seed

    def _reset_mask(self, options: dict[str, Any]) -> NDArray[np.bool_]:
        """Return the slots to reset: those of ``options["reset_mask"]``, or all."""
        unknown = [name for name in options if name != "reset_mask"]
        if unknown:
            raise ValueError(f"unsupported reset option {unknown[0]!r}; only 'reset_mask' is supported")
        if "reset_mask" not in options:
            return np.ones(self.num_envs, np.bool_)
        mask = options["reset_mask"]
        if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
            raise TypeError("options['reset_mask'] must be a NumPy array of bool")
        if mask.shape != (self.num_envs,) or not mask.any():
            raise ValueError(f"options['reset_mask'] must have shape ({self.num_envs},) and select at least one slot")
        return mask


def _final_info(observation: NDArray[Any], ended: NDArray[np.bool_]) -> dict[str, Any]:
    """Return the info of a step in which slots ended and were reset immediately, in the format of ``SyncVectorEnv``."""
    final = np.full(len(ended), None, object)
    for index in np.flatnonzero(ended):
        final[index] = observation[index].copy()
    return {"final_obs": final, "_final_obs": ended.copy(), "final_info": {}, "_final_info": ended.copy()}
