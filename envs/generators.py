"""Many seeded NumPy generators at once: :class:`Generators`.

Seeding one generator takes about ten times as long as drawing a start state from it. Therefore the seeding
(``numpy.random.SeedSequence``), the generator (PCG64, O'Neill 2014: a 128-bit linear congruential generator, output by
xorshift and rotation) and the two distributions that start states need are computed here on arrays, with NumPy's bits.

Letters: ``n`` generators.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
Wide = tuple[Words, Words]  # 128 bits: high and low words

_MASK = (1 << 64) - 1
_MULTIPLIER = 0x2360ED051FC65DA44385DF649FCCF645
_LAYERS = 256  # of the ziggurat (Marsaglia and Tsang 2000), from which NumPy draws normal numbers
_ABS_BITS = 52  # of a random word that say where in a layer


class Generators:
    """The generators ``gymnasium.utils.seeding.np_random(seed)[0]`` of ``n`` seeds, for methods with NumPy's names.

    Attributes:
        exact: ``(n,)`` bool. A generator that rejects a normal number draws again, so its numbers from then on are not
            those returned here; this happens to fewer than two numbers in a hundred.
    """

    def __init__(self, seeds: NDArray[np.int64]) -> None:
        """Seed the generators with ``(n,)`` integers, 0 or greater."""
        words = _seed_words(seeds.astype(np.uint64))
        start, increment = (words[0], words[1]), (words[2], words[3])
        self._increment = _add(_times(increment, 2), (np.zeros_like(words[0]), np.ones_like(words[0])))
        self._state = _add(_times(_add(self._increment, start), _MULTIPLIER), self._increment)
        self.exact = np.ones(len(seeds), np.bool_)

    def uniform(self, low: object = 0.0, high: object = 1.0, size: int | tuple[int] = 1) -> NDArray[np.float64]:
        """Draw ``Generator.uniform`` from every generator, ``(n, size)``."""
        lows, highs = np.asarray(low, np.float64), np.asarray(high, np.float64)
        count = np.broadcast_shapes(lows.shape, highs.shape, np.empty(size).shape)[-1]
        unit = (self._words(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return lows + (highs - lows) * unit

    def standard_normal(self, size: int) -> NDArray[np.float64]:
        """Draw ``Generator.standard_normal`` from every generator, ``(n, size)``; see :attr:`exact`."""
        widths, bounds = _ziggurat()
        words = self._words(size)
        layer = (words & np.uint64(_LAYERS - 1)).astype(np.intp)
        place = (words >> np.uint64(9)) & np.uint64((1 << _ABS_BITS) - 1)
        self.exact &= (place < bounds[layer]).all(1)
        drawn = place.astype(np.float64) * widths[layer]
        return np.where((words >> np.uint64(8)) & np.uint64(1), -drawn, drawn)

    def _words(self, count: int) -> Words:
        """Draw ``count`` 64-bit words from every generator, ``(n, count)``, at once: the states are linear in the first."""
        factor, offset, factors, offsets = 1, 0, [], []
        for _ in range(count):
            factor, offset = factor * _MULTIPLIER, offset * _MULTIPLIER + 1
            factors.append(factor)
            offsets.append(offset)
        at = [(high[:, None], low[:, None]) for high, low in (self._state, self._increment)]
        high, low = _add(_times(at[0], *factors), _times(at[1], *offsets))
        self._state = high[:, -1], low[:, -1]
        mixed, turn = high ^ low, high >> np.uint64(58)
        return (mixed >> turn) | (mixed << ((np.uint64(64) - turn) & np.uint64(63)))


def _add(a: Wide, b: Wide) -> Wide:
    low = a[1] + b[1]
    return a[0] + b[0] + (low < a[1]), low


def _times(a: Wide, *numbers: int) -> Wide:
    """Multiply by integers modulo 2^128; their dimension is the last one."""
    high = np.array([number >> 64 & _MASK for number in numbers], np.uint64)
    low = np.array([number & _MASK for number in numbers], np.uint64)
    half, lower = np.uint64(32), np.uint64(0xFFFFFFFF)
    a1, a0, b1, b0 = a[1] >> half, a[1] & lower, low >> half, low & lower
    middle = a1 * b0 + (a0 * b0 >> half)
    other = a0 * b1 + (middle & lower)
    carried = a1 * b1 + (middle >> half) + (other >> half)
    return carried + a[0] * low + a[1] * high, a[1] * low


def _seed_words(seeds: Words) -> list[Words]:
    """Compute ``SeedSequence(seed).generate_state(4, np.uint64)`` of all seeds, four times ``(n,)``."""
    constant = 0x43B0D7E5

    def hashed(value: NDArray[np.uint32]) -> NDArray[np.uint32]:
        nonlocal constant
        value = value ^ np.uint32(constant)
        constant = constant * 0x931E8875 & 0xFFFFFFFF
        value = value * np.uint32(constant)
        return value ^ (value >> np.uint32(16))

    low, high = (seeds & np.uint64(0xFFFFFFFF)).astype(np.uint32), (seeds >> np.uint64(32)).astype(np.uint32)
    pool = [hashed(word) for word in (low, high, np.zeros_like(low), np.zeros_like(low))]
    for source in range(4):
        for target in range(4):
            if source != target:
                mixed = np.uint32(0xCA01F9DD) * pool[target] - np.uint32(0x4973F715) * hashed(pool[source])
                pool[target] = mixed ^ (mixed >> np.uint32(16))
    constant, words = 0x8B51F9DD, []
    for number in range(8):
        value = pool[number % 4] ^ np.uint32(constant)
        constant = constant * 0x58F38DED & 0xFFFFFFFF
        value = value * np.uint32(constant)
        words.append((value ^ (value >> np.uint32(16))).astype(np.uint64))
    return [words[i] | words[i + 1] << np.uint64(32) for i in range(0, 8, 2)]


@cache
def _ziggurat() -> tuple[NDArray[np.float64], Words]:
    """Return the width of every layer of NumPy's ziggurat, divided by 2^52, and bounds below which it accepts a place.

    NumPy does not publish its tables, but a generator whose next word is known reveals them. The bounds are at most
    its own, so that rounding cannot accept what NumPy rejects.
    """
    place, widths = 1 << 40, np.empty(_LAYERS)
    bits = np.random.PCG64(0)
    back = pow(_MULTIPLIER, -1, 1 << 128)
    for layer in range(_LAYERS):
        before = ((place << 9 | layer) - 1) * back % (1 << 128)
        bits.state = {**bits.state, "state": {"state": before, "inc": 1}}
        widths[layer] = np.random.Generator(bits).standard_normal() / place
    bounds = np.floor(np.roll(widths, 1) / widths * 2.0**_ABS_BITS) - 2
    bounds[1] = 0  # the innermost layer has no rectangle
    return widths, np.clip(bounds, 0, None).astype(np.uint64)


Rng = np.random.Generator | Generators
