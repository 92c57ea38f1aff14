"""Observation normalization with statistics that only change between generations.

All members of a generation, especially antithetic partners, must use the same normalizer. Letters: ``O`` observation
size.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import gymnasium
import torch
from torch import Tensor
from typing_extensions import override

from es_flipout.errors import UserError

_MIN_STD = 0.01
CLIP = 10.0


@dataclass
class Moments:
    """Sums over observations: ``count``, ``total`` (O,) and ``squares`` (O,) float64."""

    count: float
    total: Tensor
    squares: Tensor


class Normalizer(ABC):
    """Normalizes observations for a policy.

    A CUDA graph captures a :meth:`fixed_copy`, whose :meth:`buffers` never move in memory.
    """

    @abstractmethod
    def __call__(self, obs: Tensor) -> Tensor:
        """Map observations ``(..., O)`` to float32 of the same shape."""

    @abstractmethod
    def buffers(self) -> Mapping[str, Tensor]:
        """Return the tensors that are applied, by attribute name."""

    def fixed_copy(self, device: torch.device) -> Self:
        """Return a copy whose buffers are on ``device`` and never move; :meth:`load_` overwrites their values."""
        own = copy.copy(self)
        for name, value in self.buffers().items():
            setattr(own, name, value.to(device, copy=True))
        return own

    def load_(self, other: Self) -> None:
        """Copy the buffers of another normalizer of the same class, in place."""
        theirs = other.buffers()
        for name, value in self.buffers().items():
            value.copy_(theirs[name])


class ObservationNorm(Normalizer):
    """Normalizes by the running mean and standard deviation of every observation entry, over all live steps so far.

    Statistics are kept as count, mean and sum of squared deviations in float64, and merged after every generation (Chan
    et al. 1979), because plain sums of squares lose the variance of entries with a large mean. The standard deviation
    of an entry is at least 0.01, and normalized values are clipped to +-10.

    Attributes:
        factor, offset: ``(O,)`` float64; normalized observations are ``observation * factor + offset``.
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
        """Compute factor and offset from the statistics."""
        variance = self.deviations / self.count.clamp_min(1)
        std = torch.where(self.count > 1, variance.sqrt().clamp_min(_MIN_STD), torch.ones_like(variance))
        self.factor = 1 / std
        self.offset = -self.mean * self.factor

    @override
    def __call__(self, obs: Tensor) -> Tensor:
        # In float64, because in float32 only rounding errors would be left of an entry with a large mean.
        return torch.addcmul(self.offset, obs, self.factor).float().clamp_(-CLIP, CLIP)

    @override
    def buffers(self) -> Mapping[str, Tensor]:
        return {"factor": self.factor, "offset": self.offset}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the statistics, for :meth:`load_state_dict`."""
        return {"count": self.count, "mean": self.mean, "deviations": self.deviations}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the statistics of :meth:`state_dict`."""
        self.count, self.mean, self.deviations = (
            state[name].to(torch.float64).clone() for name in ("count", "mean", "deviations")
        )
        self._freeze()


class BoundsNorm(Normalizer):
    """Scales every entry from its bounds to [0, 1]; for images, whose pixels need no statistics.

    Attributes:
        low, scale: ``(O,)`` float32; normalized observations are ``(observation - low) * scale``.
    """

    def __init__(self, space: gymnasium.spaces.Box) -> None:
        """Read the bounds of ``space``.

        Raises:
            UserError: a bound is not finite.
        """
        low, high = (torch.as_tensor(bound).to(torch.float32) for bound in (space.low, space.high))
        if not (low.isfinite().all() and high.isfinite().all()):
            raise UserError(f"images need finite bounds, but the observation space is {space}")
        self.low, self.scale = low, 1 / (high - low).clamp_min(torch.finfo(torch.float32).tiny)

    @override
    def __call__(self, obs: Tensor) -> Tensor:
        return (obs.to(torch.float32) - self.low.to(obs.device)).mul_(self.scale.to(obs.device))

    @override
    def buffers(self) -> Mapping[str, Tensor]:
        return {"low": self.low, "scale": self.scale}


class Identity(Normalizer):
    """No normalization, only the conversion to float32 that the policy needs."""

    @override
    def __call__(self, obs: Tensor) -> Tensor:
        return obs.to(torch.float32)

    @override
    def buffers(self) -> Mapping[str, Tensor]:
        return {}
