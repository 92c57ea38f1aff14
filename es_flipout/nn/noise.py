"""Distributions of weight noise for gradient training, as scale * unit noise.

All three are independent across weights and symmetric about 0, as flipout requires (Wen et al., ICLR 2018, section
3.1). The stored ``weight`` of a layer is always the mean of the noisy weights, so ``eval()`` simply uses it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor
from torch.nn import functional as F
from typing_extensions import override

from es_flipout.errors import UserError


def signs(shape: tuple[int, ...], like: Tensor, generator: Generator | None) -> Tensor:
    """Draw signs, exactly +1 or -1 with equal probability, with the dtype and device of ``like``."""
    drawn = torch.randint(2, shape, dtype=like.dtype, device=like.device, **_from(generator))
    return drawn.mul_(2).sub_(1)


def normals(shape: tuple[int, ...], like: Tensor, generator: Generator | None) -> Tensor:
    """Draw standard normal numbers with the dtype and device of ``like``."""
    return torch.randn(shape, dtype=like.dtype, device=like.device, **_from(generator))


def _from(generator: Generator | None) -> dict[str, Any]:
    """Return the generator argument only if there is one: with dynamic batch sizes, torch.compile cannot trace None."""
    return {} if generator is None else {"generator": generator}


class Noise(ABC):
    """A distribution of weights around their mean: W = mean + scale * unit.

    Attributes:
        gaussian: whether unit noise is normal, so that local reparameterization is possible.
        covers_bias: whether biases are noisy, too; otherwise they are deterministic.
    """

    gaussian: ClassVar[bool] = True
    covers_bias: ClassVar[bool] = False

    @abstractmethod
    def scale(self, mean: Tensor, rho: Tensor | None) -> Tensor:
        """Return the scale of the unit noise, in the shape of ``mean``; its sign does not matter."""

    def unit(self, shape: tuple[int, ...], like: Tensor, generator: Generator | None) -> Tensor:
        """Draw independent noise with mean 0 and variance 1."""
        return normals(shape, like, generator)


@dataclass(frozen=True)
class AdditiveGaussian(Noise):
    """W = mean + softplus(rho) * normal, rho learned per weight and bias: Bayes by Backprop (Blundell et al., 2015).

    Add ``kl_divergence(model) / number_of_examples`` to the mean loss.

    Attributes:
        initial_scale: standard deviation before training.
        prior_scale: standard deviation of the prior of every weight, which has mean 0.
    """

    covers_bias = True

    initial_scale: float = 0.05
    prior_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("initial_scale", "prior_scale"):
            _check_positive(name, getattr(self, name))

    @property
    def initial_rho(self) -> float:
        """The value with softplus(initial_rho) = initial_scale."""
        scale = torch.tensor(self.initial_scale, dtype=torch.float64)
        return float(scale + torch.log(-torch.expm1(-scale)))

    @override
    def scale(self, mean: Tensor, rho: Tensor | None) -> Tensor:
        assert rho is not None
        return F.softplus(rho)

    def kl(self, mean: Tensor, rho: Tensor) -> Tensor:
        """Compute KL(N(mean, softplus(rho)^2) || N(0, prior_scale^2)), summed over the weights."""
        scale = F.softplus(rho)
        ratio = (scale / self.prior_scale).square()
        return 0.5 * (ratio + (mean / self.prior_scale).square() - 1 - ratio.log()).sum()


@dataclass(frozen=True)
class MultiplicativeGaussian(Noise):
    """W = mean * (1 + sigma * normal), on weight matrices only; Gaussian dropout of individual weights."""

    sigma: float = 1.0

    def __post_init__(self) -> None:
        _check_positive("sigma", self.sigma)

    @override
    def scale(self, mean: Tensor, rho: Tensor | None) -> Tensor:
        return self.sigma * mean


@dataclass(frozen=True)
class DropConnect(Noise):
    """Each weight is 0 or twice its mean with equal probability, on weight matrices only: mean * (1 + sign).

    This is ``dropout(weight, p=0.5)`` with the usual scaling. In the paper's notation the stored weight is W/2, so
    weights that were trained without noise keep their meaning.
    """

    gaussian = False

    p: float = 0.5

    def __post_init__(self) -> None:
        if self.p != 0.5:
            raise UserError(
                f"DropConnect needs p=0.5, got {self.p}: flipout requires noise that is symmetric about the mean; "
                "for another strength use MultiplicativeGaussian(sigma=(p / (1 - p)) ** 0.5)"
            )

    @override
    def scale(self, mean: Tensor, rho: Tensor | None) -> Tensor:
        return mean

    @override
    def unit(self, shape: tuple[int, ...], like: Tensor, generator: Generator | None) -> Tensor:
        return signs(shape, like, generator)


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise UserError(f"{name} must be a positive number, got {value}")
