"""A population of identical members, to play many episodes of the mean policy at once."""

from __future__ import annotations

import copy
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from es_flipout.policies.networks import initial_state
from es_flipout.strategy.row_block import in_blocks, row_block_for, tensors_in


class Unperturbed:
    """A population of ``size`` members that are all the same module, to score the mean policy in many episodes at once.

    ``row_block`` is as in :class:`es_flipout.strategy.population.ForwardSettings`.
    """

    def __init__(self, module: nn.Module, size: int, row_block: int | None = None) -> None:
        self.module = module
        self.size = size
        self.device = next(module.parameters()).device
        self.row_block = row_block
        if row_block is None and self.device.type == "cpu":
            self.row_block = row_block_for(module, size)

    def initial_state(self, rows: int) -> Tensor | None:
        """See :func:`es_flipout.policies.networks.initial_state`."""
        return initial_state(self.module, rows, self.device)

    def select(self, members: Tensor) -> Unperturbed:
        """Return this population: every row is the module."""
        return self

    def replace(self, rows: Tensor, members: Tensor) -> None:
        """Do nothing: every row is the module."""

    def replace_where(self, mask: Tensor, members: Tensor) -> None:
        """Do nothing: every row is the module."""

    @property
    def layout(self) -> Hashable:
        """See :attr:`es_flipout.strategy.population.Population.layout`."""
        shapes = [(name, value.shape, value.dtype) for name, value in self.module.state_dict().items()]
        return self.size, self.row_block, str(self.module), tuple(shapes)

    def fixed_copy(self) -> Unperturbed:
        """See :meth:`es_flipout.strategy.population.Population.fixed_copy`."""
        return Unperturbed(copy.deepcopy(self.module), self.size, self.row_block)

    @torch.no_grad()
    def load_(self, other: Unperturbed) -> None:
        """See :meth:`es_flipout.strategy.population.Population.load_`."""
        load_module_(self.module, other.module)

    @torch.no_grad()
    def __call__(self, *inputs: Any) -> Any:
        """Map ``(n, ..., in)`` to ``(n, ..., out)``."""
        rows = len(tensors_in(inputs)[0])
        return in_blocks(lambda block, part: self.module(*part), inputs, rows, self.row_block or rows)


def load_module_(own: nn.Module, other: nn.Module) -> None:
    """Copy the parameters and buffers of another module of the same class, in place."""
    theirs = dict((*other.named_parameters(), *other.named_buffers()))
    for name, tensor in (*own.named_parameters(), *own.named_buffers()):
        tensor.copy_(theirs[name])
