"""Batches of environments as torch tensors. Importing this package registers the ``es_flipout/`` Gymnasium ids."""

from es_flipout.envs.base import BatchEnv, EnvironmentFailureError, UnsupportedEnvironmentError
from es_flipout.envs.factory import register_factory
from es_flipout.envs.make import make_env, native_env_ids
from es_flipout.envs.observed import SelectObservation
from es_flipout.envs.registration import register_native_envs
from es_flipout.envs.vector import NativeVectorEnv

__all__ = [
    "BatchEnv",
    "EnvironmentFailureError",
    "NativeVectorEnv",
    "SelectObservation",
    "UnsupportedEnvironmentError",
    "make_env",
    "native_env_ids",
    "register_factory",
]

register_native_envs()
