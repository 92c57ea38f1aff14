"""What all perturbation families have in common: members, antithetic pairs, and the interface of a perturbed parameter.

Letters: ``P`` members, ``n`` rows (any selected members), ``in``/``out`` sizes of a linear layer, weight ``(out, in)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Generic, TypeVar

import torch
from torch import Tensor

from es_flipout.kernels import Precision
from es_flipout.perturbations.operations import Operation
from es_flipout.randomness import Address

SOURCES_PER_BLOCK = 4096  # bounds the memory of a weighted sum; fixed, because it determines the order of the sum


@dataclass(frozen=True)
class Members:
    """The members of a population, or of a shard of it, and the noise sources they use.

    With antithetic pairs, members ``2k`` and ``2k + 1`` use noise source ``k`` with opposite signs; without, every
    member has its own source. A shard starts at member ``first`` (even if antithetic) and has ``size`` members.
    """

    population_size: int
    antithetic: bool
    device: torch.device
    size: int
    first: int = 0

    @property
    def per_source(self) -> int:
        """Number of members per noise source."""
        return 2 if self.antithetic else 1

    @property
    def sources(self) -> Tensor:
        """Addresses of the noise sources of this shard, ``(num_sources,)`` int64."""
        return torch.arange(
            self.first // self.per_source, (self.first + self.size) // self.per_source, device=self.device
        )

    @property
    def blocks(self) -> list[slice]:
        """Indices into :attr:`sources` of the blocks over which a weighted sum is computed, one after the other.

        On the CPU these are blocks of a fixed size, so that other processes can compute some of them; on a GPU, all sources.
        """
        count = self.size // self.per_source
        step = SOURCES_PER_BLOCK if self.device.type == "cpu" else max(count, 1)
        return [slice(start, min(start + step, count)) for start in range(0, max(count, 1), step)]

    def source_of(self, members: Tensor) -> Tensor:
        """Return the indices into :attr:`sources` of members (numbered from 0 within this shard), ``(n,)`` int64."""
        return members // self.per_source

    def sign_of(self, members: Tensor) -> Tensor:
        """Return +1 or -1 for each of the given members, ``(n,)`` int8."""
        if self.antithetic:
            return (1 - 2 * (members % 2)).to(torch.int8)
        return torch.ones_like(members, dtype=torch.int8)

    def fold(self, u: Tensor) -> Tensor:
        """Fold weights of members ``(P,)`` into weights of sources ``(num_sources,)``: partners have opposite signs."""
        return u[0::2] - u[1::2] if self.antithetic else u


@dataclass
class Rows:
    """What a layer needs to know about ``n`` members; the first dimension of every tensor field is the row."""

    def put(self, index: Tensor, other: Rows) -> None:
        """Overwrite the rows ``index`` ``(k,)`` with the ``k`` rows of ``other``, which has the same class."""
        for field in fields(self):
            own = getattr(self, field.name)
            if own is not None:
                own[index] = getattr(other, field.name)

    def put_where(self, mask: Tensor, other: Rows) -> None:
        """Overwrite rows where ``mask`` ``(n,)`` is true with those of ``other``, in place, with fixed shapes."""
        for field in fields(self):
            own = getattr(self, field.name)
            if isinstance(own, Tensor):
                chosen = mask.view(-1, *(1,) * (own.ndim - 1))
                own.copy_(torch.where(chosen, getattr(other, field.name), own))


@dataclass
class MemberRows(Rows):
    """The member of each row, ``members`` (n,) int64; kernels need nothing else."""

    members: Tensor


RowsT = TypeVar("RowsT", bound=Rows)


class Perturbation(ABC, Generic[RowsT]):
    """The perturbed copies of one parameter, one per member, in one generation.

    A parameter with two or more dimensions is ``(d0, d1, *rest)``: ``(out, in)`` for a linear layer,
    ``(out, in / groups, *kernel)`` for a convolution, ``(num_embeddings, size)`` for an embedding. If the layer allows
    it, no tensor of the size of P parameters is created.

    Attributes:
        mean: the unperturbed parameter.
    """

    def __init__(self, mean: Tensor, sigma: float, members: Members, address: Address) -> None:
        self.mean = mean
        self.sigma: float | Tensor = sigma
        self.members = members
        self.address = address

    def keep_sigma_in_memory(self) -> None:
        """Store sigma in a tensor, so that it can change where Python numbers are fixed (in a CUDA graph)."""
        self.sigma = torch.as_tensor(self.sigma, dtype=torch.float64, device=self.mean.device)

    def buffers(self) -> Mapping[str, Tensor]:
        """Return mean and noise by name: the tensors that :meth:`load_` overwrites and a CUDA graph may capture."""
        return {"mean": self.mean}

    def load_(self, other: Perturbation[RowsT]) -> None:
        """Copy mean, sigma and noise of ``other``, which has the same family and shape, in place."""
        theirs = other.buffers()
        for name, own in self.buffers().items():
            own.copy_(theirs[name])
        if isinstance(self.sigma, Tensor):
            self.sigma.fill_(other.sigma)
        else:
            self.sigma = other.sigma

    @abstractmethod
    def select(self, members: Tensor) -> RowsT:
        """Return what a forward needs to know about the given members, ``(n,)`` int64, with one row per member."""

    @abstractmethod
    def values(self, rows: RowsT) -> Tensor:
        """Return the dense parameters of the rows' members, ``(n, *shape)``."""

    @abstractmethod
    def noise(self, member: int) -> Tensor:
        """Return the dense perturbation of one member in units of sigma, in the shape of the parameter."""

    def weighted_sum(self, u: Tensor) -> Tensor:
        """Sum ``u`` ``(P,)`` times the perturbations, in units of sigma, over the members.

        The sums over :attr:`Members.blocks` are added in order, so a sum of blocks that were summed elsewhere is the same.
        """
        v = self.members.fold(u).to(self.mean.dtype)
        first, *others = self.members.blocks
        total = self._block_sum(v, first)
        for block in others:
            total += self._block_sum(v, block)
        return total

    @abstractmethod
    def _block_sum(self, v: Tensor, block: slice) -> Tensor:
        """Sum the weights ``v`` of all noise sources times their noise, in units of sigma, over a block of them."""

    @abstractmethod
    def linear(self, x: Tensor, rows: RowsT, bias: Tensor | None = None, part: slice | None = None) -> Tensor:
        """Apply the linear layer of each row's member to the rows of ``x``: ``(n, ..., in)`` to ``(n, ..., out)``.

        Args:
            x: ``(n, ..., in)``.
            rows: from :meth:`select`.
            bias: ``(n, out)``.
            part: compute only these outputs (``bias`` only contains these).
        """

    @abstractmethod
    def embedding(self, index: Tensor, rows: RowsT) -> Tensor:
        """Look up rows of the weight by index: ``(n, ...)`` int64 to ``(n, ..., d1)``."""

    @abstractmethod
    def apply(self, operation: Operation, x: Tensor, rows: RowsT) -> Tensor:
        """Apply any other operation to row ``i`` of ``x`` and the weight of the member in row ``i``."""

    def member(self, n: int) -> Tensor:
        """Return the dense parameter of member ``n``."""
        return self.mean + self.sigma * self.noise(n)


