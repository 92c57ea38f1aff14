"""The sum over noise sources ``R^T diag(v) S`` from packed signs, in a fixed order."""
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from es_flipout.kernels import interpreted
from es_flipout.kernels.tiles import Tuned, block, ceil_div, config, flipped, on_device
from es_flipout.randomness import unpacked_signs

_LEAST_SOURCES = 512  # minimum number of sources per partial sum
_MOST_NUMBERS = 1 << 24  # maximum number of elements of all partial sums


def weighted_sum(v: Tensor, r: Tensor, s: Tensor, size_out: int, size_in: int) -> Tensor:
    """Compute the sum of ``v_n r_n s_n^T``.

    Sources are summed in parts whose size depends only on the shapes, and the parts are added in order. There are no
    atomic additions, so the result is deterministic.

    Args:
        v: ``(num_sources,)`` float32.
        r: ``(num_sources, ceil(out / 32))`` int32, packed signs.
        s: ``(num_sources, ceil(in / 32))`` int32.
        size_out: ``out``.
        size_in: ``in``.

    Returns:
        ``(out, in)`` float32.
    """
    n = len(v)
    parts = max(1, min(ceil_div(n, _LEAST_SOURCES), _MOST_NUMBERS // (size_out * size_in)))
    length = ceil_div(ceil_div(n, parts), 32) * 32
    parts = max(1, ceil_div(n, length)) if n else 1
    sums = torch.empty(parts, size_out, size_in, dtype=torch.float32, device=v.device)

    def grid(sizes: dict[str, int]) -> tuple[int, int, int]:
        return ceil_div(size_out, sizes["BLOCK_OUT"]), ceil_div(size_in, sizes["BLOCK_IN"]), parts

    with on_device(v):
        _weighted_sum.launch(
            grid, _configs(size_out, size_in), v.contiguous(), r, s, sums, n, max(length, 32), size_out, size_in,
            r.shape[1], s.shape[1],
        )  # fmt: skip
    return sums.sum(0) if parts > 1 else sums[0]


def weighted_sum_torch(v: Tensor, r: Tensor, s: Tensor, size_out: int, size_in: int) -> Tensor:
    """Torch twin of :func:`weighted_sum`."""
    return (unpacked_signs(r, size_out) * v[:, None]).T @ unpacked_signs(s, size_in).to(v.dtype)


@triton.jit(do_not_specialize=["n"])
def _weighted_sum_kernel(
    v, r, s, sums, n, length, size_out, size_in, r_width, s_width,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    out_start, in_start = tl.program_id(0) * BLOCK_OUT, tl.program_id(1) * BLOCK_IN
    first = tl.program_id(2) * length
    total = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    for start in range(first, min(first + length, n), BLOCK_K):
        source = start + tl.arange(0, BLOCK_K)
        inside = source < n  # a part ends at a multiple of BLOCK_K or at n
        at = tl.where(inside, source, 0).to(tl.int64)
        weights = tl.load(v + source, mask=inside, other=0.0)
        left = tl.zeros((BLOCK_K, BLOCK_OUT), tl.float32) + weights[:, None]
        left = flipped(left, r + at * r_width, r_width, out_start, BLOCK_OUT)
        right = flipped(tl.full((BLOCK_K, BLOCK_IN), 1.0, tl.float32), s + at * s_width, s_width, in_start, BLOCK_IN)
        total = tl.dot(tl.trans(left), right, total, input_precision="ieee")
    row, col = out_start + tl.arange(0, BLOCK_OUT), in_start + tl.arange(0, BLOCK_IN)
    at = (tl.program_id(2).to(tl.int64) * size_out + row)[:, None] * size_in + col[None, :]
    tl.store(sums + at, total, mask=(row < size_out)[:, None] & (col < size_in)[None, :])


_weighted_sum = Tuned(_weighted_sum_kernel, ("size_out", "size_in", "length"))


def _configs(size_out: int, size_in: int) -> tuple[triton.Config, ...]:
    if interpreted():
        return (config(BLOCK_OUT=block(size_out, 64), BLOCK_IN=block(size_in, 64), BLOCK_K=32),)
    return (
        config(4, 2, BLOCK_OUT=block(size_out, 32), BLOCK_IN=block(size_in, 32), BLOCK_K=32),
        config(4, 2, BLOCK_OUT=block(size_out, 64), BLOCK_IN=block(size_in, 64), BLOCK_K=16),
        config(8, 2, BLOCK_OUT=block(size_out, 64), BLOCK_IN=block(size_in, 128), BLOCK_K=16),
    )
