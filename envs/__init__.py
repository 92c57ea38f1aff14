"""Batches of environments as torch tensors. Importing this package registers the ``es_flipout/`` Gymnasium ids."""

from .base import BatchEnv, EnvironmentFailureError, UnsupportedEnvironmentError
from .make import make_env, native_env_ids
from .registration import register_native_envs
from .vector import NativeVectorEnv

__all__ = [
    "BatchEnv",
    "EnvironmentFailureError",
    "NativeVectorEnv",
    "UnsupportedEnvironmentError",
    "make_env",
    "native_env_ids",
]

register_native_envs()