class Family(ABC):
    """A perturbation family with its settings: creates the perturbation of each parameter."""

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
        """Create the perturbed copies of a parameter ``(d0, d1, *rest)``.

        Args:
            mean: the unperturbed parameter.
            sigma: standard deviation of the perturbation of every entry.
            members: the members.
            address: address of the random numbers.
            still: an index of the first dimension that is not perturbed (the padding of an embedding).
            kernels: precision of the Triton kernels if they are to be used (and the family has any); None for torch.
        """


def over_rows(row_values: Tensor, like: Tensor) -> Tensor:
    """Reshape ``(n, size)`` to broadcast over the middle dimensions of ``like`` ``(n, ..., any)``."""
    if like.ndim == 2:
        return row_values
    return row_values.view(row_values.shape[0], *(1,) * (like.ndim - 2), row_values.shape[1])


def mean_linear(x: Tensor, weight_t: Tensor, bias_rows: Tensor | None) -> Tensor:
    """Compute ``x @ weight_t`` plus the bias of each row: ``(n, ..., in)`` to ``(n, ..., out)``."""
    if x.ndim == 2:
        return torch.mm(x, weight_t) if bias_rows is None else torch.addmm(bias_rows, x, weight_t)
    if bias_rows is None:
        return x @ weight_t
    return (x @ weight_t).add_(over_rows(bias_rows, x))


def over_index(row_values: Tensor, index: Tensor) -> Tensor:
    """Gather ``row_values[i, index[i]]``: ``(n, size)`` and ``(n, ...)`` int64 to ``(n, ...)``."""
    return row_values.gather(1, index.reshape(len(index), -1)).view(index.shape)
