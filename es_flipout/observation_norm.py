"""Observation normalisation with statistics that change only between generations.

All members of a generation, antithetic partners above all, must see the same normaliser. Letters: ``O`` observation size.
"""

from __future__ import annotations

from dataclasses import dataclass

import gymnasium
import torch
from torch import Tensor

from es_flipout.errors import UserError

_MIN_STD = 0.01
CLIP = 10.0


@dataclass
class Moments:
    """Sums over observations: ``count``, ``total`` (O,) and ``squares`` (O,) float64."""

    count: float
    total: Tensor
    squares: Tensor


class ObservationNorm:
    """Running mean and standard deviation of every observation entry, over all live steps so far.

    Kept as count, mean and sum of squared deviations and merged generation by generation (Chan et al. 1979), in float64:
    plain sums of squares lose the variance of entries with a large mean. An entry's deviation is taken as at least 0.01,
    and normalised values are clipped to +-10.

    Attributes:
        factor, offset: ``(O,)`` float64, what an observation is multiplied by and what is added then.
    """

    def __init__(self, obs_dim: int, device: torch.device | None = None) -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.mean = torch.zeros(obs_dim, dtype=torch.float64, device=device)
        self.deviations = torch.zeros(obs_dim, dtype=torch.float64, device=device)
        self._freeze()

    def update(self, moments: Moments) -> None:
        """Merge the moments of one generation."""
        if moments.count <= 0 or not (moments.total.isfinite().all() and moments.squares.isfinite().all()):
            return
        mean = moments.total / moments.count
        deviations = (moments.squares - moments.total * mean).clamp_min(0)
        count = self.count + moments.count
        delta = mean - self.mean
        self.deviations = self.deviations + deviations + delta.square() * (self.count * moments.count / count)
        self.mean = self.mean + delta * (moments.count / count)
        self.count = count
        self._freeze()

    def _freeze(self) -> None:
        """Derive the scale that is applied."""
        variance = self.deviations / self.count.clamp_min(1)
        std = torch.where(self.count > 1, variance.sqrt().clamp_min(_MIN_STD), torch.ones_like(variance))
        self.factor = 1 / std
        self.offset = -self.mean * self.factor

    def __call__(self, obs: Tensor) -> Tensor:
        """Normalise ``(..., O)`` observations; returns float32 of the same shape."""
        # In float64: an entry with a large mean has nothing but rounding left in float32.
        return torch.addcmul(self.offset, obs, self.factor).float().clamp_(-CLIP, CLIP)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that :meth:`load_state_dict` needs."""
        return {"count": self.count, "mean": self.mean, "deviations": self.deviations}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from :meth:`state_dict`."""
        self.count, self.mean, self.deviations = (
            state[name].to(torch.float64).clone() for name in ("count", "mean", "deviations")
        )
        self._freeze()


class BoundsNorm:
    """Scales every entry from its bounds to [0, 1]: for images, whose pixels need no statistics."""

    def __init__(self, space: gymnasium.spaces.Box) -> None:
        """From the bounds of ``space``.

        Raises:
            UserError: a bound is not finite.
        """
        low, high = (torch.as_tensor(bound).to(torch.float32) for bound in (space.low, space.high))
        if not (low.isfinite().all() and high.isfinite().all()):
            raise UserError(f"images need finite bounds, and the observation space is {space}")
        self._low, self._scale = low, 1 / (high - low).clamp_min(torch.finfo(torch.float32).tiny)

    def __call__(self, obs: Tensor) -> Tensor:
        """``(..., O)`` to float32 in [0, 1]."""
        return (obs.to(torch.float32) - self._low.to(obs.device)).mul_(self._scale.to(obs.device))


class Identity:
    """No normalisation: only the conversion to float32 that the policy needs."""

    def __call__(self, obs: Tensor) -> Tensor:
        """``(..., O)`` to float32."""
        return obs.to(torch.float32)
