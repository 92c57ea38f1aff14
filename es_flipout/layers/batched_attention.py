"""A batching rule for ``scaled_dot_product_attention``, which ``torch.func.vmap`` would call member by member.

Attention has no parameters, so that all members can be computed in one call: their rows become examples of its batch.

Letters: ``n`` rows (selected members), ``H`` heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from es_flipout.layers.leaf import rows_first


class BatchedAttention(TorchFunctionMode):
    """A context in which ``torch.nn.functional.scaled_dot_product_attention`` has a batching rule."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Replace the one function, and call any other as it is."""
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *options: Any, **named: Any
) -> Any:
    def call(*tensors: Any) -> Tensor:
        return F.scaled_dot_product_attention(*tensors, *options, **named)

    return _Attention.apply(call, query, key, value, attn_mask)


class _Attention(torch.autograd.Function):
    """Calls a function with queries, keys, values and a mask; its batching rule does so once for all rows."""

    @staticmethod
    def forward(call: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
        return call(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        return

    @staticmethod
    def vmap(  # pyright: ignore[reportIncompatibleMethodOverride]  (torch passes the inputs one by one)
        info: Any, in_dims: tuple[Any, ...], call: Callable[..., Tensor], *tensors: Tensor | None
    ) -> tuple[Tensor, int]:
        """Merge the rows into the batch: ``(n, ..., H, length, size)`` to ``(n * ..., H, length, size)``."""
        *_, mask = tensors
        parts = [rows_first(x, dim, info.batch_size) for x, dim in zip(tensors[:3], in_dims[1:4], strict=True)]
        qkv = [x for x in parts if x is not None]
        rank = max(x.ndim for x in qkv)
        qkv = [_aligned(x, rank) for x in qkv]
        lead = torch.broadcast_shapes(*(x.shape[:-3] for x in qkv))
        if mask is not None:
            mask = _aligned(mask[None] if in_dims[4] is None else mask.movedim(in_dims[4], 0), rank)
            # The fused kernels broadcast a mask that all examples share.
            mask = mask.flatten(0, -4) if mask.shape[:-3].numel() == 1 else _merged(mask, lead)
        output = call(*(_merged(x, lead) for x in qkv), mask).unflatten(0, lead)
        return (output.squeeze(1) if rank == 3 else output), 0


def _aligned(x: Tensor, rank: int) -> Tensor:
    """Insert dimensions of size 1 after the rows, for ``rank`` dimensions (with heads: at least four) in all."""
    return x.reshape(len(x), *(1,) * (max(rank, 4) - x.ndim), *x.shape[1:])


def _merged(x: Tensor, lead: torch.Size) -> Tensor:
    return x.expand(*lead, *x.shape[-3:]).flatten(0, -4)
