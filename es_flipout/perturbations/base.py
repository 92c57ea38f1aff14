"""What every perturbation family has in common: members, antithetic pairs, vector noise, and the interface of a layer.

Letters: ``P`` members, ``n`` rows (any chosen members), ``in``/``out`` sizes of a linear layer, weight ``(out, in)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Generic, TypeVar

import torch
from torch import Tensor

from es_flipout.randomness import Address, Stream, normals


@dataclass(frozen=True)
class Members:
    """Which members of a population are at hand and where their noise comes from.

    With antithetic pairs the members ``2k`` and ``2k + 1`` use the noise source ``k`` with opposite sign; without, every
    member is its own source. A share of a population starts at ``first`` (even when antithetic) and has ``size`` members.
    """

    population_size: int
    antithetic: bool
    device: torch.device
    size: int
    first: int = 0

    @property
    def share(self) -> int:
        """Members that share one noise source."""
        return 2 if self.antithetic else 1

    @property
    def sources(self) -> Tensor:
        """Addresses of the noise sources at hand, ``(num_sources,)`` int64."""
        return torch.arange(self.first // self.share, (self.first + self.size) // self.share, device=self.device)

    def source_of(self, members: Tensor) -> Tensor:
        """Index into :attr:`sources` of the given members (numbered from 0 within this share), ``(n,)`` int64."""
        return members // self.share

    def sign_of(self, members: Tensor) -> Tensor:
        """+1 or -1 for each of the given members, ``(n,)`` int8."""
        if self.antithetic:
            return (1 - 2 * (members % 2)).to(torch.int8)
        return torch.ones_like(members, dtype=torch.int8)

    def per_source(self, u: Tensor) -> Tensor:
        """Fold weights of members ``(P,)`` into weights of sources ``(num_sources,)``: partners enter with opposite sign."""
        return u[0::2] - u[1::2] if self.antithetic else u


@dataclass
class Rows:
    """What a layer needs of ``n`` members; every tensor field has the row as its first dimension."""

    def put(self, index: Tensor, other: Rows) -> None:
        """Overwrite the rows ``index`` ``(k,)`` with the ``k`` rows of ``other``, of the same kind."""
        for field in fields(self):
            own = getattr(self, field.name)
            if own is not None:
                own[index] = getattr(other, field.name)


RowsT = TypeVar("RowsT", bound=Rows)


class LinearPerturbation(ABC, Generic[RowsT]):
    """The perturbed copies of one linear layer, one for each member, in one generation.

    Nothing of the size of P weight matrices is stored (except by the ``dense`` family, whose purpose that is).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, sigma: float, members: Members, address: Address) -> None:
        self.weight = weight
        self.weight_t = weight.T
        self.bias = bias
        self.sigma = sigma
        self.members = members
        self.address = address
        self.bias_noise = (
            None if bias is None else normals(address, Stream.BIAS, members.sources, len(bias)).to(bias.dtype)
        )

    @abstractmethod
    def select(self, members: Tensor) -> RowsT:
        """What :meth:`linear` needs of the given members, ``(n,)`` int64, as one row each."""

    @abstractmethod
    def linear(self, x: Tensor, rows: RowsT) -> Tensor:
        """Row ``i`` of ``x`` through the layer of the member in row ``i``: ``(n, ..., in)`` to ``(n, ..., out)``."""

    @abstractmethod
    def weight_noise(self, member: int) -> Tensor:
        """The perturbation of one member's weight in units of sigma, dense, ``(out, in)``."""

    @abstractmethod
    def weighted_weight_sum(self, v: Tensor) -> Tensor:
        """Sum over the noise sources of ``v`` times the weight perturbation in units of sigma, ``(out, in)``."""

    def weighted_sum(self, u: Tensor) -> tuple[Tensor, Tensor | None]:
        """Sum over the members of ``u`` ``(P,)`` times their perturbations in units of sigma: weight and bias."""
        v = self.members.per_source(u).to(self.weight.dtype)
        return self.weighted_weight_sum(v), None if self.bias_noise is None else v @ self.bias_noise

    def member(self, n: int) -> tuple[Tensor, Tensor | None]:
        """The dense weight ``(out, in)`` and bias ``(out,)`` of member ``n``."""
        weight = self.weight + self.sigma * self.weight_noise(n)
        if self.bias is None or self.bias_noise is None:
            return weight, None
        index = torch.tensor([n], device=self.weight.device)
        noise = self.bias_noise[self.members.source_of(index)] * self.members.sign_of(index)[:, None]
        return weight, self.bias + self.sigma * noise[0]

    def bias_rows(self, members: Tensor) -> Tensor | None:
        """The biases of the given members, ``(n, out)``."""
        if self.bias is None or self.bias_noise is None:
            return None
        scale = self.sigma * self.members.sign_of(members).to(self.bias.dtype)
        return torch.addcmul(self.bias, self.bias_noise[self.members.source_of(members)], scale[:, None])


class Family(ABC):
    """A perturbation family with its settings: makes the perturbation of each layer."""

    @abstractmethod
    def linear(
        self, weight: Tensor, bias: Tensor | None, sigma: float, members: Members, address: Address
    ) -> LinearPerturbation:
        """The perturbed copies of a linear layer with mean ``weight`` ``(out, in)`` and ``bias`` ``(out,)``."""


def over_rows(row_values: Tensor, like: Tensor) -> Tensor:
    """Reshape ``(n, size)`` to broadcast over the middle dimensions of ``like`` ``(n, ..., any)``."""
    if like.ndim == 2:
        return row_values
    return row_values.view(row_values.shape[0], *(1,) * (like.ndim - 2), row_values.shape[1])


def mean_linear(x: Tensor, weight_t: Tensor, bias_rows: Tensor | None) -> Tensor:
    """``x @ weight_t`` plus each row's own bias: ``(n, ..., in)`` to ``(n, ..., out)``."""
    if bias_rows is None:
        return x @ weight_t
    if x.ndim == 2:
        return torch.addmm(bias_rows, x, weight_t)
    return (x @ weight_t).add_(over_rows(bias_rows, x))
