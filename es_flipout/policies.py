"""Policies: plain ``nn.Module`` networks, and how their outputs become actions of a Gymnasium space.

Letters: ``n`` rows, ``O`` observation size, ``A`` action size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

from es_flipout.errors import UserError
from es_flipout.kernels import Activation


def tanh(x: Tensor) -> Tensor:
    """``torch.tanh``; on the CPU in float32, where no gradient is wanted, NumPy's: five times as fast, and about as exact.

    Neither depends on where in memory a number lies, unlike some of torch's activations.
    """
    traced = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    if torch.is_grad_enabled() or traced or x.dtype != torch.float32 or x.device.type != "cpu":
        return torch.tanh(x)
    try:
        values = x.numpy()
    except RuntimeError:  # inside torch.func.vmap and the like a tensor has no memory of its own
        return torch.tanh(x)
    return torch.from_numpy(np.tanh(values, out=np.empty_like(values)))


_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "tanh": tanh,
    "relu": torch.relu,
    "elu": nn.functional.elu,
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
}


def activation_name(function: Callable[[Tensor], Tensor]) -> Activation:
    """The name under which :class:`MLP` knows an activation."""
    return next(name for name, known in _ACTIVATIONS.items() if known is function)


class MLP(nn.Module):
    """A fully connected network, ``(n, O)`` to ``(n, A)``.

    Weights start with orthogonal rows or columns of unit gain and biases at zero; the last layer is scaled down by
    ``output_gain``, so that the untrained policy acts close to the middle of the action space.
    """

    row_wise = True  # row i of the input only touches row i of the output

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        hidden: Sequence[int] = (64, 64),
        activation: Literal["tanh", "relu", "elu", "silu", "gelu"] = "tanh",
        output_gain: float = 0.1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise UserError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
        sizes = [obs_dim, *hidden, action_dim]
        self.activation = _ACTIVATIONS[activation]
        layers = [nn.Linear(size_in, size_out) for size_in, size_out in pairwise(sizes)]
        for layer in layers:
            gain = output_gain if layer is layers[-1] else 1.0
            nn.init.orthogonal_(layer.weight, gain=gain, generator=generator)
            nn.init.zeros_(layer.bias)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Network output (an action before :class:`ActionMap`, or one score for each discrete action)."""
        *hidden, last = self.layers
        for layer in hidden:
            x = self.activation(layer(x))
        return last(x)


