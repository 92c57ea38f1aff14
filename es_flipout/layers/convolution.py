"""The population-aware twins of torch's convolutions. Letters: ``B`` examples per member, ``C`` channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from es_flipout.layers.leaf import Leaf
from es_flipout.perturbations.operations import Convolution, TransposedConvolution, over_channels

Convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TransposedConvolutions = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class PopulationConvolution(Leaf):
    """Twin of ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``."""

    def __init__(self, layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        super().__init__()
        self._pad_mode = layer.padding_mode
        self._pad = layer._reversed_padding_repeated_twice
        padding = layer.padding if layer.padding_mode == "zeros" else (0,) * len(layer.stride)
        self._operation = Convolution(layer.stride, layer.groups, layer.dilation, padding)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, [B,] C, *space)`` to ``(n, [B,] C', *space')``."""
        return self.over_rows(self._forward, x)

    def _forward(self, x: Tensor) -> Tensor:
        if self._pad_mode != "zeros":
            lead = x.shape[: -1 - self._operation.dims]
            flat = x.reshape(-1, *x.shape[len(lead) :])
            x = F.pad(flat, self._pad, mode=self._pad_mode).unflatten(0, lead)
        y = self.place.weights["weight"].apply(self._operation, x)
        bias = self.bias_rows()
        return y if bias is None else y + over_channels(bias, y, self._operation.dims)


class PopulationTransposedConvolution(Leaf):
    """Twin of ``nn.ConvTranspose1d``, ``nn.ConvTranspose2d`` and ``nn.ConvTranspose3d``."""

    def __init__(self, layer: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d) -> None:
        super().__init__()
        assert not isinstance(layer.padding, str)  # torch rejects it
        self._kernel_size = layer.kernel_size
        self._operation = TransposedConvolution(
            layer.stride, layer.groups, layer.dilation, tuple(layer.padding), tuple(layer.output_padding)
        )

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Map ``(n, [B,] C, *space)`` to ``(n, [B,] C', *space')``.

        Raises:
            ValueError: ``output_size`` is not possible for this input.
        """
        operation = self._operation
        if output_size is not None:
            operation = replace(operation, output_padding=self._padding_to(output_size, x.shape[-operation.dims :]))
        return self.over_rows(lambda rows: self._forward(rows, operation), x)

    def _forward(self, x: Tensor, operation: TransposedConvolution) -> Tensor:
        y = self.place.weights["weight"].apply(operation, x)
        bias = self.bias_rows()
        return y if bias is None else y + over_channels(bias, y, operation.dims)

    def _padding_to(self, output_size: Sequence[int], space: Sequence[int]) -> tuple[int, ...]:
        """Return the output padding with which the output has ``output_size``."""
        op, wanted = self._operation, list(output_size)[-len(space) :]
        smallest = [
            (size - 1) * op.stride[d] - 2 * op.padding[d] + op.dilation[d] * (self._kernel_size[d] - 1) + 1
            for d, size in enumerate(space)
        ]
        extra = tuple(want - least for want, least in zip(wanted, smallest, strict=True))
        if any(not 0 <= e < max(s, d) for e, s, d in zip(extra, op.stride, op.dilation, strict=True)):
            most = [least + s - 1 for least, s in zip(smallest, op.stride, strict=True)]
            raise ValueError(f"output_size must be between {smallest} and {most}, got {wanted}")
        return extra
