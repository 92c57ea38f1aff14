"""The population-aware twin of ``nn.Linear``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from es_flipout.perturbations.base import LinearPerturbation


class PopulationLinear(nn.Module):
    """Stands where an ``nn.Linear`` stood; row ``i`` of its input goes through the layer of the member in row ``i``.

    The population points ``perturbation`` and ``rows`` at its own before every forward.
    """

    perturbation: LinearPerturbation[Any]
    rows: Any

    def forward(self, x: Tensor) -> Tensor:
        """``(n, ..., in)`` to ``(n, ..., out)``."""
        return self.perturbation.linear(x, self.rows)
