"""What the kernels have in common: packed signs, products, activations, and tuning.

Every row is computed by itself, and in one order of additions whatever the number of rows, so a member's output does not
depend on the rows beside it.
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

# The interpreter computes with the bit patterns of bf16 numbers, so there they are float32 numbers rounded to bf16.
_INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def signed_scale(scale, scale_at, member, ROWS: tl.constexpr, SHARE: tl.constexpr):
    """A number, or what lies in memory, with the sign of each member in its pair: ``(ROWS,)``."""
    if scale_at is not None:
        scale = tl.load(scale_at).to(tl.float32)
    scales = tl.zeros((ROWS,), tl.float32) + scale
    if SHARE == 2:
        scales = tl.where(member % 2 == 0, scales, -scales)
    return scales


@triton.jit
def flipped(values, words_at, width, start, SIZE: tl.constexpr):
    """``values`` ``(rows, SIZE)`` with the sign of every entry turned whose bit is 0.

    ``words_at`` points to each row's words, of which there are ``width``; the bits are those of the columns from ``start``,
    a multiple of ``SIZE``. A row's word is loaded once, not once for each of its bits.
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
    """``values`` as products take them: activations in registers need not be wider."""
    if PRECISION == "bf16":
        values = values.to(tl.bfloat16)
        if _INTERPRETED:
            values = values.to(tl.float32)
    return values


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """``total + a @ b``, summed in float32."""
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
def tanh(x):
    """Hyperbolic tangent, to 2e-7 of its value: near zero a polynomial, fitted on [0, 0.625], elsewhere an exponential."""
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
    """The activation of every entry; NaN stays NaN."""
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
    """Twin of :func:`activated`."""
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
    """Twin of :func:`product` without a total: ``a @ b`` in float32, with inputs rounded to bf16 where that is asked for."""
    if precision == "bf16":
        a, b = a.bfloat16(), b.bfloat16()
    return a.float() @ b.float()


def config(warps: int = 4, stages: int = 2, **sizes: int) -> triton.Config:
    """One way to run a kernel."""
    return triton.Config(sizes, num_warps=warps, num_stages=stages)


class Tuned:
    """A kernel that runs with the fastest of its configurations for every size.

    All configurations add in the same order, so the choice changes no bit. The interpreter takes the first.
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
    """Rounded up."""
    return -(-number // by)


def block(size: int, most: int) -> int:
    """The smallest power of two that holds ``size``, in [16, ``most``]: products need at least 16."""
    return max(16, min(most, bucket(size)))


def bucket(rows: int) -> int:
    """Numbers of rows that are tuned together: up to the next power of two."""
    return 1 << max(rows - 1, 0).bit_length()


def in_memory(number: float | Tensor) -> tuple[float, Tensor | None]:
    """A number as kernels take it: itself, or a tensor of no dimensions that holds it, so that a CUDA graph sees it change."""
    return (0.0, number) if isinstance(number, Tensor) else (number, None)


def on_device(x: Tensor) -> Any:
    """Makes the device of ``x`` the current one: Triton launches there."""
    return torch.cuda.device_of(x)
