"""Low-rank perturbations: W_n = W + sigma / sqrt(rank) * A_n C_n^T with standard normal factors.

This is the family of EGGROLL (Sarkar et al., "Evolution strategies at the hyperscale", arXiv 2511.16652). Compared with
flipout, it needs one shared matrix product less, and stores factors of (out + in) * rank numbers per member instead of
signs. A weight with more than two dimensions is treated as the matrix ``(d0, d1 * rest)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from es_flipout.errors import UserError
from es_flipout.kernels import MemberNoise, Precision
from es_flipout.perturbations.base import (
    Family,
    MemberRows,
    Members,
    Perturbation,
    Rows,
    mean_linear,
    over_index,
    over_rows,
)
from es_flipout.perturbations.operations import Operation
from es_flipout.randomness import Address, Stream, normals


@dataclass
class LowRankRows(Rows):
    """Factors of ``n`` members: ``left`` (n, rank, d0), which includes sigma, and ``right`` (n, rank, d1, *rest)."""

    left: Tensor
    right: Tensor


class LowRankPerturbation(Perturbation[LowRankRows | MemberRows]):
    """Low-rank noise on a weight; stores the factors of each noise source."""

    def __init__(
        self,
        mean: Tensor,
        sigma: float,
        members: Members,
        address: Address,
        rank: int,
        still: int | None,
        kernels: Precision | None = None,
    ) -> None:
        super().__init__(mean, sigma, members, address)
        self.rank = rank
        sources = members.sources
        left = normals(address, Stream.LEFT_FACTOR, sources, rank * mean.shape[0])
        right = normals(address, Stream.RIGHT_FACTOR, sources, rank * mean[0].numel())
        self.left = left.to(mean.dtype).view(len(sources), rank, mean.shape[0])
        self.right = right.to(mean.dtype).view(len(sources), rank, *mean.shape[1:])
        if still is not None:
            self.left[:, :, still] = 0
        self._use_kernel = kernels is not None and mean.ndim == 2

    @override
    def buffers(self) -> Mapping[str, Tensor]:
        return {**super().buffers(), "left": self.left, "right": self.right}

    @override
    def select(self, members: Tensor) -> LowRankRows | MemberRows:
        return MemberRows(members) if self._use_kernel else self._factors(members)

    def _of(self, rows: LowRankRows | MemberRows) -> LowRankRows:
        return self._factors(rows.members) if isinstance(rows, MemberRows) else rows

    def _factors(self, members: Tensor) -> LowRankRows:
        source = self.members.source_of(members)
        scale = self.sigma / self.rank**0.5 * self.members.sign_of(members).to(self.mean.dtype)
        return LowRankRows(left=self.left[source] * scale[:, None, None], right=self.right[source])

    @override
    def values(self, rows: LowRankRows | MemberRows) -> Tensor:
        rows = self._of(rows)
        return self.mean + torch.einsum("nko,nk...->no...", rows.left, rows.right)

    @override
    def noise(self, member: int) -> Tensor:
        index = torch.tensor([member], device=self.mean.device)
        source = self.members.source_of(index)
        product = torch.einsum("ko,k...->o...", self.left[source][0], self.right[source][0])
        return product * (self.members.sign_of(index)[0].to(product.dtype) / self.rank**0.5)

    @override
    def _block_sum(self, v: Tensor, block: slice) -> Tensor:
        left = (self.left[block] * v[block, None, None]).flatten(0, 1)
        return (left.T @ self.right[block].flatten(0, 1).flatten(1)).view_as(self.mean) / self.rank**0.5

    @override
    def linear(
        self, x: Tensor, rows: LowRankRows | MemberRows, bias: Tensor | None = None, part: slice | None = None
    ) -> Tensor:
        if isinstance(rows, MemberRows) and x.ndim == 2 and part is None:
            from es_flipout.kernels.low_rank import low_rank_linear

            scale = self.sigma / self.rank**0.5
            noise = MemberNoise(rows.members, self.members.per_source, scale)
            return low_rank_linear(x, self.mean, self.left, self.right, noise, bias)
        rows = self._of(rows)
        weight, left_rows = self.mean, rows.left
        if part is not None:
            weight, left_rows = weight[part], left_rows[:, :, part]
        y = mean_linear(x, weight.T, bias)
        for left, right in zip(left_rows.unbind(1), rows.right.unbind(1), strict=True):
            along = (x * over_rows(right, x)).sum(-1, keepdim=True)
            y.addcmul_(along, over_rows(left, x))
        return y

    @override
    def embedding(self, index: Tensor, rows: LowRankRows | MemberRows) -> Tensor:
        rows = self._of(rows)
        y = F.embedding(index, self.mean)
        for left, right in zip(rows.left.unbind(1), rows.right.unbind(1), strict=True):
            y = torch.addcmul(y, over_index(left, index)[..., None], over_rows(right, y))
        return y

    @override
    def apply(self, operation: Operation, x: Tensor, rows: LowRankRows | MemberRows) -> Tensor:
        rows = self._of(rows)
        y = operation.shared(x, self.mean)
        for left, right in zip(rows.left.unbind(1), rows.right.unbind(1), strict=True):
            y = y + operation.outer(x, left, right)
        return y


@dataclass(frozen=True)
class LowRank(Family):
    """The low-rank family; ``rank`` is the number of outer products in each member's perturbation."""

    rank: int = 1

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"rank must be at least 1, got {self.rank}")

    @override
    def matrix(
        self,
        mean: Tensor,
        sigma: float,
        members: Members,
        address: Address,
        still: int | None = None,
        kernels: Precision | None = None,
    ) -> LowRankPerturbation:
        return LowRankPerturbation(mean, sigma, members, address, self.rank, still, kernels)
