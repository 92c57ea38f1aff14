"""Memory: the bytes that arrays actually occupy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor


def stored_bytes(*roots: object) -> int:
    """Return the bytes of all torch, NumPy and warp arrays reachable from ``roots``; shared memory is counted once."""
    places: dict[int, int] = {}
    for item in reachable(roots):
        place, size = _place(item)
        places[place] = max(size, places.get(place, 0))
    places.pop(0, None)
    return sum(places.values())


def show_bytes(count: int) -> str:
    """Format bytes in decimal MB or GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _place(item: object) -> tuple[int, int]:
    """Return the address and bytes of an array; zeros for anything else."""
    if isinstance(item, Tensor):
        storage = item.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    if isinstance(item, np.ndarray):
        return item.__array_interface__["data"][0], item.nbytes
    if type(item).__module__.partition(".")[0] == "warp":  # warp need not be installed
        return getattr(item, "ptr", None) or 0, getattr(item, "capacity", None) or 0
    return 0, 0


def reachable(roots: Sequence[object]) -> Iterator[object]:
    """Iterate over everything that objects refer to; for objects built alike, in the same order."""
    seen: set[int] = set()
    waiting = list(roots)
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor | np.ndarray):
            yield item
        elif id(item) not in seen and not isinstance(item, type):
            seen.add(id(item))
            yield item
            if isinstance(item, dict):
                waiting.extend(item.values())
            elif isinstance(item, list | tuple | set):
                waiting.extend(item)
            else:
                waiting.extend(getattr(item, "__dict__", {}).values())
