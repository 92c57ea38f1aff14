"""``nn.Linear`` with weight noise."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from es_flipout.errors import UserError
from es_flipout.nn.layer import NoisyLayer, ParameterSample, Sample
from es_flipout.nn.noise import normals


def noisy_linear(x: Tensor, weight: ParameterSample, bias: ParameterSample | None) -> Tensor:
    """Map ``x (n, ..., in)`` to ``(n, ..., out)``, with a separate weight and bias for each example."""
    y = weight.product(x, F.linear, _own_linear, -1)
    return y if bias is None else bias.added(y, -1)


def _own_linear(x: Tensor, weights: Tensor) -> Tensor:
    """Multiply ``x (n, ..., in)`` by ``weights (n, out, in)``."""
    n, out, inner = weights.shape
    return torch.bmm(x.reshape(n, -1, inner), weights.mT).view(*x.shape[:-1], out)


class FlipoutLinear(NoisyLayer, nn.Linear):
    """Fully connected layer; maps ``(n, ..., in)``, or one example ``(in,)``, to ``(n, ..., out)``.

    Local reparameterization requires inputs ``(n, in)``: it cannot share weights over inner dimensions.
    """

    fully_connected = True

    @override
    def forward(self, input: Tensor, sample: Sample | None = None) -> Tensor:
        if not self.training and sample is None:
            return super().forward(input)
        if input.ndim == 1:
            return self.forward(input[None], sample)[0]
        if self.estimator == "local_reparameterization":
            return self._locally_reparameterized(input)
        sample = self.sample(input.shape[0]) if sample is None else sample
        return noisy_linear(input, sample["weight"], sample.get("bias"))

    def _locally_reparameterized(self, x: Tensor) -> Tensor:
        if x.ndim != 2:
            raise UserError(
                f"local reparameterization needs an input (batch, in), got {tuple(x.shape)}: the weights of an example "
                "would differ along the inner dimensions; use estimator='flipout'"
            )
        y = F.linear(x, self.weight, self.bias)
        with torch.autocast(x.device.type, enabled=False):  # squares of small scales vanish in half precision
            scale = self.scale("weight")
            variance = F.linear(x.to(scale.dtype).square(), scale.square())
            if "bias" in self._noisy:
                variance = variance + self.scale("bias").square()
            deviation = variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt()  # finite slope at 0
        return y + (deviation * normals(tuple(y.shape), deviation, self.generator)).to(y.dtype)
