"""The population-aware twin of ``nn.Linear``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from es_flipout.perturbations.base import LinearPerturbation


@dataclass
class Place:
    """Whose weights a layer has at the moment; apart, because setting attributes of an ``nn.Module`` is slow."""

    perturbation: LinearPerturbation[Any] | None = None
    rows: Any = None


class PopulationLinear(nn.Module):
    """Stands where an ``nn.Linear`` stood; row ``i`` of its input goes through the layer of the member in row ``i``.

    The population sets ``place`` before every forward.
    """

    def __init__(self) -> None:
        super().__init__()
        self.place = Place()

    def forward(self, x: Tensor) -> Tensor:
        """``(n, ..., in)`` to ``(n, ..., out)``."""
        place = self.place
        assert place.perturbation is not None
        return place.perturbation.linear(x, place.rows)

    # Nobody hangs hooks on a twin, and looking for them takes longer than a small layer.
    __call__ = forward
