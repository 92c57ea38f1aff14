"""Population-aware twins of torch layers, and the conversion of any ``nn.Module``."""

from es_flipout.layers.batched_attention import BatchedAttention
from es_flipout.layers.convert import Conversion, UnsupportedLayerError, convert, stays_still
from es_flipout.layers.leaf import Leaf, Weight

__all__ = ["BatchedAttention", "Conversion", "Leaf", "UnsupportedLayerError", "Weight", "convert", "stays_still"]
