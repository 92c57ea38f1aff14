"""The population-aware twin of ``nn.MultiheadAttention``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from es_flipout.layers.leaf import Leaf


class PopulationAttention(Leaf):
    """Twin of ``nn.MultiheadAttention`` (without ``add_bias_kv`` and ``add_zero_attn``)."""

    parameter_names = (
        "in_proj_weight",
        "q_proj_weight",
        "k_proj_weight",
        "v_proj_weight",
        "in_proj_bias",
        "out_proj.weight",
        "out_proj.bias",
    )

    # None keeps nn.TransformerEncoderLayer from passing the weights to its own fused kernel.
    in_proj_bias = None

    def __init__(self, layer: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads, self.embed_dim, self.dropout = layer.num_heads, layer.embed_dim, layer.dropout
        self.batch_first, self._qkv_same_embed_dim = layer.batch_first, layer._qkv_same_embed_dim
        self.train(layer.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute ``nn.MultiheadAttention`` for each member."""
        projected = self.over_rows(self._project, query, *(None if t is query else t for t in (key, value)))
        single = query.ndim == 2
        if single:
            projected = tuple(t[None] for t in projected)
        elif not self.batch_first:
            projected = tuple(t.transpose(0, 1) for t in projected)
        # (B, length, E) to (B, heads, length, E / heads)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in projected)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if attn_mask is not None:
            if attn_mask.ndim == 3:  # (B heads, length, length)
                attn_mask = attn_mask.unflatten(0, (-1, self.num_heads))
            scores = scores + _as_addend(attn_mask, scores)
        if key_padding_mask is not None:
            padding = key_padding_mask[None] if single else key_padding_mask
            scores = scores + _as_addend(padding, scores)[:, None, None]
        weights = F.dropout(scores.softmax(-1), self.dropout, self.training)
        mixed = (weights @ v).transpose(1, 2).flatten(2)
        if single:
            mixed = mixed[0]
        elif not self.batch_first:
            mixed = mixed.transpose(0, 1)
        output = self.over_rows(self._project_out, mixed)
        if not need_weights:
            return output, None
        shown = weights.mean(1) if average_attn_weights else weights
        return output, shown[0] if single else shown

    def _project(self, query: Tensor, key: Tensor | None, value: Tensor | None) -> tuple[Tensor, ...]:
        """Compute queries, keys and values of all rows; a missing key or value is the query."""
        weights, bias = self.place.weights, self.bias_rows("in_proj_bias")
        if self._qkv_same_embed_dim and key is None and value is None:
            return weights["in_proj_weight"].linear(query, bias).chunk(3, -1)
        projected = []
        for i, (x, name) in enumerate(zip((query, key, value), ("q", "k", "v"), strict=True)):
            part = slice(i * self.embed_dim, (i + 1) * self.embed_dim)
            own_bias = None if bias is None else bias[:, part]
            x = query if x is None else x
            if self._qkv_same_embed_dim:
                projected.append(weights["in_proj_weight"].linear(x, own_bias, part))
            else:
                projected.append(weights[f"{name}_proj_weight"].linear(x, own_bias))
        return tuple(projected)

    def _project_out(self, x: Tensor) -> Tensor:
        return self.place.weights["out_proj.weight"].linear(x, self.bias_rows("out_proj.bias"))


def _as_addend(mask: Tensor, scores: Tensor) -> Tensor:
    """Convert a mask to an addend of the scores; a boolean mask is true at positions that must not be attended to."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=scores.dtype).masked_fill(mask, float("-inf"))
