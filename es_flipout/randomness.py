"""Addressed random numbers: a value is a pure function of (seed, generation, layer, stream, member).

There is no generator state, so a member's perturbation is bitwise identical for any chunking, sharding, number of
threads and device. The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC
2011): the key is the seed and the 128-bit counter is the address, so no two addresses can ever collide. Only integer
operations, table look-ups and single additions and products are used: transcendental functions differ in the last bit
across devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from statistics import NormalDist
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MASK = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)


class Stream(IntEnum):
    """Purpose of a random number; the streams of a layer and member are independent."""

    BASE = 0
    INPUT_SIGNS = 1
    OUTPUT_SIGNS = 2
    WEIGHT = 3
    BIAS = 4
    LEFT_FACTOR = 5
    RIGHT_FACTOR = 6
    START_STATE = 7
    CONTINUATION = 8


@dataclass(frozen=True)
class Address:
    """Address of random numbers: ``seed`` in [0, 2^64), ``generation`` in [0, 2^32), ``layer`` in [0, 2^24)."""

    seed: int
    generation: int = 0
    layer: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be in [0, 2**64), got {self.seed}")
        if not 0 <= self.generation < 2**32 or not 0 <= self.layer < 2**24:
            raise ValueError(f"generation must be in [0, 2**32) and layer in [0, 2**24), got {self}")


Words = TypeVar("Words", Tensor, NDArray[np.int64])


def philox4x32(counter: tuple[Words, Words, Words, Words], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Compute Philox4x32-10 on int64 torch or NumPy arrays of the same shape that hold unsigned 32-bit words.

    Returns:
        Four int64 arrays with values in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The low 64 bits of the product are correct even if int64 wraps; the mask undoes the sign extension of the
        # shift.
        product0 = c0 * _MULTIPLIERS[0]
        product1 = c2 * _MULTIPLIERS[1]
        high0 = product0 >> 32
        high0 &= _MASK
        high0 ^= c3
        high0 ^= k1
        high1 = product1 >> 32
        high1 &= _MASK
        high1 ^= c1
        high1 ^= k0
        product0 &= _MASK
        product1 &= _MASK
        c0, c1, c2, c3 = high1, product1, high0, product0
        k0 = (k0 + _KEY_INCREMENTS[0]) & _MASK
        k1 = (k1 + _KEY_INCREMENTS[1]) & _MASK
    return c0, c1, c2, c3


def words(address: Address, stream: Stream, members: Tensor, count: int) -> Tensor:
    """Draw random 32-bit words.

    Args:
        address: seed, generation and layer.
        stream: purpose of the numbers.
        members: ``(n,)`` int64, the members (or bases, or pairs) to draw for, on the device to compute on.
        count: words per member.

    Returns:
        ``(n, count)`` int64 with values in [0, 2^32).
    """
    blocks = -(-count // 4)
    shape, device = (len(members), blocks), members.device
    key = (address.seed & _MASK, address.seed >> 32)
    place, generation = (address.layer << 8) | stream, address.generation
    if device.type == "cpu":
        # NumPy, because most draws have a few hundred numbers, for which torch operations take several times as long.
        block, member = np.broadcast_arrays(np.arange(blocks, dtype=np.int64), members.numpy()[:, None])
        counter = (block, member, np.full(shape, place, np.int64), np.full(shape, generation, np.int64))
        out = torch.from_numpy(np.stack(philox4x32(counter, key), axis=-1))
    else:
        block, member = torch.broadcast_tensors(torch.arange(blocks, device=device), members[:, None])
        counter = (block, member, torch.full_like(block, place), torch.full_like(block, generation))
        out = torch.stack(philox4x32(counter, key), dim=-1)
    return out.view(len(members), 4 * blocks)[:, :count]


def signs(address: Address, stream: Stream, members: Tensor, count: int) -> Tensor:
    """Draw independent fair signs, ``(n, count)`` int8, exactly -1 or +1 (arguments as for :func:`words`)."""
    return unpacked_signs(packed_signs(address, stream, members, count), count)


def packed_signs(address: Address, stream: Stream, members: Tensor, count: int) -> Tensor:
    """Draw :func:`signs` as one bit each, ``(n, ceil(count / 32))`` int32; 1 stands for +1, lowest bit first."""
    return words(address, stream, members, -(-count // 32)).to(torch.int32)


def unpacked_signs(packed: Tensor, count: int) -> Tensor:
    """Unpack ``(n, ceil(count / 32))`` int32 of :func:`packed_signs` to ``(n, count)`` int8."""
    octets = torch.stack([(packed >> shift) & 0xFF for shift in (0, 8, 16, 24)], dim=-1)
    return _sign_table(packed.device)[octets.view(len(packed), -1)].view(len(packed), -1)[:, :count]


def normals(address: Address, stream: Stream, members: Tensor, count: int) -> Tensor:
    """Draw independent standard normal numbers, ``(n, count)`` float32 (arguments as for :func:`words`).

    A number is the sum of two entries of a table of 2^16 equally likely normal quantiles, scaled to unit variance.
    There are 2^32 equally likely values up to 6 in magnitude; every operation rounds once, so all devices give the same
    bits.
    """
    drawn = words(address, stream, members, count)
    table = _normal_table(members.device)
    return (table[drawn & 0xFFFF] + table[drawn >> 16]) * 0.5**0.5


def integers(address: Address, stream: Stream, members: Tensor, count: int = 1) -> Tensor:
    """Draw integers uniformly from [0, 2^31), ``(n, count)`` int64, for example as seeds of environments."""
    return words(address, stream, members, count) >> 1


@cache
def _sign_table(device: torch.device) -> Tensor:
    """Return a table whose row ``b`` holds the eight bits of the byte ``b`` as signs, ``(256, 8)`` int8."""
    bits = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
    return (2 * bits - 1).to(torch.int8).to(device)


@cache
def _normal_table(device: torch.device) -> Tensor:
    """Return the 2^16 midpoint quantiles of a normal distribution, antisymmetric, variance 1, ``(65536,)`` float32."""
    normal = NormalDist()
    upper = torch.tensor([normal.inv_cdf((i + 0.5) / 65536) for i in range(32768, 65536)], dtype=torch.float64)
    upper /= upper.square().mean().sqrt()
    return torch.cat([-upper.flip(0), upper]).to(torch.float32).to(device)
