"""Operations on weights other than linear layers, with one weight shared by all rows or with one weight per row.

Each is bilinear in its input and its weight ``(d0, d1, *rest)``, so flipping input and output channels is equivalent to
flipping the weight. Letters: ``n`` rows (one member each), ``B`` examples per member, ``C`` channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override


class Operation(ABC):
    """An operation on an input and a weight.

    Attributes:
        input_dim: the dimension of the weight (0 or 1) for input channels; the other one is for output channels.
    """

    input_dim: int = 1

    @abstractmethod
    def shared(self, x: Tensor, weight: Tensor) -> Tensor:
        """Apply one weight ``(d0, d1, *rest)`` to all rows of ``x``."""

    @abstractmethod
    def each(self, x: Tensor, weights: Tensor) -> Tensor:
        """Apply ``weights[i]``, of ``(n, d0, d1, *rest)``, to row ``i`` of ``x``."""

    @abstractmethod
    def scale_input(self, x: Tensor, v: Tensor) -> Tensor:
        """Multiply the input channels of row ``i`` by ``v[i]``, ``(n, size of the weight's input dimension)``."""

    @abstractmethod
    def scale_output(self, y: Tensor, v: Tensor) -> Tensor:
        """Multiply the output channels of row ``i`` by ``v[i]``, ``(n, size of the weight's output dimension)``."""

    @abstractmethod
    def outer(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """Apply outer products of ``left`` (n, d0) and ``right`` (n, d1, *rest), as weights, to the rows of ``x``."""


@dataclass(frozen=True)
class _OverSpace(Operation):
    """Base class of convolutions over ``(n, [B,] C, *space)`` with ``len(stride)`` spatial dimensions."""

    stride: tuple[int, ...]
    groups: int
    dilation: tuple[int, ...]

    @property
    def dims(self) -> int:
        """Number of spatial dimensions."""
        return len(self.stride)

    @abstractmethod
    def _convolve(self, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        """Convolve ``(B, C, *space)`` with one weight."""

    @override
    def shared(self, x: Tensor, weight: Tensor) -> Tensor:
        return _folded(x, self.dims + 1, lambda flat: self._convolve(flat, weight, self.groups))

    @override
    def each(self, x: Tensor, weights: Tensor) -> Tensor:
        n = len(weights)
        return _members_as_groups(
            x, self.dims + 1, lambda wide: self._convolve(wide, weights.flatten(0, 1), n * self.groups)
        )


@dataclass(frozen=True)
class Convolution(_OverSpace):
    """A convolution over ``len(stride)`` dimensions: ``(n, [B,] C, *space)``, weight ``(out, in / groups, *kernel)``.

    Attributes:
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv2d``.
    """

    padding: tuple[int, ...] | str

    def _convolve(self, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        convolve = (F.conv1d, F.conv2d, F.conv3d)[self.dims - 1]
        return convolve(x, weight, None, self.stride, self.padding, self.dilation, groups)

    @override
    def scale_input(self, x: Tensor, v: Tensor) -> Tensor:
        return x * over_channels(v.repeat(1, self.groups), x, self.dims)

    @override
    def scale_output(self, y: Tensor, v: Tensor) -> Tensor:
        return y * over_channels(v, y, self.dims)

    @override
    def outer(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        along = self.each(x, right[:, None].expand(-1, self.groups, *right.shape[1:]))  # one channel per group
        return self.scale_output(along.repeat_interleave(left.shape[1] // self.groups, dim=-1 - self.dims), left)


@dataclass(frozen=True)
class TransposedConvolution(_OverSpace):
    """A transposed convolution: ``(n, [B,] C, *space)``, weight ``(in, out / groups, *kernel)``.

    Attributes:
        stride, padding, output_padding, groups, dilation: as in ``torch.nn.functional.conv_transpose2d``.
    """

    padding: tuple[int, ...]
    output_padding: tuple[int, ...]

    input_dim = 0

    def _convolve(self, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[self.dims - 1]
        return convolve(x, weight, None, self.stride, self.padding, self.output_padding, groups, self.dilation)

    @override
    def scale_input(self, x: Tensor, v: Tensor) -> Tensor:
        return x * over_channels(v, x, self.dims)

    @override
    def scale_output(self, y: Tensor, v: Tensor) -> Tensor:
        return y * over_channels(v.repeat(1, self.groups), y, self.dims)

    @override
    def outer(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        channels = -1 - self.dims
        along = self.scale_input(x, left).unflatten(channels, (self.groups, -1)).sum(channels)  # one channel per group
        return self.each(along, right[:, None].expand(-1, self.groups, *right.shape[1:]))


@dataclass(frozen=True)
class Bilinear(Operation):
    """``y = x W other``, with ``x`` ``(n, ..., in1)``, weight ``(out, in1, in2)`` and ``other`` ``(n, ..., in2)``."""

    other: Tensor

    @override
    def shared(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.bilinear(x, self.other, weight)

    @override
    def each(self, x: Tensor, weights: Tensor) -> Tensor:
        return torch.einsum("n...i,noij,n...j->n...o", x, weights, self.other)

    @override
    def scale_input(self, x: Tensor, v: Tensor) -> Tensor:
        return x * over_channels(v, x, 0)

    @override
    def scale_output(self, y: Tensor, v: Tensor) -> Tensor:
        return y * over_channels(v, y, 0)

    @override
    def outer(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        along = torch.einsum("n...i,nij,n...j->n...", x, right, self.other)
        return along[..., None] * over_channels(left, x, 0)


def over_channels(v: Tensor, like: Tensor, dims: int) -> Tensor:
    """Reshape ``(n, C)`` to broadcast over ``like``, ``(n, ..., C, *space)`` with ``dims`` spatial dimensions."""
    return v.view(len(v), *(1,) * (like.ndim - 2 - dims), v.shape[1], *(1,) * dims)


def _folded(x: Tensor, kept: int, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply ``function`` with all but the last ``kept`` dimensions folded into one."""
    lead = x.shape[: x.ndim - kept]
    return function(x.reshape(-1, *x.shape[x.ndim - kept :])).unflatten(0, lead)


def _members_as_groups(x: Tensor, kept: int, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply ``function`` to ``(n, [B,] C, *space)`` reshaped to ``(B, n C, *space)``, and reshape the result back."""
    n, single = len(x), x.ndim == kept + 1
    batched = x[:, None] if single else x
    wide = function(batched.transpose(0, 1).flatten(1, 2))
    y = wide.unflatten(1, (n, -1)).transpose(0, 1)
    return y[:, 0] if single else y
