"""Policy networks: plain ``nn.Module`` classes.

Letters: ``n`` rows, ``O`` observation size, ``A`` action size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from es_flipout.errors import UserError
from es_flipout.kernels import Activation


def tanh(x: Tensor) -> Tensor:
    """Compute tanh; on the CPU, in float32 and without gradients by NumPy, five times as fast and about as accurate.

    Neither NumPy's nor torch's result depends on a number's memory alignment, unlike some of torch's activations.
    """
    exported = torch.jit.is_tracing() or torch.compiler.is_exporting()  # pyright: ignore[reportPrivateImportUsage]
    traced = exported or is_in_torch_dispatch_mode()  # which records operations of torch only
    if torch.is_grad_enabled() or traced or x.dtype != torch.float32 or x.device.type != "cpu":
        return torch.tanh(x)
    try:
        values = x.numpy()
    except RuntimeError:  # inside torch.func transforms such as vmap, a tensor has no storage
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
    """Return the name of an activation of :class:`MLP`."""
    return next(name for name, known in _ACTIVATIONS.items() if known is function)


class MLP(nn.Module):
    """A fully connected network, ``(n, O)`` to ``(n, A)``.

    Weights are initialized orthogonally with unit gain, and biases with zeros. The last layer is scaled by
    ``output_gain``, so that actions of the untrained policy are close to the middle of the action space.
    """

    row_wise = True  # row i of the input only affects row i of the output

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
        """Compute the input of :class:`~es_flipout.policies.ActionMap`: an action, or one score per discrete action."""
        *hidden, last = self.layers
        for layer in hidden:
            x = self.activation(layer(x))
        return last(x)


class Recurrent(nn.Module):
    """A policy with memory: recurrent layers and a linear one; ``(n, O)`` and a state to ``(n, A)`` and the next state.

    The state is a single tensor, ``(n, state_size)``, zero at the start of an episode: the concatenated states of all
    layers (for an LSTM layer its output, then its cell).

    Attributes:
        state_size: size of the state.
    """

    row_wise = True  # row i of the input only affects row i of the output

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
        """Compute the network output and the next state."""
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
    """Return a policy's state at the start of an episode, ``(rows, state_size)``; None for a policy without memory."""
    size = getattr(module, "state_size", None)
    return None if size is None else torch.zeros(rows, size, device=device)


class ConvNet(nn.Module):
    """A policy for images: convolutions with stride 2, then fully connected layers; ``(n, O)`` to ``(n, A)``.

    Images arrive as flat rows of ``O`` numbers and are reshaped here. Of three dimensions, the smaller of the first and
    the last is interpreted as channels (they come last in Gymnasium's images, and first in its stacks of frames).
    """

    row_wise = True  # row i of the input only affects row i of the output

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
        """Compute the input of :class:`~es_flipout.policies.ActionMap`: an action, or one score per discrete action."""
        x = x.unflatten(-1, self._image_shape)
        if len(self._image_shape) == 2:
            x = x.unsqueeze(-3)
        elif self._channels_last:
            x = x.movedim(-1, -3)
        for layer in self.convolutions:
            x = self.activation(layer(x))
        return self.head(x.flatten(-3))


class Linear(nn.Module):
    """A linear policy, initialized with zeros, ``(n, O)`` to ``(n, A)`` (as in ARS, Mania et al. 2018)."""

    row_wise = True  # row i of the input only affects row i of the output

    def __init__(self, obs_dim: int, action_dim: int, bias: bool = True) -> None:
        super().__init__()
        self.layer = nn.Linear(obs_dim, action_dim, bias=bias)
        nn.init.zeros_(self.layer.weight)
        if bias:
            nn.init.zeros_(self.layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the input of :class:`~es_flipout.policies.ActionMap`: an action, or one score per discrete action."""
        return self.layer(x)
