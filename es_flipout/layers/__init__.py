"""Population-aware twins of torch layers, and the conversion of an ``nn.Module``."""

from es_flipout.layers.convert import UnsupportedLayerError, convert
from es_flipout.layers.linear import PopulationLinear

__all__ = ["PopulationLinear", "UnsupportedLayerError", "convert"]
