"""A low-rank layer of all members: a kernel for the members' own terms, and the library's product with the mean.

``y = x W^T + scale (x . right) left + bias``: the kernel reads the factors of each member once and writes the addend of
the product with the mean, which then accumulates into it.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from es_flipout.kernels import MemberNoise
from es_flipout.kernels.signs import sign_of
from es_flipout.kernels.tiles import block, in_memory, on_device, signed_scale


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    noise: MemberNoise,
    bias_rows: Tensor | None = None,
) -> Tensor:
    """Apply the layer of member ``noise.members[i]`` to row ``i`` of ``x``.

    Args:
        x: ``(n, in)``.
        weight: ``(out, in)``, the mean, of the dtype of ``x``.
        left: ``(num_sources, rank, out)``.
        right: ``(num_sources, rank, in)``.
        noise: the members; its sigma must already be divided by the square root of the rank.
        bias_rows: ``(n, out)``.

    Returns:
        ``(n, out)``, of the dtype of ``x``.
    """
    n, size_in = x.shape
    size_out, rank = len(weight), left.shape[1]
    own = torch.empty(n, size_out, dtype=x.dtype, device=x.device)
    if n == 0:
        return own
    x = x.contiguous()
    with on_device(x):
        _own_kernel[(n,)](
            x, left, right, noise.members, bias_rows, own, size_out, size_in, *in_memory(noise.sigma),
            RANK=rank, PER_SOURCE=noise.per_source, BLOCK_IN=block(size_in, 2048), BLOCK_OUT=block(size_out, 2048),
        )  # fmt: skip
    return torch.addmm(own, x, weight.T)


def low_rank_linear_torch(
    x: Tensor,
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    noise: MemberNoise,
    bias_rows: Tensor | None = None,
) -> Tensor:
    """Torch twin of :func:`low_rank_linear`."""
    members, per_source, scale, _ = noise
    source = members // per_source
    along = torch.einsum("ni,nki->nk", x.float(), right[source].float())
    along = along * (scale * sign_of(members, per_source))[:, None]
    y = x.float() @ weight.float().T + torch.einsum("nk,nko->no", along, left[source].float())
    return (y if bias_rows is None else y + bias_rows).to(x.dtype)


@triton.jit
def _own_kernel(
    x, left, right, members, bias_rows, own, size_out, size_in, scale, scale_at,
    RANK: tl.constexpr, PER_SOURCE: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    member = tl.load(members + row).to(tl.int64)
    source = member // PER_SOURCE
    sign = tl.sum(signed_scale(scale, scale_at, member, 1, PER_SOURCE), axis=0)
    for first in range(0, size_out, BLOCK_OUT):
        col = first + tl.arange(0, BLOCK_OUT)
        total = tl.zeros((BLOCK_OUT,), tl.float32)
        if bias_rows is not None:
            total += tl.load(bias_rows + row * size_out + col, mask=col < size_out, other=0.0)
        for number in tl.static_range(RANK):
            # Computed again for every block of outputs; from the second on, the factor is in the cache.
            sums = tl.zeros((BLOCK_IN,), tl.float32)
            for start in range(0, size_in, BLOCK_IN):
                k = start + tl.arange(0, BLOCK_IN)
                values = tl.load(x + row * size_in + k, mask=k < size_in, other=0.0).to(tl.float32)
                at = right + (source * RANK + number) * size_in + k
                sums += values * tl.load(at, mask=k < size_in, other=0.0).to(tl.float32)
            along = tl.sum(sums, axis=0) * sign
            at = left + (source * RANK + number) * size_out + col
            total += along * tl.load(at, mask=col < size_out, other=0.0).to(tl.float32)
        tl.store(own + row * size_out + col, total.to(own.dtype.element_ty), mask=col < size_out)
