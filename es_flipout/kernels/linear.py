"""A linear layer of all members, ``y = x W^T + sigma r * ((s * x) B^T) + bias``, and an activation in one kernel."""
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from es_flipout.kernels import Activation, MemberNoise, Precision, interpreted
from es_flipout.kernels.signs import sign_of, signed
from es_flipout.kernels.tiles import (
    Tuned,
    activated,
    activated_torch,
    block,
    bucket,
    ceil_div,
    config,
    flipped,
    in_memory,
    noise_product,
    on_device,
    product,
    product_torch,
    signed_scale,
)
from es_flipout.randomness import unpacked_signs


@dataclass(frozen=True, eq=False)
class FlipoutLayer:
    """A flipout layer with the activation that follows it.

    Attributes:
        weight: ``(out, in)``, the mean, float32 or bfloat16.
        base: ``(M, out, in)``, float32 or bfloat16; if all entries are -1, 0 or 1, also int8 or float8_e4m3fn (exact).
        r, s: ``(num_sources, ceil(out / 32))`` and ``(num_sources, ceil(in / 32))`` int32, packed signs.
        base_of_source: ``(num_sources,)`` int64; None if ``M`` is 1.
        bias: ``(out,)`` float32, the mean; None without a bias.
        bias_noise: ``(num_sources, out)`` float32, in units of sigma; None if all members have the same bias.
        activation: activation of the output.
    """

    weight: Tensor
    base: Tensor
    r: Tensor
    s: Tensor
    base_of_source: Tensor | None = None
    bias: Tensor | None = None
    bias_noise: Tensor | None = None
    activation: Activation = "none"


