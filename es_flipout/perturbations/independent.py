"""Independent noise per member, for biases, scales and other parameters without structure; parameters without noise.

Memory grows with P times the size of the parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from es_flipout.perturbations.base import Members, Perturbation, Rows, over_rows
from es_flipout.perturbations.operations import Operation
from es_flipout.randomness import Address, Stream, normals


@dataclass
class IndependentRows(Rows):
    """The parameters of ``n`` members, ``values`` (n, *shape)."""

    values: Tensor


class Independent(Perturbation[IndependentRows]):
    """Independent standard normal noise for every member; stores ``(num_sources, *shape)`` numbers."""

    def __init__(
        self,
        mean: Tensor,
        sigma: float,
        members: Members,
        address: Address,
        stream: Stream = Stream.BIAS,
        still: int | None = None,
    ) -> None:
        super().__init__(mean, sigma, members, address)
        drawn = normals(address, stream, members.sources, mean.numel())
        self.stored = drawn.to(mean.dtype).view(-1, *mean.shape)
        if still is not None:
            self.stored[:, still] = 0

    @override
    def buffers(self) -> Mapping[str, Tensor]:
        return {**super().buffers(), "stored": self.stored}

    @override
    def select(self, members: Tensor) -> IndependentRows:
        scale = self.sigma * self.members.sign_of(members).to(self.mean.dtype)
        noise = self.stored[self.members.source_of(members)]
        return IndependentRows(torch.addcmul(self.mean, noise, scale.view(-1, *(1,) * self.mean.ndim)))

    @override
    def values(self, rows: IndependentRows) -> Tensor:
        return rows.values

    @override
    def noise(self, member: int) -> Tensor:
        index = torch.tensor([member], device=self.mean.device)
        return self.stored[self.members.source_of(index)][0] * self.members.sign_of(index)[0]

    @override
    def _block_sum(self, v: Tensor, block: slice) -> Tensor:
        v, stored = v[block], self.stored[block]
        return (v @ stored.flatten(1)).view_as(self.mean) if self.mean.ndim else v @ stored

    @override
    def linear(self, x: Tensor, rows: IndependentRows, bias: Tensor | None = None, part: slice | None = None) -> Tensor:
        weights = rows.values if part is None else rows.values[:, part]
        y = torch.bmm(x.reshape(len(x), -1, x.shape[-1]), weights.transpose(1, 2)).view(*x.shape[:-1], -1)
        return y if bias is None else y.add_(over_rows(bias, x))

    @override
    def embedding(self, index: Tensor, rows: IndependentRows) -> Tensor:
        own = torch.arange(len(index), device=index.device).view(-1, *(1,) * (index.ndim - 1))
        return rows.values[own, index]

    @override
    def apply(self, operation: Operation, x: Tensor, rows: IndependentRows) -> Tensor:
        return operation.each(x, rows.values)


@dataclass
class FixedRows(Rows):
    """The number of rows, which are all the same."""

    count: int

    @override
    def put(self, index: Tensor, other: Rows) -> None:
        """Do nothing: all rows are the same."""


class Fixed(Perturbation[FixedRows]):
    """A parameter that is the same for every member, because it does not require a gradient."""

    @override
    def select(self, members: Tensor) -> FixedRows:
        return FixedRows(len(members))

    @override
    def values(self, rows: FixedRows) -> Tensor:
        return self.mean.expand(rows.count, *self.mean.shape)

    @override
    def noise(self, member: int) -> Tensor:
        return torch.zeros_like(self.mean)

    @override
    def _block_sum(self, v: Tensor, block: slice) -> Tensor:
        return torch.zeros_like(self.mean)

    @override
    def linear(self, x: Tensor, rows: FixedRows, bias: Tensor | None = None, part: slice | None = None) -> Tensor:
        y = x @ (self.mean if part is None else self.mean[part]).T
        return y if bias is None else y.add_(over_rows(bias, x))

    @override
    def embedding(self, index: Tensor, rows: FixedRows) -> Tensor:
        return F.embedding(index, self.mean)

    @override
    def apply(self, operation: Operation, x: Tensor, rows: FixedRows) -> Tensor:
        return operation.shared(x, self.mean)
