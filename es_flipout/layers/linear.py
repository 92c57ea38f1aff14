"""The population-aware twins of ``nn.Linear`` and ``nn.Bilinear``."""

from __future__ import annotations

from torch import Tensor

from es_flipout.layers.leaf import Leaf
from es_flipout.perturbations.base import over_rows
from es_flipout.perturbations.operations import Bilinear


class PopulationLinear(Leaf):
    """Twin of ``nn.Linear``."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, ..., in)`` to ``(n, ..., out)``."""
        return self._forward(x) if self.place.token is None else self.over_rows(self._forward, x)

    # Twins have no hooks, and checking for hooks takes longer than computing a small layer.
    __call__ = forward

    def _forward(self, x: Tensor) -> Tensor:
        perturbation, rows = self.place.weights["weight"]
        return perturbation.linear(x, rows, self.bias_rows())


class PopulationBilinear(Leaf):
    """Twin of ``nn.Bilinear``."""

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        """Map ``(n, ..., in1)`` and ``(n, ..., in2)`` to ``(n, ..., out)``."""
        return self.over_rows(self._forward, one, other)

    def _forward(self, one: Tensor, other: Tensor) -> Tensor:
        y = self.place.weights["weight"].apply(Bilinear(other), one)
        bias = self.bias_rows()
        return y if bias is None else y + over_rows(bias, y)
