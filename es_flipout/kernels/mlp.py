"""A whole small network of all members in one kernel; activations stay on the chip."""
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from es_flipout.kernels import MemberNoise, Precision, interpreted
from es_flipout.kernels.linear import FlipoutLayer, linear_torch
from es_flipout.kernels.tiles import (
    Tuned,
    activated,
    block,
    bucket,
    ceil_div,
    config,
    flipped,
    in_memory,
    narrowed,
    noise_product,
    on_device,
    product,
    signed_scale,
)

WIDEST = 256  # maximum number of outputs of a layer
MOST_LAYERS = 4
_WIDEST_IN_REGISTERS = 64
_ROWS_AT_ONCE = 128  # rows per multiprocessor that are computed at the same time


def fits(layers: Sequence[FlipoutLayer]) -> bool:
    """Return whether :func:`mlp` supports the layers: at most ``MOST_LAYERS``, of ``WIDEST`` outputs, one base each."""
    return 1 <= len(layers) <= MOST_LAYERS and all(
        layer.weight.shape[0] <= WIDEST and len(layer.base) == 1 for layer in layers
    )


def mlp(x: Tensor, layers: Sequence[FlipoutLayer], noise: MemberNoise) -> Tensor:
    """Apply to each row of ``x`` all layers of the member it belongs to.

    Args:
        x: ``(n B, in)``; rows ``B i`` to ``B i + B - 1`` belong to member ``noise.members[i]``.
        layers: layers for which :func:`fits` is true.
        noise: the members, and how their noise is applied; activations are float32, too.

    Returns:
        ``(n B, out)``, of the dtype of ``x``.
    """
    members, per_source, sigma, precision = noise
    sizes = (layers[0].weight.shape[1], *(layer.weight.shape[0] for layer in layers))
    y = torch.empty(len(x), sizes[-1], dtype=x.dtype, device=x.device)
    if len(x) == 0:
        return y
    widest = max((16, *sizes[1:-1]))
    in_registers = precision != "ieee" and widest <= _WIDEST_IN_REGISTERS
    at_once = _ROWS_AT_ONCE * _multiprocessors(x.device)
    kept = None
    if not in_registers:
        kept_dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        kept = torch.empty(2 * at_once * widest, dtype=kept_dtype, device=x.device)

    def grid(blocks: dict[str, int]) -> tuple[int]:
        tiles = ceil_div(len(x), blocks["BLOCK_M"])
        return (tiles if in_registers else min(tiles, at_once // blocks["BLOCK_M"]),)

    with on_device(x):
        _mlp.launch(
            grid, _configs(max(sizes[1:]), precision, in_registers),
            x.contiguous(), tuple(layer.weight for layer in layers), tuple(layer.base for layer in layers),
            tuple(layer.r for layer in layers), tuple(layer.s for layer in layers),
            tuple(layer.bias for layer in layers), tuple(layer.bias_noise for layer in layers), members, kept, y,
            len(x), len(x) // len(members), *in_memory(sigma), bucket(len(x)),
            SIZES=sizes, WIDEST=widest, ACTIVATIONS=" ".join(layer.activation for layer in layers), LAYERS=len(layers),
            PER_SOURCE=per_source, PRECISION=precision,
        )  # fmt: skip
    return y


def mlp_torch(x: Tensor, layers: Sequence[FlipoutLayer], noise: MemberNoise) -> Tensor:
    """Torch twin of :func:`mlp`."""
    y = x.float()
    for layer in layers:
        y = linear_torch(y, layer, noise)
    return y.to(x.dtype)


# There are two ways to keep activations on the chip. In narrow networks they are a tuple of tiles of BLOCK_N columns in
# registers, with unrolled loops over the tiles, because Triton cannot slice a tile. In wider networks they go through a
# buffer that stays in the caches: every program reuses its own small part of it. At most _ROWS_AT_ONCE rows per
# multiprocessor are computed at once, so that an H100 needs 35 MB at width 256, and has 50 MB of cache.
@triton.jit(do_not_specialize=["rows", "rows_key"])
def _mlp_kernel(
    x, weights, bases, rs, ss, biases, bias_noises, members, kept, y, rows, per_member, sigma, sigma_at, rows_key,
    SIZES: tl.constexpr, WIDEST: tl.constexpr, ACTIVATIONS: tl.constexpr, LAYERS: tl.constexpr, PER_SOURCE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    for tile in tl.range(tl.program_id(0), (rows + BLOCK_M - 1) // BLOCK_M, tl.num_programs(0), num_stages=1):
        place = tl.arange(0, BLOCK_M)
        row = tile * BLOCK_M + place
        member = tl.load(members + row // per_member, mask=row < rows, other=0)
        source = (member // PER_SOURCE).to(tl.int64)
        scale = signed_scale(sigma, sigma_at, member, BLOCK_M, PER_SOURCE)
        x_at = (x + row.to(tl.int64) * SIZES[0])[:, None]
        y_at = (y + row.to(tl.int64) * SIZES[LAYERS])[:, None]
        row_in = (row < rows)[:, None]
        if kept is None:
            hidden = ()
            for layer in tl.static_range(LAYERS):
                hidden = _layer_in_registers(
                    hidden, x_at, y_at, row_in, source, scale, weights[layer], bases[layer], rs[layer], ss[layer],
                    biases[layer], bias_noises[layer], SIZES[layer], SIZES[layer + 1],
                    _tile(SIZES[layer], BLOCK_K if layer == 0 else BLOCK_N), _tile(SIZES[layer + 1], BLOCK_N),
                    _nth(ACTIVATIONS, layer), layer == 0, layer == LAYERS - 1, PRECISION, BLOCK_M,
                )  # fmt: skip
        else:
            own = kept + tl.program_id(0).to(tl.int64) * (2 * BLOCK_M * WIDEST)
            for layer in tl.static_range(LAYERS):
                before = (own + (layer % 2) * (BLOCK_M * WIDEST) + place * SIZES[layer])[:, None]
                after = (own + ((layer + 1) % 2) * (BLOCK_M * WIDEST) + place * SIZES[layer + 1])[:, None]
                _layer_in_memory(
                    x_at if layer == 0 else before, y_at if layer == LAYERS - 1 else after, row_in, source, scale,
                    weights[layer], bases[layer], rs[layer], ss[layer], biases[layer], bias_noises[layer],
                    SIZES[layer], SIZES[layer + 1], _tile(SIZES[layer], BLOCK_K), _tile(SIZES[layer + 1], BLOCK_N),
                    _nth(ACTIVATIONS, layer), PRECISION, BLOCK_M,
                )  # fmt: skip
                tl.debug_barrier()  # other threads read what this thread has written


@triton.jit
def _layer_in_registers(
    hidden, x_at, y_at, row_in, source, scale, weight, base, r, s, bias, bias_noise,
    SIZE_IN: tl.constexpr, SIZE_OUT: tl.constexpr, TILE_IN: tl.constexpr, TILE_OUT: tl.constexpr,
    ACTIVATION: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Return the tiles of one layer's output; the first layer reads from memory, the last one writes to memory."""
    after = ()
    s_at = s + source * ((SIZE_IN + 31) // 32)
    for number in tl.static_range((SIZE_OUT + TILE_OUT - 1) // TILE_OUT):
        col = number * TILE_OUT + tl.arange(0, TILE_OUT)
        total = tl.zeros((BLOCK_M, TILE_OUT), tl.float32)
        if FIRST:
            total = _times(x_at, base, s_at, col, row_in, total, True, SIZE_IN, SIZE_OUT, TILE_IN, PRECISION)
        else:
            total = _hidden_times(hidden, base, s_at, col, total, True, SIZE_IN, SIZE_OUT, TILE_IN, PRECISION)
        total = _noise(total, r, bias, bias_noise, source, scale, row_in, number * TILE_OUT, SIZE_OUT, TILE_OUT)
        if FIRST:
            total = _times(x_at, weight, s_at, col, row_in, total, False, SIZE_IN, SIZE_OUT, TILE_IN, PRECISION)
        else:
            total = _hidden_times(hidden, weight, s_at, col, total, False, SIZE_IN, SIZE_OUT, TILE_IN, PRECISION)
        total = activated(total, ACTIVATION)
        if LAST:
            tl.store(y_at + col[None, :], total.to(y_at.dtype.element_ty), mask=row_in & (col < SIZE_OUT)[None, :])
        else:
            after = after + (narrowed(total, PRECISION),)
    return after


@triton.jit
def _layer_in_memory(
    x_at, y_at, row_in, source, scale, weight, base, r, s, bias, bias_noise,
    SIZE_IN: tl.constexpr, SIZE_OUT: tl.constexpr, TILE_IN: tl.constexpr, TILE_OUT: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    s_at = s + source * ((SIZE_IN + 31) // 32)
    for start in range(0, SIZE_OUT, TILE_OUT):
        col = start + tl.arange(0, TILE_OUT)
        total = tl.zeros((BLOCK_M, TILE_OUT), tl.float32)
        total = _times(x_at, base, s_at, col, row_in, total, True, SIZE_IN, SIZE_OUT, TILE_IN, PRECISION)
        total = _noise(total, r, bias, bias_noise, source, scale, row_in, start, SIZE_OUT, TILE_OUT)
        total = _times(x_at, weight, s_at, col, row_in, total, False, SIZE_IN, SIZE_OUT, TILE_IN, PRECISION)
        total = activated(total, ACTIVATION)
        tl.store(y_at + col[None, :], total.to(y_at.dtype.element_ty), mask=row_in & (col < SIZE_OUT)[None, :])


@triton.jit
def _times(
    x_at, matrix, s_at, col, row_in, total, FLIP: tl.constexpr, SIZE_IN: tl.constexpr, SIZE_OUT: tl.constexpr,
    TILE_IN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to ``total`` the product of rows in memory, flipped if ``FLIP``, with some columns of a transposed matrix."""
    for start in range(0, SIZE_IN, TILE_IN):
        k = start + tl.arange(0, TILE_IN)
        part = tl.load(x_at + k[None, :], mask=row_in & (k < SIZE_IN)[None, :], other=0.0)
        if FLIP:
            part = flipped(part, s_at, (SIZE_IN + 31) // 32, start, TILE_IN)
        inside = (k < SIZE_IN)[:, None] & (col < SIZE_OUT)[None, :]
        columns = tl.load(matrix + col[None, :] * SIZE_IN + k[:, None], mask=inside, other=0.0)
        total = noise_product(part, columns, total, PRECISION) if FLIP else product(part, columns, total, PRECISION)
    return total


@triton.jit
def _hidden_times(
    hidden, matrix, s_at, col, total, FLIP: tl.constexpr, SIZE_IN: tl.constexpr, SIZE_OUT: tl.constexpr,
    TILE_IN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Like :func:`_times`, with the rows in registers."""
    for number in tl.static_range(len(hidden)):
        k = number * TILE_IN + tl.arange(0, TILE_IN)
        part = hidden[number]
        if FLIP:
            part = flipped(part, s_at, (SIZE_IN + 31) // 32, number * TILE_IN, TILE_IN)
        inside = (k < SIZE_IN)[:, None] & (col < SIZE_OUT)[None, :]
        columns = tl.load(matrix + col[None, :] * SIZE_IN + k[:, None], mask=inside, other=0.0)
        total = noise_product(part, columns, total, PRECISION) if FLIP else product(part, columns, total, PRECISION)
    return total


@triton.jit
def _noise(total, r, bias, bias_noise, source, scale, row_in, start, SIZE_OUT: tl.constexpr, TILE_OUT: tl.constexpr):
    """Apply output signs and sigma to the noise of the outputs from ``start`` on, and add the biases."""
    col = start + tl.arange(0, TILE_OUT)
    total = (
        flipped(total, r + source * ((SIZE_OUT + 31) // 32), (SIZE_OUT + 31) // 32, start, TILE_OUT) * scale[:, None]
    )
    if bias is not None:
        total += tl.load(bias + col, mask=col < SIZE_OUT, other=0.0)[None, :]
    if bias_noise is not None:
        at = (bias_noise + source * SIZE_OUT)[:, None] + col[None, :]
        total += scale[:, None] * tl.load(at, mask=row_in & (col < SIZE_OUT)[None, :], other=0.0)
    return total


@triton.constexpr_function
def _tile(size, chunk):
    """Return the number of columns per tile of a layer of ``size``: a power of two, as matrix products require."""
    return max(16, min(chunk, triton.next_power_of_2(size)))


@triton.constexpr_function
def _nth(words, number):
    """Return one of several words; before version 3.7, Triton cannot index a tuple of strings."""
    return words.split()[number]


_mlp = Tuned(_mlp_kernel, ("rows_key", "SIZES", "ACTIVATIONS", "PRECISION"))


def _multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU; one for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _configs(widest: int, precision: Precision, in_registers: bool) -> tuple[triton.Config, ...]:
    """Return block sizes to try; on tensor cores, only those with the same instructions and so the same bits."""
    if interpreted():
        return (config(BLOCK_M=32, BLOCK_N=32, BLOCK_K=32),)
    if in_registers:
        return (
            config(4, BLOCK_M=64, BLOCK_N=block(widest, 32), BLOCK_K=32),
            config(8, BLOCK_M=128, BLOCK_N=block(widest, 32), BLOCK_K=32),
        )
    n, wide = block(widest, 64), block(widest, 128)
    if precision == "ieee":
        return (
            config(4, 3, BLOCK_M=16, BLOCK_N=n, BLOCK_K=16),
            config(4, 3, BLOCK_M=32, BLOCK_N=n, BLOCK_K=16),
            config(8, 3, BLOCK_M=32, BLOCK_N=wide, BLOCK_K=16),
        )
    k = 16 if precision == "tf32x3" else 32
    return (
        config(4, 3, BLOCK_M=64, BLOCK_N=n, BLOCK_K=k),
        config(8, 2, BLOCK_M=64, BLOCK_N=wide, BLOCK_K=k),
        config(8, 3, BLOCK_M=128, BLOCK_N=n, BLOCK_K=k),
    )
