"""Registers the native environments with Gymnasium as ``es_flipout/<id>``."""

from __future__ import annotations

import functools

import gymnasium

from es_flipout.envs.make import NAMESPACE, native_env_ids
from es_flipout.envs.vector import NativeVectorEnv


def register_native_envs() -> None:
    """Register vector environments for ``gymnasium.make_vec("es_flipout/<id>")``.

    ``gymnasium.make`` of the same id creates Gymnasium's own single environment, with the same results.
    """
    for env_id in native_env_ids():
        single = gymnasium.spec(env_id)
        gymnasium.register(
            NAMESPACE + env_id,
            entry_point=single.entry_point,
            reward_threshold=single.reward_threshold,
            max_episode_steps=single.max_episode_steps,
            vector_entry_point=functools.partial(NativeVectorEnv, env_id),
        )
