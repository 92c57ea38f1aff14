"""``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` with weight noise: one weight sample per sequence, held over time.

Input and hidden matrices have separate signs; all gates share one vector of input signs. The inputs of all time steps
are projected at once, and the loop over time only multiplies hidden states.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import override

from es_flipout.errors import UserError
from es_flipout.nn.layer import Estimator, NoisyLayer, Sample
from es_flipout.nn.linear import noisy_linear
from es_flipout.nn.noise import Noise

States = tuple[Tensor, ...]


class _FlipoutRecurrent(NoisyLayer, nn.RNNBase):
    """Has the same inputs, states and outputs as the twin, except packed sequences.

    ``torch.compile`` skips recurrent layers, including torch.nn's, unless ``torch._dynamo.config.allow_rnn`` is True.

    Args:
        *args: arguments of the twin.
        noise: distribution of the weights.
        estimator: flipout, shared or independent.
        generator: random number generator.
        recurrent_only: only the hidden-to-hidden matrices (and their biases) are noisy, as in the paper's language
            models.
        **kwargs: keyword arguments of the twin.
    """

    hidden_bias_in_cell = False

    def __init__(
        self,
        *args: Any,
        noise: Noise,
        estimator: Estimator = "flipout",
        generator: Generator | None = None,
        recurrent_only: bool = False,
        **kwargs: Any,
    ) -> None:
        self.recurrent_only = recurrent_only  # the constructor calls is_noisy
        super().__init__(*args, noise=noise, estimator=estimator, generator=generator, **kwargs)

    @override
    def is_noisy(self, name: str) -> bool:
        return super().is_noisy(name) and ("_hh_" in name or not self.recurrent_only)

    @abstractmethod
    def cell(self, x: Tensor, hidden: Tensor, states: States) -> States:
        """Compute new states from the projected input and hidden state, ``(n, gates * hidden)``, and the old states."""

    def state_sizes(self) -> tuple[int, ...]:
        """Return the sizes of the hidden state and of any other state of the layer."""
        return (self.proj_size or self.hidden_size,)

    @override
    def forward(self, input: Any, hx: Any = None, sample: Sample | None = None) -> Any:
        if not self.training and sample is None:
            return super().forward(input, hx)  # type: ignore[misc]  # of the twin
        if isinstance(input, PackedSequence):
            raise UserError(
                f"{type(self).__name__} does not support packed sequences in training mode: pad them and mask the loss"
            )
        if input.ndim not in (2, 3) or input.shape[-1] != self.input_size:
            raise UserError(
                f"{type(self).__name__} needs an input (time, batch, {self.input_size}), or (batch, time, ...) with "
                f"batch_first, or (time, {self.input_size}), got {tuple(input.shape)}"
            )
        batched = input.ndim == 3
        x = input if batched and self.batch_first else input.transpose(0, 1) if batched else input[None]
        states = self._initial_states(hx, x, batched)
        sample = self.sample(x.shape[0]) if sample is None else sample
        x, last = self._layers(x, states, sample)
        if not batched:
            x, last = x[0], tuple(state[:, 0] for state in last)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x, last if len(self.state_sizes()) > 1 else last[0]

    def _initial_states(self, hx: Any, x: Tensor, batched: bool) -> States:
        """Return the states as ``(layers * directions, n, size)`` each."""
        rows = self.num_layers * (2 if self.bidirectional else 1)
        sizes = self.state_sizes()
        if hx is None:
            return tuple(x.new_zeros(rows, x.shape[0], size) for size in sizes)
        states = tuple(hx) if len(sizes) > 1 else (hx,)
        expected = [(rows, x.shape[0], size) if batched else (rows, size) for size in sizes]
        if [tuple(state.shape) for state in states] != expected:
            raise UserError(
                f"the state of {type(self).__name__} must have shape {' and '.join(map(str, expected))}, "
                f"got {' and '.join(str(tuple(state.shape)) for state in states)}"
            )
        return states if batched else tuple(state[:, None] for state in states)

    def _layers(self, x: Tensor, states: States, sample: Sample) -> tuple[Tensor, States]:
        """Apply all layers to ``x (n, time, in)``."""
        directions = ("", "_reverse") if self.bidirectional else ("",)
        last: list[States] = []
        for layer in range(self.num_layers):
            if layer and self.dropout:
                keep = torch.empty_like(x).bernoulli_(1 - self.dropout, generator=self.generator)
                x = x * keep / (1 - self.dropout)
            outputs = []
            for suffix in directions:
                start = tuple(state[len(last)] for state in states)
                output, end = self._over_time(x, start, sample, f"l{layer}{suffix}")
                outputs.append(output)
                last.append(end)
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return x, tuple(torch.stack(rows) for rows in zip(*last, strict=True))

    def _over_time(self, x: Tensor, states: States, sample: Sample, name: str) -> tuple[Tensor, States]:
        projected = noisy_linear(x, sample[f"weight_ih_{name}"], sample.get(f"bias_ih_{name}"))
        hidden_weight, hidden_bias = sample[f"weight_hh_{name}"], sample.get(f"bias_hh_{name}")
        if hidden_bias is not None and not self.hidden_bias_in_cell:
            projected, hidden_bias = hidden_bias.added(projected, -1), None
        projection = sample.get(f"weight_hr_{name}")
        states = tuple(state.to(projected.dtype) for state in states)  # like cuDNN under autocast
        steps = projected.unbind(1)
        outputs = []
        for step in reversed(steps) if name.endswith("_reverse") else steps:
            states = self.cell(step, noisy_linear(states[0], hidden_weight, hidden_bias), states)
            if projection is not None:
                states = (noisy_linear(states[0], projection, None), *states[1:])
            outputs.append(states[0])
        if name.endswith("_reverse"):
            outputs.reverse()
        return torch.stack(outputs, 1), states


class FlipoutLSTM(_FlipoutRecurrent, nn.LSTM):
    """Long short-term memory; ``(output, (h, c))`` as ``nn.LSTM``."""

    @override
    def state_sizes(self) -> tuple[int, ...]:
        return (*super().state_sizes(), self.hidden_size)

    @override
    def cell(self, x: Tensor, hidden: Tensor, states: States) -> States:
        i, f, g, o = (x + hidden).chunk(4, -1)
        c = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class FlipoutGRU(_FlipoutRecurrent, nn.GRU):
    """Gated recurrent unit; ``(output, h)`` as ``nn.GRU``."""

    hidden_bias_in_cell = True

    @override
    def cell(self, x: Tensor, hidden: Tensor, states: States) -> States:
        r, z, n = x.chunk(3, -1)
        hidden_r, hidden_z, hidden_n = hidden.chunk(3, -1)
        z = (z + hidden_z).sigmoid()
        n = (n + (r + hidden_r).sigmoid() * hidden_n).tanh()
        return (n + z * (states[0] - n),)


class FlipoutRNN(_FlipoutRecurrent, nn.RNN):
    """Elman network with tanh or ReLU; ``(output, h)`` as ``nn.RNN``."""

    @override
    def cell(self, x: Tensor, hidden: Tensor, states: States) -> States:
        y = x + hidden
        return (y.relu() if self.nonlinearity == "relu" else y.tanh(),)