def linear(
    x: Tensor,
    layer: FlipoutLayer,
    noise: MemberNoise,
    bias_rows: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Apply to each row of ``x`` the layer of the member it belongs to.

    Args:
        x: ``(n B, in)``; rows ``B i`` to ``B i + B - 1`` belong to member ``noise.members[i]``.
        layer: the layer of all members.
        noise: the members, and how their noise is applied.
        bias_rows: ``(n, out)``, biases of ``noise.members`` that replace the bias of the layer.
        out: ``(n B, out)`` float32 or bfloat16, output tensor.

    Returns:
        ``(n B, out)``, of the dtype of ``x``, or ``out``.
    """
    rows, (bases, size_out, size_in) = len(x), layer.base.shape
    y = torch.empty(rows, size_out, dtype=x.dtype, device=x.device) if out is None else out
    if rows == 0:
        return y
    bias, bias_noise = (layer.bias, layer.bias_noise) if bias_rows is None else (None, None)

    def grid(sizes: dict[str, int]) -> tuple[int, int]:
        return ceil_div(rows, sizes["BLOCK_M"]), ceil_div(size_out, sizes["BLOCK_N"])

    with on_device(x):
        _linear.launch(
            grid, _configs(size_out, size_in, noise.precision),
            x.contiguous(), layer.weight, layer.base, layer.r, layer.s, layer.base_of_source, noise.members, bias,
            bias_noise, bias_rows, y, rows, rows // len(noise.members), *in_memory(noise.sigma), bucket(rows),
            SIZE_IN=size_in, SIZE_OUT=size_out, BASES=bases, PER_SOURCE=noise.per_source, ACTIVATION=layer.activation,
            PRECISION=noise.precision,
        )  # fmt: skip
    return y


def linear_torch(
    x: Tensor,
    layer: FlipoutLayer,
    noise: MemberNoise,
    bias_rows: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Torch twin of :func:`linear`."""
    members, per_source, sigma, precision = noise
    _, size_out, size_in = layer.base.shape
    per_member = len(x) // len(members)
    of_row = members.repeat_interleave(per_member)
    source, sign = of_row // per_source, sign_of(of_row, per_source)
    flips = x.float() * unpacked_signs(layer.s[source], size_in)
    base = torch.zeros_like(source) if layer.base_of_source is None else layer.base_of_source[source]
    own = x.new_zeros(len(x), size_out, dtype=torch.float32)
    for m, matrix in enumerate(layer.base):
        own = torch.where((base == m)[:, None], product_torch(flips, matrix.float().T, precision), own)
    scale = (sigma * sign)[:, None]
    y = own * (unpacked_signs(layer.r[source], size_out) * scale)
    if bias_rows is not None:
        y += bias_rows.repeat_interleave(per_member, 0)
    elif layer.bias is not None:
        y += layer.bias if layer.bias_noise is None else layer.bias + scale * layer.bias_noise[source]
    y = activated_torch(y + product_torch(x, layer.weight.T, precision), layer.activation)
    return y.to(x.dtype) if out is None else out.copy_(y)


def linear_by_library(x: Tensor, layer: FlipoutLayer, noise: MemberNoise) -> Tensor:
    """Compute :func:`linear` without activation, for wide layers: torch computes products, kernels only apply signs.

    Args:
        x: ``(n, in)``, of the dtype of the weight.
        layer: a layer with one base. If the base is float8_e4m3fn, the inputs of its product are converted to that type
            too (on CUDA, with sizes that are multiples of 16): the noise then uses 4 significant bits of the inputs,
            the mean all.
        noise: the members and sigma; the precision is that of the dtypes.

    Returns:
        ``(n, out)``, of the dtype of ``x``.
    """
    members, per_source, sigma, _ = noise
    base = layer.base[0]
    if base.dtype == torch.float8_e4m3fn:
        flips = signed(x, layer.s, noise, dtype=base.dtype)
        one = torch.ones((), device=x.device)
        product_of_fp8 = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]
        own = product_of_fp8(flips, base.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    else:
        own = signed(x, layer.s, noise) @ base.T
    plus = layer.bias
    if plus is not None and layer.bias_noise is not None:
        plus = plus + (sigma * sign_of(members, per_source))[:, None] * layer.bias_noise[members // per_source]
    if plus is not None:
        plus = plus.expand(len(x), -1)
    own = signed(own, layer.r, noise, scaled=True, plus=plus, dtype=x.dtype)
    return torch.addmm(own, x, layer.weight.T)


@triton.jit(do_not_specialize=["rows", "rows_key"])
def _linear_kernel(
    x, weight, base, r, s, base_of_source, members, bias, bias_noise, bias_rows, y,
    rows, per_member, sigma, sigma_at, rows_key,
    SIZE_IN: tl.constexpr, SIZE_OUT: tl.constexpr, BASES: tl.constexpr, PER_SOURCE: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Sizes are constants, so that the compiler knows how rows are aligned: those of 348 numbers, to 16 bytes.
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_col = tl.program_id(1) * BLOCK_N
    col = first_col + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    row_in, col_in = (row < rows)[:, None], (col < SIZE_OUT)[None, :]
    place = row // per_member
    member = tl.load(members + place, mask=row < rows, other=0)
    source = (member // PER_SOURCE).to(tl.int64)
    scale = signed_scale(sigma, sigma_at, member, BLOCK_M, PER_SOURCE)

    # The noise of the rows, with every base that one of them uses.
    x_at = x + row.to(tl.int64) * SIZE_IN
    transposed = col[None, :].to(tl.int64) * SIZE_IN
    first, last = 0, 0
    own = tl.zeros((BLOCK_M,), tl.int64)
    if BASES > 1:
        own = tl.load(base_of_source + source)
        first, last = tl.min(own), tl.max(own)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for m in range(first, last + 1):
        noise = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        base_at = base + m * SIZE_OUT * SIZE_IN + transposed
        for start in range(0, SIZE_IN, BLOCK_K):
            inside = start + k < SIZE_IN
            part = tl.load(x_at[:, None] + (start + k)[None, :], mask=row_in & inside[None, :], other=0.0)
            part = flipped(part, s + source * ((SIZE_IN + 31) // 32), (SIZE_IN + 31) // 32, start, BLOCK_K)
            matrix = tl.load(base_at + (start + k)[:, None], mask=inside[:, None] & col_in, other=0.0)
            noise = noise_product(part, matrix, noise, PRECISION)
        total = tl.where((own == m)[:, None], noise, total) if BASES > 1 else noise
    total = flipped(total, r + source * ((SIZE_OUT + 31) // 32), (SIZE_OUT + 31) // 32, first_col, BLOCK_N)
    total *= scale[:, None]

    if bias_rows is not None:
        at = (bias_rows + place.to(tl.int64) * SIZE_OUT)[:, None] + col[None, :]
        total += tl.load(at, mask=row_in & col_in, other=0.0)
    if bias is not None:
        total += tl.load(bias + col, mask=col < SIZE_OUT, other=0.0)[None, :]
    if bias_noise is not None:
        at = (bias_noise + source * SIZE_OUT)[:, None] + col[None, :]
        total += scale[:, None] * tl.load(at, mask=row_in & col_in, other=0.0)

    for start in range(0, SIZE_IN, BLOCK_K):
        inside = start + k < SIZE_IN
        part = tl.load(x_at[:, None] + (start + k)[None, :], mask=row_in & inside[None, :], other=0.0)
        matrix = tl.load(weight + transposed + (start + k)[:, None], mask=inside[:, None] & col_in, other=0.0)
        total = product(part, matrix, total, PRECISION)
    total = activated(total, ACTIVATION)
    y_at = (y + row.to(tl.int64) * SIZE_OUT)[:, None] + col[None, :]
    tl.store(y_at, total.to(y.dtype.element_ty), mask=row_in & col_in)


_linear = Tuned(
    _linear_kernel,
    ("rows_key", "SIZE_OUT", "SIZE_IN", "BASES", "ACTIVATION", "PRECISION"),
)


def _configs(size_out: int, size_in: int, precision: Precision) -> tuple[triton.Config, ...]:
    """Return block sizes to try; on tensor cores, only those with the same instructions and so the same bits."""
    if interpreted():
        return (config(BLOCK_M=32, BLOCK_N=block(size_out, 32), BLOCK_K=block(size_in, 32)),)
    n, wide, k = block(size_out, 64), block(size_out, 128), block(size_in, 32)
    if precision == "ieee":
        return (
            config(4, 3, BLOCK_M=64, BLOCK_N=n, BLOCK_K=16),
            config(8, 3, BLOCK_M=64, BLOCK_N=wide, BLOCK_K=16),
            config(8, 3, BLOCK_M=128, BLOCK_N=n, BLOCK_K=16),
        )
    return (
        config(4, 3, BLOCK_M=64, BLOCK_N=n, BLOCK_K=k),
        config(8, 3, BLOCK_M=128, BLOCK_N=n, BLOCK_K=k),
        *([config(8, 3, BLOCK_M=128, BLOCK_N=wide, BLOCK_K=k)] if wide > n else []),
    )
