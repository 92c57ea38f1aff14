"""Creation of environments by id, with the choice of a backend: :func:`make_env`."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import gymnasium
import torch

from es_flipout.envs.base import BatchEnv, UnsupportedEnvironmentError, described
from es_flipout.envs.classic import CLASSIC_TASKS
from es_flipout.envs.factory import Factory, register_factory
from es_flipout.envs.gymnasium_adapter import GymnasiumBatchEnv
from es_flipout.envs.mujoco_tasks import MUJOCO_TASKS
from es_flipout.envs.native import NativeBatchEnv, build_task
from es_flipout.envs.observed import observe
from es_flipout.envs.torch_env import TorchBatchEnv

NAMESPACE = "es_flipout/"

# Where environments outside Gymnasium come from, by namespace.
_PACKAGES = {
    "MinAtar": "minatar",
    "ALE": "ale-py",
    "dm_control": "'shimmy[dm-control]'",
    "MiniGrid": "minigrid",
    "highway": "highway-env",
    "procgen": "procgen",
}


def native_env_ids() -> dict[str, str]:
    """Return the ids with a native implementation, each with its backend (``"torch"`` or ``"mujoco"``)."""
    return {**dict.fromkeys(CLASSIC_TASKS, "torch"), **dict.fromkeys(MUJOCO_TASKS, "mujoco")}


def make_env(
    env_id: str | Factory,
    num_envs: int,
    device: str | torch.device = "cpu",
    *,
    threads: int | None = None,
    vectorization_mode: str = "sync",
    observed: Sequence[int] | None = None,
    **kwargs: Any,
) -> BatchEnv:
    """Create a batch of environments, with the native implementation of ``env_id`` if there is one.

    Args:
        env_id: a Gymnasium id; the prefix ``es_flipout/`` of the vector environments is allowed. Or a function (or class)
            that returns a Gymnasium environment.
        num_envs: the number of slots.
        device: device of the tensors. Torch environments run on any device; MuJoCo tasks on the CPU and, with the extra
            ``gpu``, on CUDA (:class:`es_flipout.envs.mujoco_gpu.MujocoWarpBatchEnv`); others on the CPU.
        threads: physics threads of MuJoCo on the CPU, by default one per usable core; ignored by other backends.
        vectorization_mode: ``"sync"`` or ``"async"`` (one process per slot), for ids without a native implementation.
        observed: entries of the observation to keep, in this order; by default all.
        **kwargs: as for ``gymnasium.make(env_id, **kwargs)``.

    Raises:
        UnsupportedEnvironmentError: the id, a keyword, a space or the device is not supported.
        ValueError: ``num_envs`` is not positive.
    """
    if not isinstance(env_id, str):
        env_id = register_factory(env_id)
    if observed is not None:
        whole = make_env(env_id, num_envs, device, threads=threads, vectorization_mode=vectorization_mode, **kwargs)
        return observe(whole, observed)
    env_id = env_id.removeprefix(NAMESPACE)
    if env_id in native_env_ids():
        return make_native_env(env_id, num_envs, device, threads=threads, **kwargs)
    _check_size(num_envs)
    if torch.device(device).type != "cpu":
        raise UnsupportedEnvironmentError(f"{env_id} runs on the CPU only; use device='cpu', not {str(device)!r}")
    _require_registered(env_id)
    return GymnasiumBatchEnv(env_id, num_envs, kwargs, vectorization_mode)


def make_native_env(
    env_id: str, num_envs: int, device: str | torch.device = "cpu", *, threads: int | None = None, **kwargs: Any
) -> NativeBatchEnv:
    """Like :func:`make_env`, for the ids of :func:`native_env_ids`."""
    _check_size(num_envs)
    device = torch.device(device)
    _require_card(device)
    if env_id in CLASSIC_TASKS:
        task = build_task(CLASSIC_TASKS[env_id], env_id, kwargs)
        return TorchBatchEnv(env_id, task, num_envs, kwargs, device)
    task = build_task(MUJOCO_TASKS[env_id], env_id, kwargs)
    if device.type == "cuda":
        try:
            from es_flipout.envs.mujoco_gpu import MujocoWarpBatchEnv
        except ImportError as error:
            needed = "pip install 'es-flipout[gpu]'"
            raise UnsupportedEnvironmentError(
                f"{env_id} on {str(device)!r} requires mujoco-warp: {needed} ({error})"
            ) from error
        return MujocoWarpBatchEnv(env_id, task, num_envs, kwargs, device)
    if device.type != "cpu":
        raise UnsupportedEnvironmentError(f"{env_id} runs on 'cpu' or 'cuda', not on {str(device)!r}")
    try:
        from es_flipout.envs.mujoco_cpu import MujocoBatchEnv
    except ImportError as error:
        raise UnsupportedEnvironmentError(f"{env_id} requires MuJoCo: pip install mujoco ({error})") from error
    return MujocoBatchEnv(env_id, task, num_envs, kwargs, threads)


def _check_size(num_envs: int) -> None:
    if num_envs < 1:
        raise ValueError(f"num_envs must be at least 1, got {num_envs}")


def _require_card(device: torch.device) -> None:
    if device.type != "cuda":
        return
    cards = torch.cuda.device_count()
    if not cards:
        raise UnsupportedEnvironmentError(
            f"device {str(device)!r} was requested, but torch finds no CUDA GPU; use 'cpu'"
        )
    if (device.index or 0) >= cards:
        raise UnsupportedEnvironmentError(
            f"device {str(device)!r} was requested, but torch finds only {cards} CUDA GPU(s)"
        )


def _require_registered(env_id: str) -> None:
    """Raise unless ``env_id`` (``module:id`` to import a module first) is registered."""
    module, _, name = env_id.rpartition(":")
    if module:
        _import(module, env_id)
    namespace = name.rpartition("/")[0]
    if namespace and not any(spec.namespace == namespace for spec in gymnasium.registry.values()):
        # Packages such as MinAtar define in their metadata how the ids of their namespace are registered.
        for plugin in entry_points(group="gymnasium.envs", name=namespace):
            plugin.load()()
    if name not in gymnasium.registry:
        package = _PACKAGES.get(namespace)
        if package is not None and not any(spec.namespace == namespace for spec in gymnasium.registry.values()):
            raise UnsupportedEnvironmentError(f"{env_id} needs a package that is missing: pip install {package}")
        raise UnsupportedEnvironmentError(f"unknown environment {name!r}{_suggestion(name)}")


def _import(module: str, env_id: str) -> None:
    """Import the module of ``module:id``.

    Raises:
        UnsupportedEnvironmentError: there is no such module, or it raises while it is imported.
    """
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise UnsupportedEnvironmentError(f"{env_id}: {module} cannot be imported: {described(error)}") from error
        here = str(Path.cwd())
        first = f"the current folder ({here}), " if {"", here} & set(sys.path) else ""
        raise UnsupportedEnvironmentError(
            f"{env_id}: cannot import {module} ({error}); searched {first}PYTHONPATH and the installed packages"
        ) from error
    except (Exception, SystemExit) as error:
        raise UnsupportedEnvironmentError(f"{env_id}: {module} cannot be imported: {described(error)}") from error


def _suggestion(name: str) -> str:
    """Return ``; did you mean ...?`` with the closest registered ids in their newest versions, or an empty string."""
    newest: dict[str, str] = {}
    specs = [spec for spec in gymnasium.registry.values() if spec.namespace is None]
    for spec in sorted(specs, key=lambda spec: spec.version or 0):
        newest[spec.name.lower()] = spec.id
        newest[spec.id.lower()] = spec.id
    near = difflib.get_close_matches(name.lower(), newest, n=6)
    ids = list(dict.fromkeys(newest[match] for match in near))[:3]
    return f"; did you mean {' or '.join(ids)}?" if ids else ""
