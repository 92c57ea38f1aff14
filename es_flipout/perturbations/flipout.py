"""Flipout perturbations: W_n = W + sigma * B_m * (r_n s_n^T), one base matrix for many members, two sign vectors each.

Wen et al., "Flipout: efficient pseudo-independent weight perturbations on mini-batches", ICLR 2018, equation 4 (with the
signs s on the input and r on the output); here every member of the population is one example. Antithetic partners are
(r, s) and (-r, s).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from es_flipout.errors import UserError
from es_flipout.perturbations.base import Family, LinearPerturbation, Members, Rows, mean_linear, over_rows
from es_flipout.randomness import Address, Stream, normals, signs

_SOURCES_PER_SUM = 4096  # bounds the memory of the weighted sum; the order of the sum does not depend on anything else


@dataclass
class FlipoutRows(Rows):
    """Signs and biases of ``n`` members: ``s`` (n, in), ``sigma_r`` (n, out), ``bias`` (n, out), ``base`` (n,) int64.

    ``base`` is None where there is only one base.
    """

    s: Tensor
    sigma_r: Tensor
    bias: Tensor | None
    base: Tensor | None

    def __post_init__(self) -> None:
        self.bases_used = [0] if self.base is None else self.base.unique().tolist()

    @override
    def put(self, index: Tensor, other: Rows) -> None:
        super().put(index, other)
        self.__post_init__()


class FlipoutLinear(LinearPerturbation[FlipoutRows]):
    """Flipout on a linear layer; stores M base matrices, and one byte for each sign of each noise source."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        sigma: float,
        members: Members,
        address: Address,
        base: Literal["rademacher", "gaussian"],
        base_of_source: Tensor,
        bases: int,
    ) -> None:
        super().__init__(weight, bias, sigma, members, address)
        self.base_of_source = base_of_source
        draw = signs if base == "rademacher" else normals
        drawn = draw(address, Stream.BASE, torch.arange(bases, device=weight.device), weight.numel())
        self.base = drawn.to(weight.dtype).view(bases, *weight.shape)
        self.base_t = [base.T for base in self.base]
        self.r = signs(address, Stream.OUTPUT_SIGNS, members.sources, weight.shape[0])
        self.s = signs(address, Stream.INPUT_SIGNS, members.sources, weight.shape[1])

    @override
    def select(self, members: Tensor) -> FlipoutRows:
        source = self.members.source_of(members)
        scale = self.sigma * self.members.sign_of(members).to(self.weight.dtype)
        return FlipoutRows(
            s=self.s[source].to(self.weight.dtype),
            sigma_r=self.r[source] * scale[:, None],
            bias=self.bias_rows(members),
            base=None if len(self.base) == 1 else self.base_of_source[source],
        )

    @override
    def linear(self, x: Tensor, rows: FlipoutRows) -> Tensor:
        y = mean_linear(x, self.weight_t, rows.bias)
        flipped = x * over_rows(rows.s, x)
        first, *others = rows.bases_used
        product = flipped @ self.base_t[first]
        # Every base multiplies all rows and each row keeps its own: the shape of a product never depends on the members.
        for m in others:
            own = (rows.base == m).view(-1, *(1,) * (x.ndim - 1))
            product = torch.where(own, flipped @ self.base_t[m], product)
        return y.addcmul_(over_rows(rows.sigma_r, x), product)

    @override
    def weight_noise(self, member: int) -> Tensor:
        index = torch.tensor([member], device=self.weight.device)
        source = self.members.source_of(index)
        sign_matrix = (self.r[source].T * self.members.sign_of(index)) * self.s[source]
        return self.base[self.base_of_source[source]][0] * sign_matrix

    @override
    def weighted_weight_sum(self, v: Tensor) -> Tensor:
        total = torch.zeros_like(self.weight)
        for m, base in enumerate(self.base):
            own = slice(None) if len(self.base) == 1 else (self.base_of_source == m).nonzero()[:, 0]
            response = torch.zeros_like(self.weight)
            for r, s, v_part in zip(
                self.r[own].split(_SOURCES_PER_SUM),
                self.s[own].split(_SOURCES_PER_SUM),
                v[own].split(_SOURCES_PER_SUM),
                strict=True,
            ):
                response.addmm_((r * v_part[:, None]).T, s.to(v.dtype))
            total.addcmul_(base, response)
        return total


@dataclass(frozen=True)
class Flipout(Family):
    """The flipout family.

    Attributes:
        base: entries of the base matrices: ``rademacher`` (+-1, no error floor) or ``gaussian`` (the paper's).
        bases: ``M``, base matrices for each layer; consecutive noise sources share one.
    """

    base: Literal["rademacher", "gaussian"] = "rademacher"
    bases: int = 1

    def __post_init__(self) -> None:
        if self.base not in ("rademacher", "gaussian"):
            raise UserError(f"base must be rademacher or gaussian, got {self.base!r}")
        if self.bases < 1:
            raise UserError(f"bases must be at least 1, got {self.bases}")

    @override
    def linear(
        self, weight: Tensor, bias: Tensor | None, sigma: float, members: Members, address: Address
    ) -> FlipoutLinear:
        base_of_source = members.sources * self.bases // (members.population_size // members.share)
        return FlipoutLinear(weight, bias, sigma, members, address, self.base, base_of_source, self.bases)
