"""Dense perturbations: an independent standard normal matrix per member; the reference ("IdealES" of Flipout's paper).

Memory and time grow with P times the number of weights; the other families avoid that.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from es_flipout.kernels import Precision
from es_flipout.perturbations.base import Family, Members
from es_flipout.perturbations.independent import Independent
from es_flipout.randomness import Address, Stream


@dataclass(frozen=True)
class Dense(Family):
    """The dense family; it has no settings."""

    @override
    def matrix(
        self,
        mean: Tensor,
        sigma: float,
        members: Members,
        address: Address,
        still: int | None = None,
        kernels: Precision | None = None,
    ) -> Independent:
        return Independent(mean, sigma, members, address, Stream.WEIGHT, still)
