"""Environments made by a function of the user, under an id: :func:`register_factory`."""

from __future__ import annotations

import re
from collections.abc import Callable

import gymnasium

from es_flipout.envs.base import UnsupportedEnvironmentError

Factory = Callable[..., gymnasium.Env]

_NAMESPACE = "factory"
_made: dict[int, tuple[Factory, str]] = {}  # by the identity of the function, which is kept alive


def register_factory(factory: Factory, env_id: str | None = None) -> str:
    """Register a function, or a class, that makes a Gymnasium environment, for this process.

    Args:
        factory: called with the keyword arguments of ``gymnasium.make``.
        env_id: the id; by default one is made of the name of the function.

    Returns:
        The id, the same for the same function.

    Raises:
        UnsupportedEnvironmentError: the id belongs to another environment.
    """
    if env_id is None and id(factory) in _made:
        return _made[id(factory)][1]
    name = re.sub(r"[^\w.-]", "", getattr(factory, "__name__", type(factory).__name__)) or "made"
    wanted = env_id if env_id is not None else f"{_NAMESPACE}/{name}-v{len(_made)}"
    known = gymnasium.registry.get(wanted)
    if known is not None and known.entry_point is not factory:
        raise UnsupportedEnvironmentError(f"{wanted} is already the id of another environment; choose another id")
    if known is None:
        gymnasium.register(wanted, entry_point=factory)
    if env_id is None:
        _made[id(factory)] = factory, wanted
    return wanted
