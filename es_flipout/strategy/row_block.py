"""Row blocks: forwards are computed in blocks of a fixed number of rows.

A BLAS may round a row differently in a batch of another shape; in blocks of one fixed shape, the bits of a row depend
only on the row itself.

Letters: ``n`` rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

_MOST_ROWS = 1024
_FEWEST_ROWS = 128
_BLOCK_NUMBERS = 65536  # activations per layer that fit in a core's cache, next to everything else a layer needs


def row_block_for(module: nn.Module, rows: int) -> int:
    """Return the rows per forward: all, rounded up to a power of two, as long as the widest layer fits in the cache."""
    widest = max((max(p.shape) for p in module.parameters() if p.ndim > 1), default=1)
    most = min(max(_BLOCK_NUMBERS // widest, _FEWEST_ROWS), _MOST_ROWS)
    return min(1 << (most.bit_length() - 1), 1 << max(rows - 1, 0).bit_length())


def in_blocks(
    forward: Callable[[int, tuple[Any, ...]], Any], inputs: tuple[Any, ...], rows: int, row_block: int
) -> Any:
    """Apply ``forward(block, inputs)`` to blocks of exactly ``row_block`` rows; the padding of the last is removed."""
    if rows == row_block:
        return forward(0, inputs)
    outputs = []
    for block, start in enumerate(range(0, rows, row_block)):
        part = tree_map_only(Tensor, lambda x, at=start: padded(x[at : at + row_block], row_block), inputs)
        kept = min(row_block, rows - start)
        outputs.append(tree_map_only(Tensor, lambda y, kept=kept: y[:kept], forward(block, part)))
    return outputs[0] if len(outputs) == 1 else tree_map(lambda *parts: torch.cat(parts), *outputs)


def padded(x: Tensor, rows: int) -> Tensor:
    """Pad ``x`` with rows of zeros to ``rows`` rows."""
    missing = rows - len(x)
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x


def tensors_in(inputs: tuple[Any, ...]) -> list[Tensor]:
    """Return all tensors in the inputs."""
    if len(inputs) == 1 and isinstance(inputs[0], Tensor):
        return [inputs[0]]
    return [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
