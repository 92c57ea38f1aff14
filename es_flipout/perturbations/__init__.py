"""Perturbation families: how the members of a population differ from the mean."""

from __future__ import annotations

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
]

_FAMILIES: dict[str, type[Family]] = {"flipout": Flipout, "low_rank": LowRank, "dense": Dense}


def family_named(name: str) -> Family:
    """Return the family ``flipout``, ``low_rank`` or ``dense`` with its default settings.

    Raises:
        UserError: the family is unknown.
    """
    if name not in _FAMILIES:
        raise UserError(f"perturbation must be one of {', '.join(_FAMILIES)}, got {name!r}")
    return _FAMILIES[name]()
