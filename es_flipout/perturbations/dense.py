"""Dense perturbations: an independent standard normal matrix for every member. The reference ("IdealES" of the Flipout paper).

Memory and time grow with P times the number of weights; the other families exist to avoid that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from es_flipout.perturbations.base import Family, LinearPerturbation, Members, Rows, mean_linear
from es_flipout.randomness import Address, Stream, normals


@dataclass
class DenseRows(Rows):
    """Perturbations of ``n`` members: ``weight`` (n, in, out) with sigma in it, ``bias`` (n, out)."""

    weight: Tensor
    bias: Tensor | None


class DenseLinear(LinearPerturbation[DenseRows]):
    """Dense noise on a linear layer; stores ``(num_sources, out, in)`` numbers."""

    def __init__(self, weight: Tensor, bias: Tensor | None, sigma: float, members: Members, address: Address) -> None:
        super().__init__(weight, bias, sigma, members, address)
        drawn = normals(address, Stream.WEIGHT, members.sources, weight.numel())
        self.noise = drawn.to(weight.dtype).view(-1, *weight.shape)

    @override
    def select(self, members: Tensor) -> DenseRows:
        scale = self.sigma * self.members.sign_of(members).to(self.weight.dtype)
        noise = self.noise[self.members.source_of(members)] * scale[:, None, None]
        return DenseRows(weight=noise.transpose(1, 2).contiguous(), bias=self.bias_rows(members))

    @override
    def linear(self, x: Tensor, rows: DenseRows) -> Tensor:
        own = torch.bmm(x.reshape(x.shape[0], -1, x.shape[-1]), rows.weight)
        return mean_linear(x, self.weight_t, rows.bias).add_(own.view(*x.shape[:-1], -1))

    @override
    def weight_noise(self, member: int) -> Tensor:
        index = torch.tensor([member], device=self.weight.device)
        return self.noise[self.members.source_of(index)][0] * self.members.sign_of(index)

    @override
    def weighted_weight_sum(self, v: Tensor) -> Tensor:
        return (v @ self.noise.flatten(1)).view_as(self.weight)


@dataclass(frozen=True)
class Dense(Family):
    """The dense family; it has no settings."""

    @override
    def linear(
        self, weight: Tensor, bias: Tensor | None, sigma: float, members: Members, address: Address
    ) -> DenseLinear:
        return DenseLinear(weight, bias, sigma, members, address)
