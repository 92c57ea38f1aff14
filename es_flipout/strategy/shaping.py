"""Fitness shaping: weights that do not depend on the scale of the rewards."""

from __future__ import annotations

import torch
from torch import Tensor


def centered_ranks(returns: Tensor) -> Tensor:
    """Return ranks scaled to [-1/2, 1/2]; the best return gets +1/2 if it is unique.

    Ties get their average rank, so members with equal returns have equal weights; if all returns are equal, all weights are
    zero and the mean does not drift. NaN and -inf share the worst rank.

    Args:
        returns: ``(P,)`` floating point, higher is better.

    Returns:
        ``(P,)`` float32 with sum zero.

    Raises:
        ValueError: ``returns`` is not one-dimensional or is empty.
    """
    if returns.ndim != 1 or len(returns) == 0:
        raise ValueError(f"returns must have shape (P,), got {tuple(returns.shape)}")
    ordered = torch.where(returns.isnan(), -torch.inf, returns)
    _, place, count = torch.unique(ordered, sorted=True, return_inverse=True, return_counts=True)
    last = count.cumsum(0) - 1
    average_rank = last - (count - 1) / 2
    ranks = average_rank.to(torch.float64)[place]
    return (ranks / max(len(returns) - 1, 1) - 0.5 * (len(returns) > 1)).to(torch.float32)
