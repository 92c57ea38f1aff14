"""The forward of selected members: :class:`Selection`.

Letters: ``n`` rows (selected members).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_map

from es_flipout.errors import UserError
from es_flipout.layers import BatchedAttention, Conversion, Weight
from es_flipout.perturbations import Perturbation
from es_flipout.strategy.row_block import in_blocks, padded, tensors_in


class Perturbed(NamedTuple):
    """A module's population-aware twin, and the perturbation of every parameter by its name in the module."""

    conversion: Conversion
    perturbations: Mapping[str, Perturbation[Any]]


class Selection:
    """The forward of ``n`` selected members, whose signs and biases are stored row by row; rows can be reassigned."""

    def __init__(self, perturbed: Perturbed, members: Tensor, row_block: int) -> None:
        self._size = len(members)
        self._row_block = row_block
        self._conversion = perturbed.conversion
        self._blocks = []
        for part in members.split(row_block):
            # Padding repeats the last member; the padded rows are computed and discarded.
            padded_members = torch.cat([part, part[-1:].expand(row_block - len(part))])
            self._blocks.append(_Block(perturbed, padded_members))

    def replace(self, rows: Tensor, members: Tensor) -> None:
        """Assign member ``members[i]`` to row ``rows[i]``; both ``(k,)`` int64."""
        block_of, place = rows // self._row_block, rows % self._row_block
        for block in block_of.unique().tolist():
            chosen = block_of == block
            self._blocks[block].put(place[chosen], members[chosen])

    def replace_where(self, mask: Tensor, members: Tensor) -> None:
        """Assign ``members[i]`` to row ``i`` where ``mask`` is true, both ``(n,)``; shapes are independent of it."""
        block = self._row_block
        for number, rows in enumerate(self._blocks):
            here = slice(number * block, (number + 1) * block)
            rows.put_where(padded(mask[here], block), padded(members[here], block))

    def read(self) -> tuple[object, ...]:
        """Return the objects whose tensors a forward reads, in an order that is the same for all selections."""
        return tuple(block.weights for block in self._blocks)

    def __call__(self, *inputs: Any) -> Any:
        """Compute :meth:`Population.__call__` for the selected members: ``(n, ..., in)`` to ``(n, ..., out)``.

        Raises:
            ValueError: an input has the wrong number of rows.
        """
        for x in tensors_in(inputs):
            if len(x) != self._size:
                raise ValueError(f"input must have {self._size} rows, got {len(x)}")
        if not torch.is_grad_enabled():  # a rollout turns gradients off once, not in every step
            return in_blocks(self._forward_block, inputs, self._size, self._row_block)
        with torch.no_grad():
            return in_blocks(self._forward_block, inputs, self._size, self._row_block)

    def _forward_block(self, block: int, inputs: tuple[Any, ...]) -> Any:
        here, conversion = self._blocks[block], self._conversion
        if conversion.row_wise:
            for leaf, weights in here.leaves:
                leaf.place.weights = weights
            return conversion.twin(*inputs)
        return _member_by_member(conversion, here, inputs)


class _Block:
    """What the layers need to know about the members in the rows of one block.

    Attributes:
        leaves: every layer of the twin, with its weights.
        weights: the weights by the names of the parameters.
        size: number of rows.
    """

    def __init__(self, perturbed: Perturbed, members: Tensor) -> None:
        self.size = len(members)
        self.weights = {name: Weight(p, p.select(members)) for name, p in perturbed.perturbations.items()}
        self.leaves = [
            (leaf, {own: self.weights[name] for own, name in names.items()})
            for leaf, names in perturbed.conversion.leaves.items()
        ]

    def put(self, rows: Tensor, members: Tensor) -> None:
        """Assign ``members`` ``(k,)`` to ``rows`` ``(k,)``."""
        for perturbation, own in self.weights.values():
            own.put(rows, perturbation.select(members))

    def put_where(self, mask: Tensor, members: Tensor) -> None:
        """Assign ``members`` to the rows where ``mask`` is true; both ``(n,)``."""
        for perturbation, own in self.weights.values():
            own.put_where(mask, perturbation.select(members))

    def values(self, name: str) -> Tensor:
        """Return a parameter of the rows' members, ``(n, *shape)``."""
        return self.weights[name].values()


def _member_by_member(conversion: Conversion, block: _Block, inputs: tuple[Any, ...]) -> Any:
    """Compute the forward of all members with ``vmap``, for a module whose own code must see one member at a time."""
    bare = {name: block.values(parameter) for name, parameter in conversion.bare.items()}

    def forward(bare: dict[str, Tensor], token: Tensor, inputs: tuple[Any, ...]) -> Any:
        for leaf, weights in block.leaves:
            leaf.place.weights, leaf.place.token = weights, token
        return functional_call(conversion.twin, bare, inputs)

    try:
        token = torch.empty(block.size, device="meta")
        in_dims = tree_map(lambda x: 0 if isinstance(x, Tensor) else None, inputs)
        with BatchedAttention():
            return vmap(forward, in_dims=(0, 0, in_dims), randomness="different")(bare, token, inputs)
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        raise UserError(
            "the forward of the module cannot be computed for all members at once (torch.func.vmap: "
            f"{' '.join(str(error).split())})"
        ) from error
    finally:
        for leaf, _ in block.leaves:
            leaf.place.token = None
