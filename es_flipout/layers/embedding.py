"""The population-aware twin of ``nn.Embedding``."""

from __future__ import annotations

from torch import Tensor

from es_flipout.layers.leaf import Leaf


class PopulationEmbedding(Leaf):
    """Twin of ``nn.Embedding``; the padding entry, if there is one, is the same for every member."""

    parameter_names = ("weight",)

    def forward(self, index: Tensor) -> Tensor:
        """Map integers ``(n, ...)`` to ``(n, ..., size)``."""
        return self.over_rows(lambda rows: self.place.weights["weight"].embedding(rows.long()), index)
