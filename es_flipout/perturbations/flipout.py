"""Flipout perturbations: W_n = W + sigma * B_m * (r_n s_n^T), with shared bases and two sign vectors per member.

Wen et al., "Flipout: efficient pseudo-independent weight perturbations on mini-batches", ICLR 2018, equation 4 (with
the signs s on the input and r on the output); here every member of the population is one example. Antithetic partners
are (r, s) and (-r, s).

A weight ``(d0, d1, *rest)`` has signs for ``d0`` and ``d1``, for example for the output and input channels of a
convolution; they are constant over its kernel. One base therefore explores one direction of the kernel between two
channels; more bases explore more directions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from es_flipout.errors import UserError
from es_flipout.kernels import MemberNoise, Precision
from es_flipout.perturbations.base import (
    SOURCES_PER_BLOCK,
    Family,
    MemberRows,
    Members,
    Perturbation,
    Rows,
    mean_linear,
    over_index,
    over_rows,
)
from es_flipout.perturbations.independent import Independent
from es_flipout.perturbations.operations import Operation
from es_flipout.randomness import Address, Stream, normals, signs, unpacked_signs

if TYPE_CHECKING:
    from es_flipout.kernels.linear import FlipoutLayer


@dataclass
class FlipoutRows(Rows):
    """Signs of ``n`` members: ``s`` (n, d1), ``sigma_r`` (n, d0), ``base`` (n,) int64 (None if there is only one)."""

    s: Tensor
    sigma_r: Tensor
    base: Tensor | None

    def __post_init__(self) -> None:
        self.bases_used: list[int] | None  # None if unknown
        if self.base is None:
            self.bases_used = [0]
        else:  # looking them up would synchronize with a GPU
            self.bases_used = self.base.unique().tolist() if self.base.device.type == "cpu" else None

    @override
    def put(self, index: Tensor, other: Rows) -> None:
        super().put(index, other)
        self.__post_init__()

    @override
    def put_where(self, mask: Tensor, other: Rows) -> None:
        super().put_where(mask, other)
        self.bases_used = [0] if self.base is None else None


class PackedSigns:
    """Signs stored as one bit each, for the kernels; indexing unpacks them to bytes.

    Attributes:
        words: ``(num_sources, ceil(count / 32))`` int32.
        count: number of signs per source.
    """

    def __init__(self, words: Tensor, count: int) -> None:
        self.words = words
        self.count = count

    def __getitem__(self, source: Tensor) -> Tensor:
        """Return the signs of sources ``(n,)`` int64 as ``(n, count)`` int8."""
        return unpacked_signs(self.words[source], self.count)


class FlipoutPerturbation(Perturbation[FlipoutRows | MemberRows]):
    """Flipout on a weight; stores M base matrices, and one byte per sign of each noise source (one bit for kernels).

    Attributes:
        layer: the layer as used by the kernels; None if they are not used.
    """

    def __init__(
        self,
        mean: Tensor,
        sigma: float,
        members: Members,
        address: Address,
        family: Flipout,
        still: int | None,
        kernels: Precision | None = None,
    ) -> None:
        super().__init__(mean, sigma, members, address)
        bases = family.bases
        self.base_of_source = members.sources * bases // (members.population_size // members.per_source)
        draw = signs if family.base == "rademacher" else normals
        drawn = draw(address, Stream.BASE, torch.arange(bases, device=mean.device), mean.numel())
        self.base = drawn.to(mean.dtype).view(bases, *mean.shape)
        if still is not None:
            self.base[:, still] = 0
        self.precision: Precision = kernels if kernels is not None else "ieee"
        self.layer: FlipoutLayer | None = None
        if kernels is not None and mean.ndim == 2:
            self.layer = self._kernel_layer(family.base == "rademacher")
            self.r, self.s = PackedSigns(self.layer.r, mean.shape[0]), PackedSigns(self.layer.s, mean.shape[1])
        else:
            self.r = signs(address, Stream.OUTPUT_SIGNS, members.sources, mean.shape[0])
            self.s = signs(address, Stream.INPUT_SIGNS, members.sources, mean.shape[1])
        if mean.ndim == 2:
            self.mean_t = mean.T
            self.base_t = [base.T for base in self.base]

    def _kernel_layer(self, signed: bool) -> FlipoutLayer:
        from es_flipout.kernels.linear import FlipoutLayer
        from es_flipout.kernels.signs import sign_words

        sources, narrow = self.members.sources, self.precision == "bf16"
        # Signs are exact in bf16, on whose tensor cores the kernels multiply them; TF32 has tensor cores of its own.
        few_bits = narrow or (signed and self.precision != "tf32")
        return FlipoutLayer(
            weight=self.mean.bfloat16() if narrow else self.mean.contiguous(),
            base=self.base.bfloat16() if few_bits else self.base,
            r=sign_words(self.address, Stream.OUTPUT_SIGNS, sources, self.mean.shape[0]),
            s=sign_words(self.address, Stream.INPUT_SIGNS, sources, self.mean.shape[1]),
            base_of_source=None if len(self.base) == 1 else self.base_of_source,
        )

    @override
    def buffers(self) -> Mapping[str, Tensor]:
        named = {**super().buffers(), "base": self.base, "base_of_source": self.base_of_source}
        if self.layer is None:
            assert isinstance(self.r, Tensor)
            assert isinstance(self.s, Tensor)
            return {**named, "r": self.r, "s": self.s}
        kernel = {"layer.weight": self.layer.weight, "layer.base": self.layer.base}
        return {**named, **kernel, "layer.r": self.layer.r, "layer.s": self.layer.s}

    @override
    def select(self, members: Tensor) -> FlipoutRows | MemberRows:
        return MemberRows(members) if self.layer is not None else self._signs(members)

    def _of(self, rows: FlipoutRows | MemberRows) -> FlipoutRows:
        return self._signs(rows.members) if isinstance(rows, MemberRows) else rows

    def _signs(self, members: Tensor) -> FlipoutRows:
        source = self.members.source_of(members)
        scale = self.sigma * self.members.sign_of(members).to(self.mean.dtype)
        return FlipoutRows(
            s=self.s[source].to(self.mean.dtype),
            sigma_r=self.r[source] * scale[:, None],
            base=None if len(self.base) == 1 else self.base_of_source[source],
        )

    @override
    def linear(
        self, x: Tensor, rows: FlipoutRows | MemberRows, bias: Tensor | None = None, part: slice | None = None
    ) -> Tensor:
        if isinstance(rows, MemberRows) and self.layer is not None and part is None:
            from es_flipout.kernels.linear import linear

            flat = x.reshape(-1, x.shape[-1])
            noise = MemberNoise(rows.members, self.members.per_source, self.sigma, self.precision)
            y = linear(flat, self.layer, noise, bias)
            return y.view(*x.shape[:-1], -1)
        rows = self._of(rows)
        mean_t, base_t, sigma_r = self.mean_t, self.base_t, rows.sigma_r
        if part is None and x.ndim == 2 and len(base_t) == 1:  # the usual case, with as few calls as possible
            y = mean_linear(x, mean_t, bias)
            return y.addcmul_(sigma_r, torch.mm(x * rows.s, base_t[0]))
        if part is not None:
            mean_t, base_t, sigma_r = mean_t[:, part], [base[:, part] for base in base_t], sigma_r[:, part]
        y = mean_linear(x, mean_t, bias)
        flipped = x * over_rows(rows.s, x)
        product = self._each_with_its_base(rows, lambda m: flipped @ base_t[m])
        return y.addcmul_(over_rows(sigma_r, x), product)

    @override
    def embedding(self, index: Tensor, rows: FlipoutRows | MemberRows) -> Tensor:
        rows = self._of(rows)
        product = self._each_with_its_base(rows, lambda m: F.embedding(index, self.base[m]))
        flips = over_index(rows.sigma_r, index)[..., None] * over_rows(rows.s, product)
        return torch.addcmul(F.embedding(index, self.mean), flips, product)

    @override
    def apply(self, operation: Operation, x: Tensor, rows: FlipoutRows | MemberRows) -> Tensor:
        rows = self._of(rows)
        before, after = (rows.s, rows.sigma_r) if operation.input_dim == 1 else (rows.sigma_r, rows.s)
        flipped = operation.scale_input(x, before)
        product = self._each_with_its_base(rows, lambda m: operation.shared(flipped, self.base[m]))
        return operation.shared(x, self.mean).add_(operation.scale_output(product, after))

    def _each_with_its_base(self, rows: FlipoutRows, product_with: Callable[[int], Tensor]) -> Tensor:
        """Multiply all rows by every base and keep each row's own product, so shapes do not depend on members."""
        first, *others = range(len(self.base)) if rows.bases_used is None else rows.bases_used
        product = product_with(first)
        for m in others:
            own = (rows.base == m).view(-1, *(1,) * (product.ndim - 1))
            product = torch.where(own, product_with(m), product)
        return product

    @override
    def values(self, rows: FlipoutRows | MemberRows) -> Tensor:
        rows = self._of(rows)
        base = self.base if rows.base is None else self.base[rows.base]
        return self.mean + base * self._outer(rows.sigma_r, rows.s)

    @override
    def noise(self, member: int) -> Tensor:
        index = torch.tensor([member], device=self.mean.device)
        source = self.members.source_of(index)
        flips = self._outer(self.r[source] * self.members.sign_of(index)[:, None], self.s[source])
        return (self.base[self.base_of_source[source]] * flips)[0]

    def _outer(self, r: Tensor, s: Tensor) -> Tensor:
        """Compute outer products: ``(n, d0)`` and ``(n, d1)`` to ``(n, d0, d1, 1, ...)``."""
        return (r[:, :, None] * s[:, None]).view(*r.shape, s.shape[1], *(1,) * (self.mean.ndim - 2))

    @override
    def _block_sum(self, v: Tensor, block: slice) -> Tensor:
        total = torch.zeros_like(self.mean)
        for m, base in enumerate(self.base):
            own = self._sources_of(m)
            response = self._response(v, slice(max(own.start, block.start), min(own.stop, block.stop)))
            total.addcmul_(base, response.view(*response.shape, *(1,) * (base.ndim - 2)))
        return total

    def _sources_of(self, m: int) -> slice:
        """Return which of these members' noise sources use base ``m``: consecutive ones, known without the device."""
        members, bases = self.members, len(self.base)
        sources = members.population_size // members.per_source
        first = members.first // members.per_source
        start, end = (max(-(-number * sources // bases) - first, 0) for number in (m, m + 1))
        return slice(start, end)

    def _response(self, v: Tensor, own: slice) -> Tensor:
        """Compute R^T diag(v) S over some of the sources, ``(d0, d1)``."""
        if isinstance(self.r, PackedSigns) or isinstance(self.s, PackedSigns):
            from es_flipout.kernels.weighted_sum import weighted_sum

            assert self.layer is not None
            return weighted_sum(v[own], self.layer.r[own], self.layer.s[own], *self.mean.shape)
        response = self.mean.new_zeros(self.mean.shape[:2])
        for r, s, v_part in zip(
            self.r[own].split(SOURCES_PER_BLOCK),
            self.s[own].split(SOURCES_PER_BLOCK),
            v[own].split(SOURCES_PER_BLOCK),
            strict=True,
        ):
            response.addmm_((r * v_part[:, None]).T, s.to(v.dtype))
        return response


@dataclass(frozen=True)
class Flipout(Family):
    """The flipout family.

    Attributes:
        base: entries of the base matrices: ``rademacher`` (+-1, no error floor) or ``gaussian`` (as in the paper).
        bases: ``M``, number of base matrices per layer; consecutive noise sources share one.
    """

    base: Literal["rademacher", "gaussian"] = "rademacher"
    bases: int = 1

    def __post_init__(self) -> None:
        if self.base not in ("rademacher", "gaussian"):
            raise UserError(f"base must be rademacher or gaussian, got {self.base!r}")
        if self.bases < 1:
            raise UserError(f"bases must be at least 1, got {self.bases}")

    @override
    def matrix(
        self,
        mean: Tensor,
        sigma: float,
        members: Members,
        address: Address,
        still: int | None = None,
        kernels: Precision | None = None,
    ) -> Perturbation:
        if mean.ndim > 2 and mean.shape[1] == 1:
            # With one sign per channel, a depthwise kernel would only have M directions.
            return Independent(mean, sigma, members, address, Stream.WEIGHT, still)
        return FlipoutPerturbation(mean, sigma, members, address, self, still, kernels)
