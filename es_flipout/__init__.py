"""Evolution strategies that evaluate a whole population of perturbed policies in one batched forward pass."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

# Without this, MKL may round a row of a product differently depending on its memory alignment, and so on the member's
# slot. MKL reads the variable at its first call, so it is set before anything is computed; a value set by the user is
# kept.
os.environ.setdefault("MKL_CBWR", "AUTO")

# Importing torch takes seconds, so names are imported on first use.
_HOME = {
    "EvolutionStrategy": "es_flipout.strategy.evolution_strategy",
    "Population": "es_flipout.strategy.population",
    "centered_ranks": "es_flipout.strategy.shaping",
    "make_env": "es_flipout.envs",
    "run": "es_flipout.rollout.host",
    "Rollout": "es_flipout.rollout.episodes",
    "Episodes": "es_flipout.rollout.episodes",
    "Flipout": "es_flipout.perturbations",
    "LowRank": "es_flipout.perturbations",
    "Dense": "es_flipout.perturbations",
    "UserError": "es_flipout.errors",
    "load": "es_flipout.tools.policy",
    "TrainedPolicy": "es_flipout.tools.policy",
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
    from es_flipout.rollout.episodes import Episodes as Episodes
    from es_flipout.rollout.episodes import Rollout as Rollout
    from es_flipout.rollout.host import run as run
    from es_flipout.strategy.evolution_strategy import EvolutionStrategy as EvolutionStrategy
    from es_flipout.strategy.population import Population as Population
    from es_flipout.strategy.shaping import centered_ranks as centered_ranks
    from es_flipout.tools.policy import TrainedPolicy as TrainedPolicy
    from es_flipout.tools.policy import load as load


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"es_flipout.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'es_flipout' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
