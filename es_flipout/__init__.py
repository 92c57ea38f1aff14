"""Evolution strategies that evaluate a whole population of perturbed policies in one batched forward pass."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Without this, MKL rounds a row of a product differently depending on its place in memory, and so on the member's slot.
# MKL reads it at its first call, so it is set before anything of ours computes; a value that the user set stays.
os.environ.setdefault("MKL_CBWR", "AUTO")

# torch takes seconds to import, so names are looked up on first use.
_HOME = {
    "EvolutionStrategy": "es_flipout.strategy",
    "Population": "es_flipout.population",
    "centered_ranks": "es_flipout.shaping",
    "make_env": "es_flipout.envs",
    "run": "es_flipout.rollout",
    "Rollout": "es_flipout.rollout",
    "Flipout": "es_flipout.perturbations",
    "LowRank": "es_flipout.perturbations",
    "Dense": "es_flipout.perturbations",
    "UserError": "es_flipout.errors",
}
_MODULES = ("envs", "nn", "policies")

__all__ = ["__version__", *sorted(_HOME), *_MODULES]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from es_flipout import envs as envs
    from es_flipout import nn as nn
    from es_flipout import policies as policies
    from es_flipout.envs import make_env as make_env
    from es_flipout.errors import UserError as UserError
    from es_flipout.perturbations import Dense as Dense
    from es_flipout.perturbations import Flipout as Flipout
    from es_flipout.perturbations import LowRank as LowRank
    from es_flipout.population import Population as Population
    from es_flipout.rollout import Rollout as Rollout
    from es_flipout.rollout import run as run
    from es_flipout.shaping import centered_ranks as centered_ranks
    from es_flipout.strategy import EvolutionStrategy as EvolutionStrategy


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"es_flipout.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'es_flipout' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
