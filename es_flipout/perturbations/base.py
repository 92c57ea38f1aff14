"""What every perturbation family has in common: members, antithetic pairs, vector noise, and the interface of a parameter.

Letters: ``P`` members, ``n`` rows (any chosen members), ``in``/``out`` sizes of a linear layer, weight ``(out, in)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Generic, TypeVar

import torch
from torch import Tensor

from es_flipout.kernels import Precision
from es_flipout.perturbations.operations import Operation
from es_flipout.randomness import Address


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

    def put_where(self, mask: Tensor, other: Rows) -> None:
        """Overwrite the rows where ``mask`` ``(n,)`` holds with those of ``other``: in place, whatever the mask holds."""
        for field in fields(self):
            own = getattr(self, field.name)
            if isinstance(own, Tensor):
                chosen = mask.view(-1, *(1,) * (own.ndim - 1))
                own.copy_(torch.where(chosen, getattr(other, field.name), own))


@dataclass
class MemberRows(Rows):
    """Which member is in each row, ``members`` (n,) int64: all that a kernel needs, which finds the rest itself."""

    members: Tensor


RowsT = TypeVar("RowsT", bound=Rows)


class Perturbation(ABC, Generic[RowsT]):
    """The perturbed copies of one parameter, one for each member, in one generation.

    A parameter of two dimensions or more is ``(d0, d1, *rest)``: ``(out, in)`` of a linear layer, ``(out, in / groups,
    *kernel)`` of a convolution, ``(numbers, size)`` of an embedding. Where the layer's use of it allows, nothing of the size
    of P parameters is made.

    Attributes:
        mean: the unperturbed parameter.
    """

    def __init__(self, mean: Tensor, sigma: float, members: Members, address: Address) -> None:
        self.mean = mean
        self.sigma: float | Tensor = sigma
        self.members = members
        self.address = address

    def keep_sigma_in_memory(self) -> None:
        """Make sigma a tensor, so that it can change where the numbers of a computation cannot (a CUDA graph)."""
        self.sigma = torch.as_tensor(self.sigma, dtype=torch.float64, device=self.mean.device)

    def load_(self, other: Perturbation[RowsT]) -> None:
        """Take over mean, sigma and noise of ``other``, of the same family and shape, without moving in memory."""
        for name, own in vars(self).items():
            if isinstance(own, Tensor):
                theirs = getattr(other, name)
                own.copy_(theirs) if isinstance(theirs, Tensor) else own.fill_(theirs)

    @abstractmethod
    def select(self, members: Tensor) -> RowsT:
        """What a forward needs of the given members, ``(n,)`` int64, as one row each."""

    @abstractmethod
    def values(self, rows: RowsT) -> Tensor:
        """The parameters of the members in the rows, dense, ``(n, *shape)``."""

    @abstractmethod
    def noise(self, member: int) -> Tensor:
        """The perturbation of one member in units of sigma, dense, of the parameter's shape."""

    @abstractmethod
    def weighted_sum(self, u: Tensor) -> Tensor:
        """Sum over the members of ``u`` ``(P,)`` times their perturbations in units of sigma."""

    @abstractmethod
    def linear(self, x: Tensor, rows: RowsT, bias: Tensor | None = None, part: slice | None = None) -> Tensor:
        """Row ``i`` of ``x`` through the linear layer of the member in row ``i``: ``(n, ..., in)`` to ``(n, ..., out)``.

        Args:
            x: ``(n, ..., in)``.
            rows: from :meth:`select`.
            bias: ``(n, out)``.
            part: only these outputs (``bias`` too has only these).
        """

    @abstractmethod
    def embedding(self, index: Tensor, rows: RowsT) -> Tensor:
        """Rows of the weight by number: ``(n, ...)`` int64 to ``(n, ..., d1)``."""

    @abstractmethod
    def apply(self, operation: Operation, x: Tensor, rows: RowsT) -> Tensor:
        """Any other use of the weight: row ``i`` of ``x`` with the weight of the member in row ``i``."""

    def member(self, n: int) -> Tensor:
        """The dense parameter of member ``n``."""
        return self.mean + self.sigma * self.noise(n)


class Family(ABC):
    """A perturbation family with its settings: makes the perturbation of each parameter."""

    @abstractmethod
    def matrix(
        self,
        mean: Tensor,
        sigma: float,
        members: Members,
        address: Address,
        still: int | None = None,
        kernels: Precision | None = None,
    ) -> Perturbation:
        """The perturbed copies of a parameter ``(d0, d1, *rest)``.

        Args:
            mean: the parameter.
            sigma: standard deviation of every entry.
            members: whose copies.
            address: of the random numbers.
            still: an index of the first dimension that stays as it is (the padding of an embedding).
            kernels: precision of the Triton kernels, where they are to be used and the family has some; None for torch.
        """


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


def over_index(row_values: Tensor, index: Tensor) -> Tensor:
    """``row_values[i, index[i]]``: ``(n, size)`` by ``(n, ...)`` int64 to ``(n, ...)``."""
    return row_values.gather(1, index.reshape(len(index), -1)).view(index.shape)
