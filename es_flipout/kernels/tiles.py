"""Building blocks of the kernels: packed signs, products, activations, and tuning.

Every row is computed separately, with an order of additions that does not depend on the number of rows, so a member's
output does not depend on the other rows.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from es_flipout.kernels import Activation, Precision, interpreted

# The interpreter computes with the bit patterns of bf16 numbers, so there float32 numbers rounded to bf16 are used.
_INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def signed_scale(scale, scale_at, member, ROWS: tl.constexpr, PER_SOURCE: tl.constexpr):
    """Return a scale, given as a number or in memory, with the sign of each member within its pair, ``(ROWS,)``."""
    if scale_at is not None:
        scale = tl.load(scale_at).to(tl.float32)
    scales = tl.zeros((ROWS,), tl.float32) + scale
    if PER_SOURCE == 2:
        scales = tl.where(member % 2 == 0, scales, -scales)
    return scales


@triton.jit
def flipped(values, words_at, width, start, SIZE: tl.constexpr):
    """Flip the sign of every entry of ``values`` ``(rows, SIZE)`` whose bit is 0.

    ``words_at`` points to the ``width`` words of each row; the bits are those of the columns from ``start`` on, a
    multiple of ``SIZE``. A word is loaded once, not once per bit.
    """
    col = start + tl.arange(0, SIZE)
    first = start // 32
    word = tl.load(words_at + first)[:, None]
    for number in tl.static_range(1, SIZE // 32):
        other = tl.load(words_at + tl.minimum(first + number, width - 1))[:, None]
        word = tl.where((col // 32 >= first + number)[None, :], other, word)
    if _INTERPRETED:
        values = values.to(tl.float32)
    return tl.where(((word >> (col % 32)[None, :]) & 1) != 0, values, -values)


@triton.jit
def narrowed(values, PRECISION: tl.constexpr):
    """Convert ``values`` to the input type of products: activations in registers need not be wider."""
    if PRECISION == "bf16":
        values = values.to(tl.bfloat16)
        if _INTERPRETED:
            values = values.to(tl.float32)
    return values


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """Return ``total + a @ b``, summed in float32."""
    if PRECISION == "bf16":
        if _INTERPRETED:
            a, b = a.to(tl.float32).to(tl.bfloat16), b.to(tl.float32).to(tl.bfloat16)
            total = tl.dot(a.to(tl.float32), b.to(tl.float32), total)
        else:
            total = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), total)
    else:
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision=PRECISION)
    return total


@triton.jit
def noise_product(a, base, total, PRECISION: tl.constexpr):
    """Return ``total + a @ base``; a base of at most 16 bits runs on bf16 tensor cores in every precision but tf32.

    The sum of two bf16 numbers has 16 significant bits of ``a``, that of three has all 24, and products with a base
    that is exact in bf16 are exact in float32.
    """
    if base.dtype == tl.float32 or PRECISION == "tf32" or PRECISION == "bf16":
        total = product(a, base, total, PRECISION)
    else:
        rest = a.to(tl.float32)
        for _ in tl.static_range(3 if PRECISION == "ieee" else 2):
            part = rest.to(tl.bfloat16)
            total = product(part, base, total, "bf16")
            rest -= part.to(tl.float32)
            rest = tl.where(rest == rest, rest, 0.0)  # infinity minus infinity
    return total


@triton.jit
def tanh(x):
    """Compute tanh with relative error 2e-7: by a polynomial fitted on [0, 0.625], elsewhere by an exponential."""
    size = tl.abs(x)
    z = size * size
    near = size + size * z * (
        -0.33333329 + z * (0.13332782 + z * (-0.05385249 + z * (0.02100362 + z * -0.00610492)))
    )  # fmt: skip
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.where(size > 20.0, 20.0, size)) + 1.0)
    value = tl.where(size < 0.625, near, far)
    return tl.where(x < 0.0, -value, value)


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """Apply an activation elementwise; NaN stays NaN."""
    if ACTIVATION == "tanh":
        x = tanh(x)
    elif ACTIVATION == "relu":
        x = tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "elu":
        half = tanh(0.5 * tl.where(x < 0.0, x, 0.0))
        x = tl.where(x < 0.0, 2.0 * half / (1.0 - half), x)
    elif ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-tl.where(x < -80.0, -80.0, x)))
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return x


def activated_torch(x: Tensor, activation: Activation) -> Tensor:
    """Torch twin of :func:`activated`."""
    functions = torch.nn.functional
    match activation:
        case "tanh":
            return torch.tanh(x)
        case "relu":
            return torch.relu(x)
        case "elu":
            return functions.elu(x)
        case "silu":
            return functions.silu(x)
        case "gelu":
            return functions.gelu(x)
    return x


def product_torch(a: Tensor, b: Tensor, precision: Precision) -> Tensor:
    """Torch twin of :func:`product`, without a total: ``a @ b`` in float32, with inputs rounded to bf16 for bf16."""
    if precision == "bf16":
        a, b = a.bfloat16(), b.bfloat16()
    return a.float() @ b.float()


def config(warps: int = 4, stages: int = 2, **sizes: int) -> triton.Config:
    """Create a launch configuration of a kernel."""
    return triton.Config(sizes, num_warps=warps, num_stages=stages)


class Tuned:
    """A kernel that runs with the fastest of its configurations for every size.

    All configurations add in the same order, so the choice does not change the result. The interpreter uses the first
    one.
    """

    def __init__(self, kernel: Any, key: Sequence[str]) -> None:
        self._kernel = kernel
        self._key = list(key)
        self._tuners: dict[tuple[Any, ...], Any] = {}

    def launch(self, grid: Any, configs: tuple[triton.Config, ...], *args: Any, **constants: Any) -> None:
        """Run over ``grid``, a function of the block sizes, with one of ``configs``."""
        if interpreted():
            self._kernel[grid](*args, **constants, **configs[0].kwargs)
            return
        names = tuple(str(c) for c in configs)
        if names not in self._tuners:
            self._tuners[names] = triton.autotune(list(configs), key=self._key, cache_results=True)(self._kernel)
        self._tuners[names][grid](*args, **constants)


def ceil_div(number: int, by: int) -> int:
    """Divide and round up."""
    return -(-number // by)


def block(size: int, most: int) -> int:
    """Return the smallest power of two >= ``size``, clamped to [16, ``most``]: products need at least 16."""
    return max(16, min(most, bucket(size)))


def bucket(rows: int) -> int:
    """Round up to a power of two: numbers of rows in the same bucket share a configuration."""
    return 1 << max(rows - 1, 0).bit_length()


def in_memory(number: float | Tensor) -> tuple[float, Tensor | None]:
    """Return a number as kernel arguments: by value, or as a 0-dimensional tensor, whose changes a CUDA graph sees."""
    return (0.0, number) if isinstance(number, Tensor) else (number, None)


def on_device(x: Tensor) -> Any:
    """Return a context in which the device of ``x`` is the current one, on which Triton launches kernels."""
    return torch.cuda.device_of(x)
