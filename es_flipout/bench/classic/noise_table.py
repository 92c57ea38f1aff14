"""The noise of the classic strategy: windows of one long table of normal numbers (Salimans et al. 2017, section 2.1).

A member's perturbation is the window that starts at its offset, so only the offset is sent. Reading a window costs one
copy; drawing as many numbers would cost more than an untrained policy's whole episode of CartPole. NumPy only, because
workers do not import torch.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_SMALLEST = 1 << 23
_WINDOWS = 16  # a table has room for at least this many disjoint windows


def table_size(numbers: int) -> int:
    """Return the length of a table for windows of ``numbers``: 2^23 (32 MiB), longer for large policies."""
    return max(_SMALLEST, 1 << (_WINDOWS * numbers - 1).bit_length())


@lru_cache(maxsize=1)
def noise_table(size: int) -> NDArray[np.float32]:
    """Return standard normal numbers, ``(size,)`` float32, read-only; all processes with one NumPy version agree."""
    table = np.random.Generator(np.random.Philox(key=123)).standard_normal(size, dtype=np.float32)
    table.flags.writeable = False
    return table
