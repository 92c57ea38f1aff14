"""Perturbation families: how the members of a population differ from the mean."""

from __future__ import annotations

from es_flipout.config import TrainConfig
from es_flipout.errors import UserError
from es_flipout.perturbations.base import Family, Members, Perturbation, Rows
from es_flipout.perturbations.dense import Dense
from es_flipout.perturbations.flipout import Flipout
from es_flipout.perturbations.independent import Fixed, Independent
from es_flipout.perturbations.low_rank import LowRank

__all__ = [
    "Dense",
    "Family",
    "Fixed",
    "Flipout",
    "Independent",
    "LowRank",
    "Members",
    "Perturbation",
    "Rows",
    "family_named",
    "family_of",
]

_FAMILIES: dict[str, type[Family]] = {"flipout": Flipout, "low_rank": LowRank, "dense": Dense}


def family_named(name: str) -> Family:
    """The family ``flipout``, ``low_rank`` or ``dense`` with its default settings.

    Raises:
        UserError: there is no such family.
    """
    if name not in _FAMILIES:
        raise UserError(f"perturbation must be one of {', '.join(_FAMILIES)}, got {name!r}")
    return _FAMILIES[name]()


def family_of(config: TrainConfig) -> Family:
    """The configured perturbation family."""
    match config.perturbation:
        case "flipout":
            return Flipout(base=config.base, bases=config.bases)
        case "low_rank":
            return LowRank(rank=config.rank)
        case "dense":
            return Dense()
