"""``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d`` with weight noise: one filter bank per image, not per pixel."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from es_flipout.nn.layer import NoisyLayer, Sample

_CONVOLUTIONS: tuple[Any, ...] = (F.conv1d, F.conv2d, F.conv3d)


class _FlipoutConv(NoisyLayer, nn.modules.conv._ConvNd):
    """Maps ``(n, channels, *space)``, or one example without ``n``; signs vary over channels, not over space."""

    @override
    def inputs(self, weight: Tensor) -> int:
        return self.in_channels

    @override
    def forward(self, input: Tensor, sample: Sample | None = None) -> Tensor:
        if not self.training and sample is None:
            return super().forward(input)
        if input.ndim == self.weight.ndim - 1:
            return self.forward(input[None], sample)[0]
        sample = self.sample(input.shape[0]) if sample is None else sample
        y = sample["weight"].product(input, self._convolve, self._own_convolve, 1)
        return sample["bias"].added(y, 1) if "bias" in sample else y

    def _convolve(self, x: Tensor, weight: Tensor, times: int = 1) -> Tensor:
        """Convolve like the twin, without bias, with ``times`` as many channels and groups."""
        padding = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        convolution = _CONVOLUTIONS[self.weight.ndim - 3]
        return convolution(x, weight, None, self.stride, padding, self.dilation, times * self.groups)

    def _own_convolve(self, x: Tensor, weights: Tensor) -> Tensor:
        """Convolve with ``weights (n, out, in / groups, *kernel)``; examples become groups of channels."""
        n = x.shape[0]
        y = self._convolve(x.reshape(1, -1, *x.shape[2:]), weights.flatten(0, 1), n)
        return y.view(n, self.out_channels, *y.shape[2:])


class FlipoutConv1d(_FlipoutConv, nn.Conv1d):
    """Convolution over ``(n, channels, length)``."""


class FlipoutConv2d(_FlipoutConv, nn.Conv2d):
    """Convolution over ``(n, channels, height, width)``."""


class FlipoutConv3d(_FlipoutConv, nn.Conv3d):
    """Convolution over ``(n, channels, depth, height, width)``."""