class Recurrent(nn.Module):
    """A policy with memory: recurrent layers, then a linear one; ``(n, O)`` and its state to ``(n, A)`` and the next state.

    The state is one tensor, ``(n, state_size)``, zero at the start of an episode: what every layer remembers (of an LSTM layer
    its output, then its cell), one layer after the other.

    Attributes:
        state_size: numbers in the state.
    """

    row_wise = True  # row i of the input only touches row i of the output

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        hidden: Sequence[int] = (32,),
        cell: Literal["gru", "lstm"] = "gru",
        output_gain: float = 0.1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if cell not in _CELLS:
            raise UserError(f"cell must be one of {', '.join(_CELLS)}, got {cell!r}")
        if not hidden:
            raise UserError("a recurrent policy needs at least one hidden size")
        cells = [_CELLS[cell](size_in, size_out) for size_in, size_out in pairwise([obs_dim, *hidden])]
        for layer in cells:
            for weight in (layer.weight_ih, layer.weight_hh):
                for gate in weight.data.split(layer.hidden_size):
                    nn.init.orthogonal_(gate, generator=generator)
            nn.init.zeros_(layer.bias_ih)
            nn.init.zeros_(layer.bias_hh)
        self.cells = nn.ModuleList(cells)
        self.output = nn.Linear(hidden[-1], action_dim)
        nn.init.orthogonal_(self.output.weight, gain=output_gain, generator=generator)
        nn.init.zeros_(self.output.bias)
        self._is_lstm = cell == "lstm"
        self._sizes = [size for size in hidden for _ in range(2 if self._is_lstm else 1)]
        self.state_size = sum(self._sizes)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Network output and the next state."""
        parts = list(state.split(self._sizes, -1))
        after: list[Tensor] = []
        for layer in self.cells:
            if self._is_lstm:
                x, c = layer(x, (parts.pop(0), parts.pop(0)))
                after += [x, c]
            else:
                x = layer(x, parts.pop(0))
                after.append(x)
        return self.output(x), torch.cat(after, -1) if len(after) > 1 else after[0]


_CELLS: dict[str, type[nn.GRUCell] | type[nn.LSTMCell]] = {"gru": nn.GRUCell, "lstm": nn.LSTMCell}


def initial_state(module: nn.Module, rows: int, device: torch.device) -> Tensor | None:
    """The state of a recurrent policy at the start of an episode, ``(rows, state_size)``; None for one without memory."""
    size = getattr(module, "state_size", None)
    return None if size is None else torch.zeros(rows, size, device=device)


class ConvNet(nn.Module):
    """A policy for images: convolutions with stride 2, then fully connected layers; ``(n, O)`` to ``(n, A)``.

    Images come as flat rows of ``O`` numbers and get their shape back here. Of three dimensions the smallest of the first and
    the last is taken for the channels (Gymnasium's images have them last, its stacks of frames first).
    """

    row_wise = True  # row i of the input only touches row i of the output

    def __init__(
        self,
        image_shape: Sequence[int],
        action_dim: int,
        channels: Sequence[int] = (16, 32),
        hidden: Sequence[int] = (64,),
        activation: Literal["tanh", "relu", "elu", "silu", "gelu"] = "relu",
        output_gain: float = 0.1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if len(image_shape) not in (2, 3):
            raise UserError(f"a ConvNet needs observations of shape (H, W) or (H, W, C), got {tuple(image_shape)}")
        if not channels:
            raise UserError("a ConvNet needs at least one number of channels")
        self._image_shape = tuple(image_shape)
        self._channels_last = len(image_shape) == 3 and image_shape[2] <= image_shape[0]
        if len(image_shape) == 2:
            sizes, space = [1, *channels], list(image_shape)
        elif self._channels_last:
            sizes, space = [image_shape[2], *channels], list(image_shape[:2])
        else:
            sizes, space = [image_shape[0], *channels], list(image_shape[1:])
        convolutions = [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1) for c_in, c_out in pairwise(sizes)]
        for layer in convolutions:
            nn.init.orthogonal_(layer.weight, gain=2**0.5, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
            space = [(length + 1) // 2 for length in space]
        self.activation = _ACTIVATIONS[activation]
        self.convolutions = nn.ModuleList(convolutions)
        self.head = MLP(channels[-1] * space[0] * space[1], action_dim, hidden, activation, output_gain, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Network output (an action before :class:`ActionMap`, or one score for each discrete action)."""
        x = x.unflatten(-1, self._image_shape)
        if len(self._image_shape) == 2:
            x = x.unsqueeze(-3)
        elif self._channels_last:
            x = x.movedim(-1, -3)
        for layer in self.convolutions:
            x = self.activation(layer(x))
        return self.head(x.flatten(-3))


class Linear(nn.Module):
    """A linear policy that starts at zero, ``(n, O)`` to ``(n, A)`` (as in ARS, Mania et al. 2018)."""

    row_wise = True  # row i of the input only touches row i of the output

    def __init__(self, obs_dim: int, action_dim: int, bias: bool = True) -> None:
        super().__init__()
        self.layer = nn.Linear(obs_dim, action_dim, bias=bias)
        nn.init.zeros_(self.layer.weight)
        if bias:
            nn.init.zeros_(self.layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Network output (an action before :class:`ActionMap`, or one score for each discrete action)."""
        return self.layer(x)


class ActionMap:
    """Turns network outputs into actions of a space.

    ``Discrete``: the action with the largest output. ``Box``: an output of -1 is the lower and +1 the upper bound of the
    action, 0 the middle; ``clip`` cuts what lies outside, ``tanh`` squashes it. An entry with an infinite bound takes the
    output as it is, cut at the other bound.

    Attributes:
        size: outputs that the network must have.
    """

    def __init__(self, space: gymnasium.Space, squash: Literal["clip", "tanh"] = "clip") -> None:
        self.space = space
        self.squash = squash
        if isinstance(space, gymnasium.spaces.Discrete):
            self.size = int(space.n)
            self.start = int(space.start)
        elif isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 1:
            self.size = space.shape[0]
            low = torch.as_tensor(space.low, dtype=torch.float32)
            high = torch.as_tensor(space.high, dtype=torch.float32)
            self.bounded = torch.isfinite(low) & torch.isfinite(high)
            self.low, self.high = low, high
            self.middle = torch.where(self.bounded, (low + high) / 2, 0)
            self.half_range = torch.where(self.bounded, (high - low) / 2, 1)
            self.is_unit = bool((low == -1).all() and (high == 1).all())
        else:
            raise UserError(f"the action space {space} is not supported; supported: Discrete and one-dimensional Box")

    def to(self, device: torch.device) -> ActionMap:
        """Move the bounds to a device; returns itself."""
        if not isinstance(self.space, gymnasium.spaces.Discrete):
            for name in ("bounded", "low", "high", "middle", "half_range"):
                setattr(self, name, getattr(self, name).to(device))
        return self

    def __call__(self, output: Tensor) -> Tensor:
        """``(n, size)`` outputs to ``(n,)`` int64 (Discrete) or ``(n, A)`` floating point (Box) actions."""
        if isinstance(self.space, gymnasium.spaces.Discrete):
            return output.argmax(-1) + self.start
        action = output.clamp(-1, 1) if self.squash == "clip" else output.tanh()
        if self.is_unit:
            return action
        action = torch.where(self.bounded, self.middle + self.half_range * action, output)
        return action.clamp(self.low, self.high)  # also where rounding left the space


def check_observation_space(space: gymnasium.Space) -> int:
    """The observation size ``O`` of a one-dimensional ``Box``.

    Raises:
        UserError: any other space.
    """
    if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
        raise UserError(f"the observation space {space} is not supported; supported: one-dimensional Box")
    return space.shape[0]
