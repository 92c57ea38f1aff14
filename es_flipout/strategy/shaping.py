"""Fitness shaping: weights that do not depend on the scale of the rewards."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Shaping = Literal["ranks", "differences"]


def shape(returns: Tensor, shaping: Shaping) -> Tensor:
    """Return the weights of the members: :func:`centered_ranks` or :func:`pair_differences`."""
    return centered_ranks(returns) if shaping == "ranks" else pair_differences(returns)


def pair_differences(returns: Tensor) -> Tensor:
    """Return differences between antithetic partners, scaled to a root mean square of 1/2, with opposite signs.

    A member is compared only with its partner, which has the same start states. Unlike with ranks, differences in value
    between the start states of pairs therefore do not matter. (Augmented random search, Mania et al. 2018, scales the
    differences of its best pairs by the standard deviation of their returns.) A pair with a return that is NaN or
    infinite counts as the largest finite difference; pairs with equal returns have weight zero.

    Args:
        returns: ``(P,)`` floating point, higher is better; members ``2k`` and ``2k + 1`` are partners.

    Returns:
        ``(P,)`` float32 with sum zero.

    Raises:
        ValueError: ``returns`` is not one-dimensional, is empty or has an odd length.
    """
    if returns.ndim != 1 or len(returns) == 0 or len(returns) % 2:
        raise ValueError(f"returns must have shape (P,) with an even P, got {tuple(returns.shape)}")
    values = torch.where(returns.isnan(), -torch.inf, returns.to(torch.float64))
    first, second = values[0::2], values[1::2]
    difference = first - second
    finite = difference.isfinite()
    largest = torch.where(finite, difference, 0).abs().max()
    sign = (first > second).to(torch.float64) - (first < second).to(torch.float64)
    difference = torch.where(finite, difference, sign * torch.where(largest > 0, largest, 1.0))
    root = difference.square().mean().sqrt()
    scaled = torch.where(root > 0, difference / root / 2, 0.0).to(torch.float32)
    return torch.stack([scaled, -scaled], 1).flatten()


def centered_ranks(returns: Tensor) -> Tensor:
    """Return ranks scaled to [-1/2, 1/2]; the best return gets +1/2 if it is unique.

    Ties get their average rank, so members with equal returns have equal weights; if all returns are equal, all weights
    are zero and the mean does not drift. NaN and -inf share the worst rank.

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
