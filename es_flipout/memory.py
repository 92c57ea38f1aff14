"""Memory: what tensors really take up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor


def stored_bytes(*roots: object) -> int:
    """Bytes of all tensors that can be reached from ``roots``; memory that several share counts once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors_in(roots)}
    return sum(storages.values())


def tensors_in(roots: Sequence[object]) -> Iterator[Tensor]:
    """All tensors that can be reached from ``roots`` through attributes and containers."""
    seen: set[int] = set()
    waiting = list(roots)
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor):
            yield item
        elif id(item) not in seen and not isinstance(item, type):
            seen.add(id(item))
            if isinstance(item, dict):
                waiting.extend(item.values())
            elif isinstance(item, list | tuple | set):
                waiting.extend(item)
            else:
                waiting.extend(getattr(item, "__dict__", {}).values())
