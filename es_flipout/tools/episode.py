"""One episode of a trained policy in its Gymnasium environment, step by step, for people to see."""

from __future__ import annotations

import copy
import ctypes.util
import importlib
import os
import sys
from typing import Any, Literal

import gymnasium
import numpy as np
from numpy.typing import NDArray

from es_flipout.config import TrainConfig
from es_flipout.envs.base import EnvironmentFailureError, UnsupportedEnvironmentError, described
from es_flipout.errors import UserError
from es_flipout.tools.policy import TrainedPolicy, make_gymnasium_env

_DISPLAYS = ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER")


class Episode:
    """An episode that is played step by step.

    Attributes:
        total: return so far.
        steps: steps so far.
        ended: whether the episode is over.
    """

    def __init__(self, policy: TrainedPolicy, env: gymnasium.Env, seed: int, cap: int | None = None) -> None:
        """Start an episode.

        Args:
            policy: the policy; the episode has a memory of its own.
            env: the environment.
            seed: seed of the start state.
            cap: end the episode after this many steps.
        """
        self._policy, self._env, self._cap = copy.copy(policy), env, cap
        self._policy.reset()
        self.total, self.steps, self.ended = 0.0, 0, False
        self._observation, _ = self._call(env.reset, seed=seed)

    def step(self) -> None:
        """Play one step; nothing happens after the end."""
        if self.ended:
            return
        action = self._policy.act(self._observation)
        self._observation, reward, terminated, truncated, _ = self._call(self._env.step, action)
        self.total, self.steps = self.total + float(reward), self.steps + 1
        self.ended = terminated or truncated or self.steps == self._cap

    def frame(self) -> NDArray[np.uint8]:
        """Return the picture of the current state, ``(H, W, 3)``.

        Raises:
            UserError: the environment cannot be rendered on this machine.
        """
        env_id = self._policy.config.task.env_id
        try:
            image = np.asarray(self._env.render())
        except gymnasium.error.DependencyNotInstalled as error:
            raise _missing(env_id, error) from None
        except Exception as error:
            raise UserError(
                f"{env_id} cannot be rendered here ({described(error)}); without a display, MuJoCo needs EGL or OSMesa, "
                "which the environment variable MUJOCO_GL=egl or MUJOCO_GL=osmesa selects"
            ) from error
        if image.ndim != 3 or image.shape[2] != 3:
            raise UserError(f"{env_id} was rendered to an array of shape {image.shape} instead of (H, W, 3)")
        # Some environments, such as MinAtar's, return fractions.
        return image if image.dtype == np.uint8 else (image * 255).clip(0, 255).astype(np.uint8)

    def _call(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        env_id = self._policy.config.task.env_id
        try:
            return method(*args, **kwargs)
        except gymnasium.error.DependencyNotInstalled as error:  # a viewer opens in the first reset or step
            raise _missing(env_id, error) from None
        except (Exception, SystemExit) as error:
            raise EnvironmentFailureError(f"{env_id} failed: {described(error)}") from error


def make_rendered_env(config: TrainConfig, mode: Literal["human", "rgb_array"]) -> gymnasium.Env:
    """Create the environment of a run for a window (``human``) or for pictures (``rgb_array``).

    On Linux without a display, pictures are rendered with EGL, or with OSMesa where there is no EGL.

    Raises:
        UserError: the environment has no such mode, a package is missing, or there is no display for a window.
        UnsupportedEnvironmentError: the environment cannot be created.
    """
    env_id = config.task.env_id
    headless = sys.platform == "linux" and not any(os.environ.get(name) for name in _DISPLAYS)
    if mode == "human" and headless:
        raise UserError(f"there is no display for a window: es-flipout render writes {env_id} to a video instead")
    if headless:
        os.environ.setdefault("MUJOCO_GL", "egl" if ctypes.util.find_library("EGL") else "osmesa")
    require_render_mode(config, mode)
    env = _make(config, render_mode=mode, disable_env_checker=True)
    _follow(env)
    return env


def require_render_mode(config: TrainConfig, mode: Literal["human", "rgb_array"]) -> None:
    """Check that the environment of a run has a render mode, without rendering anything.

    Raises:
        UserError: it has not, or a package is missing.
        UnsupportedEnvironmentError: the environment cannot be created.
    """
    plain = _make(config)
    modes = plain.metadata.get("render_modes", [])
    plain.close()
    if mode not in modes:
        shown = ", ".join(modes) or "none"
        raise UserError(f"{config.task.env_id} cannot be rendered: its render modes are {shown}, not {mode}")


def _make(config: TrainConfig, **kwargs: Any) -> gymnasium.Env:
    env_id = config.task.env_id
    try:
        return make_gymnasium_env(config, **kwargs)
    except gymnasium.error.DependencyNotInstalled as error:
        raise _missing(env_id, error) from None
    except UserError:
        raise
    except Exception as error:
        raise UnsupportedEnvironmentError(f"{env_id} cannot be created: {described(error)}") from error


def _follow(env: gymnasium.Env) -> None:
    """Let the camera follow the body of a MuJoCo task that moves around.

    Gymnasium 1.4 does so only with a camera that was named in ``gymnasium.make``: without one its camera stands still, and
    the ``trackbodyid`` of its tasks is ignored. Models of tasks that move around have a camera named "track".
    """
    renderer = getattr(env.unwrapped, "mujoco_renderer", None)
    if renderer is None or getattr(renderer, "camera_id", None) != -1:
        return
    mujoco: Any = importlib.import_module("mujoco")  # its type stubs are incomplete
    if mujoco.mj_name2id(renderer.model, mujoco.mjtObj.mjOBJ_CAMERA, "track") != -1:
        camera = {"trackbodyid": 1, **(renderer.default_cam_config or {})}
        renderer.default_cam_config = {**camera, "type": int(mujoco.mjtCamera.mjCAMERA_TRACKING)}
        renderer.camera_id = None  # as configured; -1 would stop it again


def _missing(env_id: str, error: Exception) -> UserError:
    return UserError(f"{env_id} needs the extra render: pip install 'es-flipout[render]' ({error})")
