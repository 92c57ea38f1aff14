"""Signs packed into one bit each: drawing them, and multiplying rows by them.

Bit ``i`` of word ``j`` is the sign of entry ``32 j + i``, 1 for +1: the words are those that
:func:`es_flipout.randomness.signs` reads, kept as int32.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from es_flipout.kernels import MemberNoise
from es_flipout.kernels.tiles import block, ceil_div, flipped, on_device
from es_flipout.randomness import Address, Stream, packed_signs, unpacked_signs

_ROUNDS = tl.constexpr(10)
_BLOCKS = 256  # Philox blocks of one program


def sign_words(address: Address, stream: Stream, members: Tensor, count: int) -> Tensor:
    """Draw packed signs on the device, ``(n, ceil(count / 32))`` int32 (arguments as for :func:`randomness.signs`)."""
    width = -(-count // 32)
    out = torch.empty(len(members), width, dtype=torch.int32, device=members.device)
    if len(out):
        blocks = len(members) * -(-width // 4)
        with on_device(out):
            _words_kernel[(ceil_div(blocks, _BLOCKS),)](
                members.contiguous(), out, len(members), width, (address.layer << 8) | stream,
                address.generation, address.seed & 0xFFFFFFFF, address.seed >> 32, BLOCK=_BLOCKS,
            )  # fmt: skip
    return out


def sign_words_torch(address: Address, stream: Stream, members: Tensor, count: int) -> Tensor:
    """Torch twin of :func:`sign_words`."""
    return packed_signs(address, stream, members, count)


@triton.jit(do_not_specialize=["n", "place", "generation", "key0", "key1"])
def _words_kernel(members, out, n, width, place, generation, key0, key1, BLOCK: tl.constexpr):
    blocks = (width + 3) // 4
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, number = index // blocks, index % blocks
    inside = row < n
    member = tl.load(members + row, mask=inside, other=0)
    zero = tl.zeros((BLOCK,), tl.uint32)
    c0, c1 = number.to(tl.uint32), member.to(tl.uint32)
    c2, c3 = zero + place.to(tl.uint32), zero + generation.to(tl.uint32)
    k0, k1 = zero + key0.to(tl.uint32), zero + key1.to(tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        high0, low0 = tl.umulhi(c0, zero + 0xD2511F53), c0 * (zero + 0xD2511F53)
        high1, low1 = tl.umulhi(c2, zero + 0xCD9E8D57), c2 * (zero + 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += zero + 0x9E3779B9
        k1 += zero + 0xBB67AE85
    at = out + row * width + 4 * number
    tl.store(at, c0.to(tl.int32, bitcast=True), mask=inside)
    tl.store(at + 1, c1.to(tl.int32, bitcast=True), mask=inside & (4 * number + 1 < width))
    tl.store(at + 2, c2.to(tl.int32, bitcast=True), mask=inside & (4 * number + 2 < width))
    tl.store(at + 3, c3.to(tl.int32, bitcast=True), mask=inside & (4 * number + 3 < width))


def signed(
    x: Tensor,
    words: Tensor,
    noise: MemberNoise,
    scaled: bool = False,
    plus: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiply rows by the signs of their members.

    Args:
        x: ``(n, size)``.
        words: ``(num_sources, ceil(size / 32))`` int32.
        noise: the members.
        scaled: also multiply by sigma, with opposite signs for antithetic partners; otherwise signs are those of the
            source.
        plus: ``(n, size)``, addend.
        dtype: data type of the result; by default that of ``x``.

    Returns:
        ``(n, size)``.
    """
    out = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    n, size = x.shape
    if n and size:
        cols = block(size, 1024)
        with on_device(out):
            _signed_kernel[(n, ceil_div(size, cols))](
                x.contiguous(), words, noise.members, plus if plus is None else plus.contiguous(), out, size, words.shape[1],
                noise.sigma if scaled else 1.0, ANTITHETIC=noise.per_source == 2 and scaled, PER_SOURCE=noise.per_source,
                BLOCK=cols,
            )  # fmt: skip
    return out


def signed_torch(
    x: Tensor,
    words: Tensor,
    noise: MemberNoise,
    scaled: bool = False,
    plus: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Torch twin of :func:`signed`."""
    members, per_source, sigma, _ = noise
    y = x.float() * unpacked_signs(words[members // per_source], x.shape[1])
    if scaled:
        y = y * (sigma * sign_of(members, per_source))[:, None]
    return (y if plus is None else y + plus).to(dtype or x.dtype)


@triton.jit
def _signed_kernel(
    x,
    words,
    members,
    plus,
    out,
    size,
    width,
    scale,
    ANTITHETIC: tl.constexpr,
    PER_SOURCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    start = tl.program_id(1) * BLOCK
    cols = start + tl.arange(0, BLOCK)
    inside = (cols < size)[None, :]
    member = tl.load(members + row).to(tl.int64)
    at = (row * size)[:, None] + cols[None, :]
    y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    y = flipped(y, words + member // PER_SOURCE * width, width, start, BLOCK)
    if ANTITHETIC:
        y = tl.where((member % 2 == 0)[:, None], y, -y)
    y = y * scale
    if plus is not None:
        y += tl.load(plus + at, mask=inside, other=0.0)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


def sign_of(members: Tensor, per_source: int) -> Tensor:
    """Return the sign, +1 or -1, of each member within its antithetic pair, ``(n,)`` float32."""
    return (1 - 2 * (members % 2)).float() if per_source == 2 else torch.ones_like(members, dtype=torch.float32)
