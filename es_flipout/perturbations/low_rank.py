"""Low-rank perturbations: W_n = W + sigma / sqrt(rank) * A_n C_n^T with standard normal factors.

The family of EGGROLL (Sarkar et al., "Evolution strategies at the hyperscale", arXiv 2511.16652), a neighbour of flipout:
one shared matrix product fewer, factors of (out + in) * rank numbers for each member instead of signs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from es_flipout.errors import UserError
from es_flipout.perturbations.base import Family, LinearPerturbation, Members, Rows, mean_linear, over_rows
from es_flipout.randomness import Address, Stream, normals


@dataclass
class LowRankRows(Rows):
    """Factors and biases of ``n`` members: ``left`` (n, rank, out) with sigma in it, ``right`` (n, rank, in), ``bias``."""

    left: Tensor
    right: Tensor
    bias: Tensor | None


class LowRankLinear(LinearPerturbation[LowRankRows]):
    """Low-rank noise on a linear layer; stores the factors of each noise source."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, sigma: float, members: Members, address: Address, rank: int
    ) -> None:
        super().__init__(weight, bias, sigma, members, address)
        self.rank = rank
        (out_size, in_size), sources = weight.shape, members.sources
        left = normals(address, Stream.LEFT_FACTOR, sources, rank * out_size)
        right = normals(address, Stream.RIGHT_FACTOR, sources, rank * in_size)
        self.left = left.to(weight.dtype).view(len(sources), rank, out_size)
        self.right = right.to(weight.dtype).view(len(sources), rank, in_size)

    @override
    def select(self, members: Tensor) -> LowRankRows:
        source = self.members.source_of(members)
        scale = self.sigma / self.rank**0.5 * self.members.sign_of(members).to(self.weight.dtype)
        return LowRankRows(
            left=self.left[source] * scale[:, None, None],
            right=self.right[source],
            bias=self.bias_rows(members),
        )

    @override
    def linear(self, x: Tensor, rows: LowRankRows) -> Tensor:
        y = mean_linear(x, self.weight_t, rows.bias)
        for left, right in zip(rows.left.unbind(1), rows.right.unbind(1), strict=True):
            along = (x * over_rows(right, x)).sum(-1, keepdim=True)
            y.addcmul_(along, over_rows(left, x))
        return y

    @override
    def weight_noise(self, member: int) -> Tensor:
        index = torch.tensor([member], device=self.weight.device)
        source = self.members.source_of(index)
        product = self.left[source][0].T @ self.right[source][0]
        return product * (self.members.sign_of(index).to(product.dtype) / self.rank**0.5)

    @override
    def weighted_weight_sum(self, v: Tensor) -> Tensor:
        left = (self.left * v[:, None, None]).flatten(0, 1)
        return left.T @ self.right.flatten(0, 1) / self.rank**0.5


@dataclass(frozen=True)
class LowRank(Family):
    """The low-rank family; ``rank`` is the number of outer products in each member's perturbation."""

    rank: int = 1

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"rank must be at least 1, got {self.rank}")

    @override
    def linear(
        self, weight: Tensor, bias: Tensor | None, sigma: float, members: Members, address: Address
    ) -> LowRankLinear:
        return LowRankLinear(weight, bias, sigma, members, address, self.rank)
