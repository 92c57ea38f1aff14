"""The base class of population-aware twins: where their weights come from, and how rows reach them.

A twin computes all rows ``(n, ...)`` at once: the weights of the member in row ``i`` are applied to row ``i``. A module
whose forward works row by row is called with all rows. Any other module runs under ``torch.func.vmap``, so that its own
code sees one member at a time; its twins leave ``vmap`` and see all rows again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from es_flipout.perturbations.base import Perturbation
from es_flipout.perturbations.operations import Operation


class Weight(NamedTuple):
    """A parameter of a layer, and the members that the rows currently belong to."""

    perturbation: Perturbation[Any]
    rows: Any

    def values(self) -> Tensor:
        """Return the dense parameters of the members, ``(n, *shape)``."""
        return self.perturbation.values(self.rows)

    def linear(self, x: Tensor, bias: Tensor | None = None, part: slice | None = None) -> Tensor:
        """See :meth:`Perturbation.linear`."""
        return self.perturbation.linear(x, self.rows, bias, part)

    def embedding(self, index: Tensor) -> Tensor:
        """See :meth:`Perturbation.embedding`."""
        return self.perturbation.embedding(index, self.rows)

    def apply(self, operation: Operation, x: Tensor) -> Tensor:
        """See :meth:`Perturbation.apply`."""
        return self.perturbation.apply(operation, x, self.rows)


@dataclass
class Place:
    """The current weights of a layer; a separate object, because setting attributes of an ``nn.Module`` is slow.

    Attributes:
        weights: weights by their names in the layer.
        token: under ``vmap``, any tensor with one row per row of the population; otherwise None.
    """

    weights: dict[str, Weight] = field(default_factory=dict)
    token: Tensor | None = None


class Leaf(nn.Module):
    """Replaces a layer with parameters. The population sets ``place`` before every forward.

    Attributes:
        parameter_names: names of the layer's parameters, as in its state dict.
    """

    parameter_names: tuple[str, ...] = ("weight", "bias")

    def __init__(self) -> None:
        super().__init__()
        self.place = Place()

    def over_rows(self, function: Callable[..., Any], *inputs: Tensor | None) -> Any:
        """Call ``function`` with all rows of the inputs, ``(n, ...)`` each, whether under ``vmap`` or not."""
        token = self.place.token
        return function(*inputs) if token is None else _AllRows.apply(function, token, *inputs)

    def bias_rows(self, name: str = "bias") -> Tensor | None:
        """Return the biases of the rows' members, ``(n, size)``; None if the layer has no bias."""
        bias = self.place.weights.get(name)
        return None if bias is None else bias.values()

    def __getattr__(self, name: str) -> Any:
        # A module may use a layer's weight directly, for example to multiply by the weight of an embedding.
        if name in type(self).parameter_names and name in self.__dict__["place"].weights:
            return self.over_rows(lambda *_: self.place.weights[name].values())
        if name in type(self).parameter_names:
            return None
        return super().__getattr__(name)


class _AllRows(torch.autograd.Function):
    """Leaves ``vmap``: its batching rule calls a function with all rows."""

    @staticmethod
    def forward(function: Callable[..., Any], token: Tensor, *inputs: Tensor | None) -> Any:
        raise RuntimeError("a layer of a population was called outside its population")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        return

    @staticmethod
    def vmap(  # pyright: ignore[reportIncompatibleMethodOverride]  (torch passes the inputs one by one)
        info: Any, in_dims: tuple[Any, ...], function: Callable[..., Any], token: Tensor, *inputs: Tensor | None
    ) -> tuple[Any, Any]:
        """Move the rows of all inputs to the first dimension; inputs that all members share are expanded."""
        rows = [rows_first(x, dim, info.batch_size) for x, dim in zip(inputs, in_dims[2:], strict=True)]
        output = function(*rows)
        return output, tuple(0 for _ in output) if isinstance(output, tuple) else 0


def rows_first(x: Tensor | None, dim: int | None, rows: int) -> Tensor | None:
    """Move the dimension of the rows to the front; a tensor that all rows share (no dimension) is expanded."""
    if x is None:
        return None
    return x.expand(rows, *x.shape) if dim is None else x.movedim(dim, 0)
