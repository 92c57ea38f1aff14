"""The noise of the classic strategy: windows of one long table of normal numbers (Salimans et al. 2017, section 2.1).

A member's perturbation is the window that starts at its offset, so all that travels is the offset. A window costs a copy; as
many numbers drawn anew cost more than an untrained policy's whole episode of CartPole. NumPy only: workers load no torch.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_SMALLEST = 1 << 23
_WINDOWS = 16  # windows side by side in a table, at least


def table_size(numbers: int) -> int:
    """Numbers of the table for windows of ``numbers``: 32 MiB of them, more for large policies."""
    return max(_SMALLEST, 1 << (_WINDOWS * numbers - 1).bit_length())


@lru_cache(maxsize=1)
def noise_table(size: int) -> NDArray[np.float32]:
    """Standard normal numbers, ``(size,)`` float32, the same in every process with the same version of NumPy; read-only."""
    table = np.random.Generator(np.random.Philox(key=123)).standard_normal(size, dtype=np.float32)
    table.flags.writeable = False
    return table
