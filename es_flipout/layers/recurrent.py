"""The population-aware twins of torch's recurrent layers and cells.

A member uses the same weights for the whole sequence. Letters: ``T`` steps, ``B`` sequences per member, ``H`` hidden
size, ``D`` directions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from es_flipout.errors import UserError
from es_flipout.layers.leaf import Leaf

State = tuple[Tensor, ...]  # (h,) or, for an LSTM, (h, c)


class PopulationCell(Leaf):
    """Twin of ``nn.RNNCell``, ``nn.GRUCell`` and ``nn.LSTMCell``."""

    parameter_names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")

    def __init__(self, cell: nn.RNNCell | nn.GRUCell | nn.LSTMCell) -> None:
        super().__init__()
        self._hidden = cell.hidden_size
        self._is_lstm = isinstance(cell, nn.LSTMCell)
        self._step = _step_of(cell, getattr(cell, "nonlinearity", "tanh"))

    def forward(self, x: Tensor, hx: Any = None) -> Any:
        """Map ``(n, [B,] in)`` and state ``(n, [B,] H)`` to the next state; for an LSTM, the state is ``(h, c)``."""
        shape = (*x.shape[:-1], self._hidden)
        state = _checked_state(hx, self._is_lstm, (shape, shape), x, of_member=0 if self.place.token is not None else 1)
        after = self.over_rows(self._forward, x, *state)
        return after if self._is_lstm else after[0]

    def _forward(self, x: Tensor, *state: Tensor) -> State:
        weights = self.place.weights
        projected = weights["weight_ih"].linear(x, self.bias_rows("bias_ih"))
        recurrent = weights["weight_hh"].linear(state[0], self.bias_rows("bias_hh"))
        return self._step(projected, recurrent, state)


class PopulationRecurrent(Leaf):
    """Twin of ``nn.RNN``, ``nn.GRU`` and ``nn.LSTM`` (several layers, both directions, projections)."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self._layers, self._directions = layer.num_layers, 2 if layer.bidirectional else 1
        self._hidden, self._out = layer.hidden_size, layer.proj_size or layer.hidden_size
        self._batch_first, self._dropout = layer.batch_first, layer.dropout
        self._is_lstm = isinstance(layer, nn.LSTM)
        self._step = _step_of(layer, getattr(layer, "nonlinearity", "tanh"))
        self.train(layer.training)

    def flatten_parameters(self) -> None:
        """Do nothing: there is no memory layout to maintain."""

    def forward(self, x: Tensor, hx: Any = None) -> Any:
        """Map ``(T, in)``, ``(T, B, in)`` or ``(B, T, in)`` of each member to the outputs and the final state.

        Raises:
            UserError: the input is a packed sequence.
            ValueError: a state has the wrong shape.
        """
        if isinstance(x, PackedSequence):
            raise UserError("packed sequences are not supported in a population; pad them and mask the outputs")
        stacked = self._layers * self._directions
        examples = () if x.ndim == 2 else (x.shape[0 if self._batch_first else 1],)
        shapes = ((stacked, *examples, self._out), (stacked, *examples, self._hidden))
        output, *after = self.over_rows(self._forward, x, *_checked_state(hx, self._is_lstm, shapes, x))
        return output, tuple(after) if self._is_lstm else after[0]

    def _forward(self, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        single = x.ndim == 3
        if single:
            x, state = x[:, :, None], tuple(s[:, :, None] for s in state)
        elif self._batch_first:
            x = x.transpose(1, 2)
        finals: list[State] = []
        for layer in range(self._layers):
            if layer and self._dropout:
                x = F.dropout(x, self._dropout, self.training)
            outputs = []
            for direction in range(self._directions):
                start = tuple(s[:, layer * self._directions + direction] for s in state)
                output, final = self._scan(x, start, f"_l{layer}" + ("_reverse" if direction else ""), bool(direction))
                outputs.append(output)
                finals.append(final)
            x = torch.cat(outputs, -1)
        after = [torch.stack(parts, 1) for parts in zip(*finals, strict=True)]
        if single:
            return x[:, :, 0], *(a[:, :, 0] for a in after)
        return x.transpose(1, 2) if self._batch_first else x, *after

    def _scan(self, x: Tensor, state: State, suffix: str, backwards: bool) -> tuple[Tensor, State]:
        """Compute one layer in one direction: ``(n, T, B, in)`` and state ``(n, B, H)`` to outputs and final state."""
        weights = self.place.weights
        # The inputs do not depend on the state, so all steps are projected in one product.
        projected = weights[f"weight_ih{suffix}"].linear(x, self.bias_rows(f"bias_ih{suffix}"))
        bias = self.bias_rows(f"bias_hh{suffix}")
        projection = weights.get(f"weight_hr{suffix}")
        steps = range(x.shape[1])
        outputs: list[Tensor] = []
        for t in reversed(steps) if backwards else steps:
            recurrent = weights[f"weight_hh{suffix}"].linear(state[0], bias)
            state = self._step(projected[:, t], recurrent, state)
            if projection is not None:
                state = (projection.linear(state[0]), *state[1:])
            outputs.append(state[0])
        return torch.stack(outputs[::-1] if backwards else outputs, 1), state


def _step_of(layer: nn.Module, nonlinearity: str) -> Callable[[Tensor, Tensor, State], State]:
    """Return the update equations of a layer: projected input, projected state and state to the next state."""
    if isinstance(layer, (nn.LSTM, nn.LSTMCell)):
        return _lstm_step
    if isinstance(layer, (nn.GRU, nn.GRUCell)):
        return _gru_step
    activation = torch.tanh if nonlinearity == "tanh" else torch.relu
    return lambda projected, recurrent, state: (activation(projected + recurrent),)


def _lstm_step(projected: Tensor, recurrent: Tensor, state: State) -> State:
    update, forget, candidate, output = (projected + recurrent).chunk(4, -1)
    cell = forget.sigmoid() * state[1] + update.sigmoid() * candidate.tanh()
    return output.sigmoid() * cell.tanh(), cell


def _gru_step(projected: Tensor, recurrent: Tensor, state: State) -> State:
    (h,) = state
    hidden = h.shape[-1]
    reset, keep = (projected[..., : 2 * hidden] + recurrent[..., : 2 * hidden]).sigmoid_().chunk(2, -1)
    candidate = torch.addcmul(projected[..., 2 * hidden :], reset, recurrent[..., 2 * hidden :]).tanh_()
    return (candidate + keep * (h - candidate),)


def _checked_state(hx: Any, is_lstm: bool, shapes: tuple[tuple[int, ...], ...], x: Tensor, of_member: int = 0) -> State:
    """Return the given state as a tuple, or zeros of the given shapes (of ``h``, then of ``c``).

    In error messages, the shape for one member starts at dimension ``of_member``.
    """
    wanted = shapes[: 2 if is_lstm else 1]
    if hx is None:
        return tuple(x.new_zeros(shape) for shape in wanted)
    state = tuple(hx) if is_lstm else (hx,)
    for name, given, shape in zip(("h", "c"), state, wanted, strict=False):
        if given.shape != shape:
            wanted_shape, given_shape = tuple(shape)[of_member:], tuple(given.shape)[of_member:]
            raise ValueError(
                f"the recurrent state {name} must have shape {wanted_shape} for each member, got {given_shape}"
            )
    return state
