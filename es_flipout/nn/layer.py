"""The base class of flipout layers: their noisy parameters, and drawing one weight sample per example of a batch.

Estimators of the same noise, for n examples in a batch:

- ``flipout``: one base perturbation B per batch; example n has W_n = mean + B * (r_n s_n^T), with random signs r over
  the outputs and s over the inputs (Wen et al., ICLR 2018, equation 3). Costs two products instead of one.
- ``shared``: one weight sample for the whole batch.
- ``independent``: one weight sample per example; n weight matrices in memory. The reference.
- ``local_reparameterization``: noise drawn on the outputs (Kingma et al., 2015); fully connected layers and Gaussian
  noise only.

An example is one entry of the first dimension (in recurrent layers, of the batch dimension given by ``batch_first``).
All its pixels, time steps and other inner dimensions see the same weights. Noisy biases are vectors and therefore
cheap: each example has its own, except with ``shared``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Generator, Tensor, nn
from typing_extensions import override

from es_flipout.errors import UserError
from es_flipout.nn.noise import AdditiveGaussian, Noise, signs

Estimator = Literal["flipout", "shared", "independent", "local_reparameterization"]
Product: TypeAlias = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ParameterSample:
    """The values of one parameter for each example of a batch: mean + delta, or mean + delta * (r s^T).

    Attributes:
        mean: ``shape``.
        delta: ``shape`` if all examples share it, ``(n, *shape)`` if each has its own, None without noise.
        r: output signs ``(n, out)``; flipout only.
        s: input signs ``(n, in)``; flipout only.
    """

    mean: Tensor
    delta: Tensor | None = None
    r: Tensor | None = None
    s: Tensor | None = None

    @property
    def own(self) -> bool:
        """Whether each example has its own delta."""
        return self.delta is not None and self.delta.ndim > self.mean.ndim

    def example(self, n: int) -> Tensor:
        """Return the dense parameter of example ``n``, in the shape of the mean."""
        if self.delta is None:
            return self.mean
        if self.r is None or self.s is None:
            return self.mean + (self.delta[n] if self.own else self.delta)
        out, inner = self.mean.shape[:2]
        groups = self.s.shape[1] // inner  # of a convolution
        sign = self.r[n].view(groups, -1, 1) * self.s[n].view(groups, 1, inner)
        return self.mean + self.delta * sign.reshape(out, inner, *(1,) * (self.mean.ndim - 2))

    def product(self, x: Tensor, product: Product, own_product: Product, dim: int) -> Tensor:
        """Multiply each example by its own weights.

        Args:
            x: ``(n, ...)``, with the inputs in dimension ``dim``.
            product: multiplies the batch by a single weight.
            own_product: multiplies each example by its own weight, ``(n, *shape)``.
            dim: dimension of the inputs and outputs, counted from either end.
        """
        if self.delta is None:
            return product(x, self.mean)
        if self.r is None or self.s is None:
            return (own_product if self.own else product)(x, self.mean + self.delta)
        flipped = product(x * spread(self.s, x, dim), self.delta)
        return torch.addcmul(product(x, self.mean), spread(self.r, flipped, dim), flipped)

    def added(self, y: Tensor, dim: int) -> Tensor:
        """Add this parameter, a bias, to ``y (n, ...)``, whose outputs are in dimension ``dim``."""
        bias = self.mean if self.delta is None else self.mean + self.delta
        return y + spread(bias if bias.ndim == 2 else bias[None], y, dim)


def spread(v: Tensor, x: Tensor, dim: int) -> Tensor:
    """Reshape ``v (n or 1, size)`` to broadcast with ``x (n, ...)``, which has ``size`` in dimension ``dim``."""
    shape = [1] * x.ndim
    shape[0], shape[dim] = v.shape
    return v.to(x.dtype).view(shape)


Sample: TypeAlias = dict[str, ParameterSample]


def example_parameters(sample: Sample, n: int) -> dict[str, Tensor]:
    """Return the dense parameters of example ``n``, for ``torch.func.functional_call`` on the torch.nn twin."""
    return {name: parameter.example(n) for name, parameter in sample.items()}


class NoisyLayer(nn.Module):
    """Mixin for torch.nn layers: same arguments and parameter names, with weight noise in training mode.

    Args:
        *args: arguments of the torch.nn twin.
        noise: distribution of the weights.
        estimator: how the examples of a batch share the noise; see the module docstring.
        generator: random number generator, on the device of the layer; None for torch's default generator.
            ``torch.compile`` breaks the graph at draws from any other generator, so ``fullgraph=True`` requires None.
        **kwargs: keyword arguments of the torch.nn twin.

    Raises:
        UserError: the estimator is unknown, or does not support this layer or noise.
    """

    fully_connected: ClassVar[bool] = False
    _noisy: tuple[str, ...] = ()  # no parameter is noisy while the twin's constructor runs

    def __init__(
        self,
        *args: Any,
        noise: Noise,
        estimator: Estimator = "flipout",
        generator: Generator | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.add_noise(noise, estimator, generator)

    def add_noise(self, noise: Noise, estimator: Estimator, generator: Generator | None) -> None:
        """Find the noisy parameters and add their scales; the second half of the constructor."""
        _check(self, noise, estimator)
        self.noise = noise
        self.estimator: Estimator = estimator
        self.generator = generator
        means = [(name, parameter) for name, parameter in self.named_parameters() if self.is_noisy(name)]
        self._noisy = tuple(name for name, _ in means)
        if isinstance(noise, AdditiveGaussian):
            for name, mean in means:
                self.register_parameter(f"{name}_rho", nn.Parameter(torch.full_like(mean, noise.initial_rho)))

    def is_noisy(self, name: str) -> bool:
        """Return whether the parameter ``name`` of the twin is noisy."""
        return self.noise.covers_bias or not name.startswith("bias")

    def reset_parameters(self) -> None:
        """Reset parameters like the torch.nn twin, and the scales to their initial value."""
        super().reset_parameters()  # type: ignore[misc]  # of the twin
        if self._noisy and isinstance(self.noise, AdditiveGaussian):
            for name in self._noisy:
                nn.init.constant_(getattr(self, f"{name}_rho"), self.noise.initial_rho)

    def scale(self, name: str) -> Tensor:
        """Return the scale of the unit noise of a noisy parameter."""
        return self.noise.scale(getattr(self, name), getattr(self, f"{name}_rho", None))

    def sample(self, n: int) -> Sample:
        """Draw weights for ``n`` examples; pass them to ``forward(x, sample=...)`` any number of times.

        Raises:
            UserError: the estimator is local reparameterization, which draws outputs, not weights.
        """
        if self.estimator == "local_reparameterization":
            raise UserError("local reparameterization draws outputs, not weights: sample() needs another estimator")
        twin_parameters = ((name, p) for name, p in self.named_parameters() if not name.endswith("_rho"))
        return {name: self._sample_parameter(name, mean, n) for name, mean in twin_parameters}

    def _sample_parameter(self, name: str, mean: Tensor, n: int) -> ParameterSample:
        if name not in self._noisy:
            return ParameterSample(mean)
        vector = mean.ndim == 1
        own = self.estimator == "independent" or (vector and self.estimator == "flipout")
        scale = self.scale(name)
        delta = scale * self.noise.unit((n, *mean.shape) if own else tuple(mean.shape), mean, self.generator)
        if vector or self.estimator != "flipout":
            return ParameterSample(mean, delta)
        r = signs((n, mean.shape[0]), mean, self.generator)
        s = signs((n, self.inputs(mean)), mean, self.generator)
        return ParameterSample(mean, delta, r, s)

    def inputs(self, weight: Tensor) -> int:
        """Return the size of the inputs that are multiplied by ``weight``."""
        return weight.shape[1]

    @override
    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, noise={self.noise}, estimator={self.estimator}"


def kl_divergence(module: nn.Module) -> Tensor:
    """Compute the KL divergence of the weights of all ``AdditiveGaussian`` layers from their prior; a scalar.

    Shared layers are counted once.

    Raises:
        UserError: no layer has ``AdditiveGaussian`` noise.
    """
    total: Tensor | None = None
    for layer in module.modules():
        if isinstance(layer, NoisyLayer) and isinstance(layer.noise, AdditiveGaussian):
            for name in layer._noisy:
                kl = layer.noise.kl(getattr(layer, name), getattr(layer, f"{name}_rho"))
                total = kl if total is None else total + kl
    if total is None:
        raise UserError("kl_divergence needs a layer with AdditiveGaussian noise; other noises have no prior")
    return total


def _check(layer: NoisyLayer, noise: Noise, estimator: str) -> None:
    kind = type(layer).__name__
    if not isinstance(noise, Noise):
        raise UserError(f"noise must be an es_flipout.nn.Noise such as MultiplicativeGaussian(sigma=1), got {noise!r}")
    if estimator not in get_args(Estimator):
        raise UserError(f"estimator must be one of {', '.join(get_args(Estimator))}, got {estimator!r}")
    if estimator == "local_reparameterization":
        if not layer.fully_connected:
            raise UserError(f"local reparameterization does not support {kind}: use estimator='flipout'")
        if not noise.gaussian:
            raise UserError(f"local reparameterization needs Gaussian noise, not {noise}: use estimator='flipout'")
