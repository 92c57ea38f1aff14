"""Any registered Gymnasium environment as a batch: :class:`GymnasiumBatchEnv`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray
from torch import Tensor

from es_flipout.envs.base import ActionSpace, BatchEnv, EnvironmentFailureError, UnsupportedEnvironmentError, described

# Extras of es-flipout that Gymnasium's own environments need, by the module that defines them.
_EXTRAS = {"gymnasium.envs.box2d": "box2d"}


class FreshWorld(gymnasium.Wrapper):
    """Gives BipedalWalker a new Box2D world for every episode.

    The environment reuses its world, so an episode also depends on those that were played before it, not on its seed
    alone. (LunarLander had the same fault: Gymnasium's issue 728, fixed in LunarLander-v3.)
    """

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Remove everything from the world, replace it, and reset."""
        walker: Any = self.env.unwrapped
        walker._destroy()
        walker.world = type(walker.world)()
        return self.env.reset(seed=seed, options=options)


class Freezable(gymnasium.Wrapper):
    """Lets a vector environment skip this environment: the action becomes ``(live, action)``.

    A vector environment steps every sub-environment, and in the mode used here it resets a finished one without a seed
    in the next step. In both cases, this wrapper returns the last observation and does not call the environment.
    """

    def __init__(self, env: gymnasium.Env, observation_shape: tuple[int, ...] | None) -> None:
        """Wrap ``env``; ``observation_shape`` is that before flattening (None if observations were no arrays)."""
        super().__init__(env)
        self.observation_shape = observation_shape
        self.action_space = gymnasium.spaces.Tuple((Discrete(2), env.action_space))
        space = env.observation_space
        # The observation of a slot before its first episode.
        self._last: Any = np.zeros(space.shape, space.dtype) if isinstance(space, Box) else None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset if there is a seed; the vector environment's own resets have none and do nothing."""
        if seed is not None:
            self._last, _ = self.env.reset(seed=seed, options=options)
        return self._last, {}

    def step(self, action: tuple[int, Any]) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Step if the slot is live according to ``action[0]``."""
        if not action[0]:
            return self._last, 0.0, False, False, {}
        self._last, reward, terminated, truncated, _ = self.env.step(action[1])
        return self._last, float(reward), terminated, truncated, {}


class GymnasiumBatchEnv(BatchEnv):
    """A Gymnasium environment on the CPU, one Python object per slot.

    Observations that are not a one-dimensional ``Box``, and actions of any shape, are flattened; discrete actions start at
    0. A non-finite observation terminates the slot with reward 0, and the slot keeps returning its
    last finite observation.
    """

    def __init__(self, env_id: str, num_envs: int, kwargs: Mapping[str, Any], vectorization_mode: str = "sync") -> None:
        """Create the environments.

        Args:
            env_id: a registered Gymnasium id.
            num_envs: ``S``.
            kwargs: the keyword arguments of ``gymnasium.make``.
            vectorization_mode: ``"sync"`` (sequential) or ``"async"`` (one process per environment).

        Raises:
            UnsupportedEnvironmentError: the environment cannot be created, or its spaces are not supported.
        """
        if vectorization_mode not in ("sync", "async"):
            raise UnsupportedEnvironmentError(f"vectorization_mode must be sync or async, got {vectorization_mode!r}")
        try:
            self._envs = gymnasium.make_vec(
                env_id,
                num_envs,
                vectorization_mode,
                vector_kwargs={"autoreset_mode": AutoresetMode.NEXT_STEP},
                wrappers=[_prepare],
                disable_env_checker=True,
                **kwargs,
            )
        except gymnasium.error.DependencyNotInstalled as error:
            extra = extra_of(env_id)
            needed = _line(error) if extra is None else f"pip install 'es-flipout[{extra}]'"
            raise UnsupportedEnvironmentError(f"{env_id} needs a package that is missing: {needed}") from error
        except gymnasium.error.Error as error:
            raise UnsupportedEnvironmentError(f"{env_id} cannot be created: {_line(error)}") from error
        except (Exception, SystemExit) as error:
            raise UnsupportedEnvironmentError(f"{env_id} cannot be created: {described(error)}") from error
        self.env_id = env_id
        self.kwargs = dict(kwargs)
        self.num_envs = num_envs
        self.max_episode_steps = _time_limit(env_id, kwargs)
        self.alive_bonus = 0.0
        self.device = torch.device("cpu")
        self.backend = "gymnasium"
        self.diverged = torch.zeros(num_envs, dtype=torch.bool)
        try:
            self.observation_space = _flat_box(env_id, self._envs.single_observation_space)
            self._inner_action_space = _supported_action_space(env_id, self._envs.single_action_space)
        except UnsupportedEnvironmentError:
            self.close()
            raise
        before: tuple[tuple[int, ...] | None, ...] = self._envs.get_attr("observation_shape")  # pyright: ignore[reportAttributeAccessIssue]
        self._observation_shape = before[0] or self.observation_space.shape
        self.action_space = _shown_action_space(self._inner_action_space)
        self._observation = np.zeros((num_envs, *self.observation_space.shape), self.observation_space.dtype)
        self._envs.reset()  # calls no environment; a masked reset requires a full one before it

    @property
    def observation_shape(self) -> tuple[int, ...]:
        """See :class:`BatchEnv`."""
        return self._observation_shape

    def reset(self, seeds: Tensor, mask: Tensor | None = None) -> Tensor:
        """See :meth:`BatchEnv.reset`."""
        rows = np.ones(self.num_envs, np.bool_) if mask is None else mask.numpy()
        if rows.any():
            chosen = [int(seed) if row else None for seed, row in zip(seeds, rows, strict=True)]
            options = {"reset_mask": rows.copy()}
            observation, _ = self._call("reset", seed=chosen, options=options)
            self._observation[rows] = observation[rows]
        return torch.from_numpy(self._observation.copy())

    def step(self, action: Tensor, live: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See :meth:`BatchEnv.step`."""
        expected = (self.num_envs, *(self.action_space.shape or ()))
        if action.shape != expected:
            raise ValueError(f"{self.env_id}: actions must have shape {expected}, got {tuple(action.shape)}")
        mask = np.ones(self.num_envs, np.bool_) if live is None else live.numpy()
        actions = self._inner_actions(action, mask)
        observation, reward, terminated, truncated, _ = self._call("step", (mask.astype(np.int64), actions))
        diverged = mask & ~np.isfinite(observation).all(1)
        moved = mask & ~diverged
        self._observation[moved] = observation[moved]
        self.diverged = torch.from_numpy(diverged)
        return (
            torch.from_numpy(self._observation.copy()),
            torch.from_numpy(np.where(moved, reward, 0.0)),
            torch.from_numpy((terminated & mask) | diverged),
            torch.from_numpy(truncated & mask),
        )

    def close(self) -> None:
        """See :meth:`BatchEnv.close`."""
        self._envs.close()

    def _inner_actions(self, action: Tensor, mask: NDArray[np.bool_]) -> NDArray[Any]:
        """Convert actions to those of the environment; actions of frozen slots are replaced by a valid one."""
        space = self._inner_action_space
        if isinstance(space, Discrete):
            return np.where(mask, action.numpy(), 0) + space.start
        if isinstance(space, MultiDiscrete | MultiBinary):
            whole = np.where(mask[:, None], action.numpy(), 0).astype(space.dtype).reshape(self.num_envs, *space.shape)
            return whole + space.start if isinstance(space, MultiDiscrete) else whole
        actions = np.where(mask[:, None], action.detach().numpy(), 0.0).astype(space.dtype)
        return actions.reshape(self.num_envs, *space.shape)

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the vector environment; exceptions are re-raised with the name of the environment."""
        try:
            return getattr(self._envs, method)(*args, **kwargs)
        except (Exception, SystemExit) as error:
            raise EnvironmentFailureError(f"{self.env_id}: {described(error)}") from error


def extra_of(env_id: str) -> str | None:
    """Return the extra of es-flipout that a registered environment needs, or None if it needs none."""
    entry_point = gymnasium.spec(env_id.rpartition(":")[2]).entry_point
    module = entry_point.rpartition(".")[0] if isinstance(entry_point, str) else ""
    return _EXTRAS.get(module)


def _prepare(env: gymnasium.Env) -> Freezable:
    """Wrap an environment to flatten its observations and to make it freezable, and its episodes a function of their seeds."""
    space = env.observation_space
    if type(env.unwrapped).__module__ == "gymnasium.envs.box2d.bipedal_walker":
        env = FreshWorld(env)
    if not isinstance(space, Box) or len(space.shape) != 1:
        env = gymnasium.wrappers.FlattenObservation(env)
    return Freezable(env, space.shape)


def _flat_box(env_id: str, space: gymnasium.Space) -> Box:
    if not isinstance(space, Box) or len(space.shape) != 1:
        raise UnsupportedEnvironmentError(f"{env_id}: observations of {space} cannot be flattened to a fixed size")
    return space


def _supported_action_space(env_id: str, space: gymnasium.Space) -> ActionSpace:
    """Return the environment's action space, extracted from that of :class:`Freezable`."""
    inner = space[1] if isinstance(space, gymnasium.spaces.Tuple) else space
    if isinstance(inner, Discrete | MultiDiscrete | MultiBinary):
        return inner
    if isinstance(inner, Box) and np.issubdtype(inner.dtype, np.floating):
        return inner
    raise UnsupportedEnvironmentError(
        f"{env_id}: actions must be Discrete, MultiDiscrete, MultiBinary or a floating-point Box, not {inner}"
    )


def _shown_action_space(space: ActionSpace) -> ActionSpace:
    if isinstance(space, Discrete):
        return Discrete(int(space.n))
    if isinstance(space, MultiDiscrete):
        return MultiDiscrete(space.nvec.ravel())
    if isinstance(space, MultiBinary):
        return MultiBinary(int(np.prod(space.shape)))
    return Box(space.low.ravel(), space.high.ravel(), dtype=space.dtype.type)


def _time_limit(env_id: str, kwargs: Mapping[str, Any]) -> int | None:
    limit = kwargs.get("max_episode_steps") or gymnasium.spec(env_id.rpartition(":")[2]).max_episode_steps
    return None if limit == -1 else limit


def _line(error: Exception) -> str:
    """Return the first line of an exception's message."""
    return str(error).strip().partition("\n")[0]
