"""Every layer, noise and estimator, compared with the torch.nn twin with the dense weights of each example."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from es_flipout import UserError
from es_flipout.nn import (
    AdditiveGaussian,
    DropConnect,
    Estimator,
    FlipoutConv1d,
    FlipoutConv2d,
    FlipoutConv3d,
    FlipoutGRU,
    FlipoutLinear,
    FlipoutLSTM,
    FlipoutRNN,
    MultiplicativeGaussian,
    Noise,
    NoisyLayer,
    example_parameters,
)
from es_flipout.nn.convert import TWINS

TWIN_OF = {flipout: twin for twin, flipout in TWINS.items()}
NOISES: dict[str, Noise] = {
    "additive": AdditiveGaussian(initial_scale=0.3),
    "multiplicative": MultiplicativeGaussian(sigma=0.7),
    "dropconnect": DropConnect(),
}
ESTIMATORS: tuple[Estimator, ...] = ("flipout", "shared", "independent")


@dataclass(frozen=True)
class Case:
    kind: type[NoisyLayer]
    arguments: dict[str, Any]
    shape: tuple[int, ...]
    batch_dim: int = 0

    def make(self, noise: Noise, estimator: Estimator = "flipout", **extra: Any) -> NoisyLayer:
        generator = torch.Generator().manual_seed(1)
        return self.kind(
            **self.arguments, dtype=torch.float64, noise=noise, estimator=estimator, generator=generator, **extra
        )

    def twin(self) -> nn.Module:
        return TWIN_OF[self.kind](**self.arguments, dtype=torch.float64)

    def input(self) -> Tensor:
        return torch.randn(self.shape, dtype=torch.float64)


LSTM_CASES = {
    "lstm": Case(FlipoutLSTM, {"input_size": 3, "hidden_size": 4}, (6, 5, 3), 1),
    "lstm-deep": Case(
        FlipoutLSTM,
        {"input_size": 3, "hidden_size": 4, "num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False},
        (5, 6, 3),
    ),
    "lstm-projected": Case(
        FlipoutLSTM, {"input_size": 3, "hidden_size": 4, "proj_size": 2, "num_layers": 2}, (6, 5, 3), 1
    ),
    "gru": Case(FlipoutGRU, {"input_size": 3, "hidden_size": 4, "num_layers": 2, "bidirectional": True}, (6, 5, 3), 1),
    "gru-first": Case(FlipoutGRU, {"input_size": 3, "hidden_size": 4, "batch_first": True}, (5, 6, 3)),
    "rnn": Case(FlipoutRNN, {"input_size": 3, "hidden_size": 4}, (6, 5, 3), 1),
    "rnn-relu": Case(FlipoutRNN, {"input_size": 3, "hidden_size": 4, "nonlinearity": "relu"}, (6, 5, 3), 1),
}
CASES = {
    "linear": Case(FlipoutLinear, {"in_features": 3, "out_features": 4}, (5, 3)),
    "linear-time": Case(FlipoutLinear, {"in_features": 3, "out_features": 4}, (5, 7, 3)),
    "linear-deep": Case(FlipoutLinear, {"in_features": 3, "out_features": 1, "bias": False}, (5, 2, 2, 3)),
    "conv1d": Case(FlipoutConv1d, {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "groups": 2}, (5, 4, 8)),
    "conv2d": Case(
        FlipoutConv2d, {"in_channels": 2, "out_channels": 3, "kernel_size": 3, "padding": "same"}, (5, 2, 6, 5)
    ),
    "conv2d-depthwise": Case(
        FlipoutConv2d,
        {
            "in_channels": 4,
            "out_channels": 8,
            "kernel_size": (3, 2),
            "groups": 4,
            "stride": 2,
            "padding": 1,
            "dilation": (1, 2),
        },
        (5, 4, 6, 7),
    ),
    "conv2d-circular": Case(
        FlipoutConv2d,
        {
            "in_channels": 2,
            "out_channels": 3,
            "kernel_size": 3,
            "padding": 1,
            "padding_mode": "circular",
            "bias": False,
        },
        (5, 2, 6, 5),
    ),
    "conv3d": Case(FlipoutConv3d, {"in_channels": 2, "out_channels": 3, "kernel_size": 2}, (5, 2, 3, 4, 3)),
    **LSTM_CASES,
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
each_noise = pytest.mark.parametrize("noise", NOISES.values(), ids=list(NOISES))
each_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)


def output(y: Any) -> Tensor:
    """Return the output tensor of a layer (for recurrent layers, the outputs without the final states)."""
    return y[0] if isinstance(y, tuple) else y


@each_case
@each_noise
@each_estimator
def test_each_example_has_the_dense_layer_of_its_sample(case: Case, noise: Noise, estimator: Estimator) -> None:
    layer, twin, x = case.make(noise, estimator), case.twin(), case.input()
    sample = layer.sample(5)
    y = layer(x, sample=sample)
    for n in range(5):
        own = x.narrow(case.batch_dim, n, 1)
        expected = functional_call(twin, example_parameters(sample, n), own)
        torch.testing.assert_close(output(y).narrow(case.batch_dim, n, 1), output(expected), rtol=1e-10, atol=1e-12)
        if isinstance(y, tuple):
            last = y[1] if isinstance(y[1], tuple) else (y[1],)
            other = expected[1] if isinstance(expected[1], tuple) else (expected[1],)
            for a, b in zip(last, other, strict=True):
                torch.testing.assert_close(a[:, n : n + 1], b, rtol=1e-10, atol=1e-12)


@each_case
@each_noise
@each_estimator
def test_gradient_of_each_example_is_that_of_its_dense_layer(case: Case, noise: Noise, estimator: Estimator) -> None:
    layer, twin = case.make(noise, estimator), case.twin()
    x = case.input().requires_grad_()
    sample = layer.sample(5)
    y = output(layer(x, sample=sample))
    slope = torch.randn_like(y)
    loss = (y.tanh() * slope).movedim(case.batch_dim, 0).flatten(1).sum(1)
    parameters = dict(layer.named_parameters())
    means = [name for name in parameters if not name.endswith("_rho")]
    for n in (0, 3):
        grads = dict(
            zip(parameters, torch.autograd.grad(loss[n], [*parameters.values()], retain_graph=True), strict=True)
        )
        (grad_x,) = torch.autograd.grad(loss[n], x, retain_graph=True)
        dense = {name: value.detach().requires_grad_() for name, value in example_parameters(sample, n).items()}
        own = x.detach().narrow(case.batch_dim, n, 1).requires_grad_()
        dense_y = output(functional_call(twin, dense, own))
        (dense_y.tanh() * slope.narrow(case.batch_dim, n, 1)).sum().backward()
        torch.testing.assert_close(grad_x.narrow(case.batch_dim, n, 1), own.grad, rtol=1e-9, atol=1e-11)
        for name in means:
            mean, weight = parameters[name].detach(), dense[name].detach()
            to_dense = dense[name].grad
            assert to_dense is not None
            proportional = not isinstance(noise, AdditiveGaussian) and name in layer._noisy
            factor = weight / mean if proportional else torch.ones_like(mean)
            torch.testing.assert_close(grads[name], to_dense * factor, rtol=1e-8, atol=1e-10)
            if isinstance(noise, AdditiveGaussian):
                rho = parameters[f"{name}_rho"].detach()
                unit = (weight - mean) / F.softplus(rho)
                expected = to_dense * unit * rho.sigmoid()
                torch.testing.assert_close(grads[f"{name}_rho"], expected, rtol=1e-8, atol=1e-10)


@settings(max_examples=40)
@given(
    n=st.integers(1, 6),
    middle=st.sampled_from([(), (1,), (4,), (2, 3)]),
    sizes=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    bias=st.booleans(),
    noise=st.sampled_from(list(NOISES.values())),
    estimator=st.sampled_from(ESTIMATORS),
)
def test_linear_of_any_shape(
    n: int, middle: tuple[int, ...], sizes: tuple[int, int], bias: bool, noise: Noise, estimator: Estimator
) -> None:
    layer = FlipoutLinear(*sizes, bias, dtype=torch.float64, noise=noise, estimator=estimator)
    x = torch.randn(n, *middle, sizes[0], dtype=torch.float64)
    sample = layer.sample(n)
    y = layer(x, sample=sample)
    for i in range(n):
        dense = example_parameters(sample, i)
        torch.testing.assert_close(y[i], F.linear(x[i], dense["weight"], dense.get("bias")))


@settings(max_examples=40)
@given(
    n=st.integers(1, 4),
    groups=st.integers(1, 3),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    estimator=st.sampled_from(ESTIMATORS),
)
def test_convolution_of_any_shape(
    n: int,
    groups: int,
    channels: tuple[int, int],
    kernel: tuple[int, int],
    stride: int,
    padding: int,
    mode: Any,
    estimator: Estimator,
) -> None:
    arguments = (groups * channels[0], groups * channels[1], kernel, stride, padding, 1, groups, True, mode)
    layer = FlipoutConv2d(*arguments, dtype=torch.float64, noise=NOISES["additive"], estimator=estimator)
    twin = nn.Conv2d(*arguments, dtype=torch.float64)
    x = torch.randn(n, groups * channels[0], 5, 4, dtype=torch.float64)
    sample = layer.sample(n)
    y = layer(x, sample=sample)
    for i in range(n):
        torch.testing.assert_close(y[i], functional_call(twin, example_parameters(sample, i), x[i]))


@settings(max_examples=25)
@given(
    n=st.integers(1, 4),
    steps=st.integers(1, 5),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    layers=st.integers(1, 2),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
    kind=st.sampled_from([FlipoutLSTM, FlipoutGRU, FlipoutRNN]),
    noise=st.sampled_from(list(NOISES.values())),
)
def test_recurrent_of_any_shape(
    n: int,
    steps: int,
    sizes: tuple[int, int],
    layers: int,
    flags: tuple[bool, bool, bool, bool],
    kind: type[NoisyLayer],
    noise: Noise,
) -> None:
    bias, batch_first, bidirectional, recurrent_only = flags
    arguments: dict[str, Any] = {"bias": bias, "batch_first": batch_first, "bidirectional": bidirectional}
    layer = kind(*sizes, layers, **arguments, dtype=torch.float64, noise=noise, recurrent_only=recurrent_only)
    twin = TWIN_OF[kind](*sizes, layers, **arguments, dtype=torch.float64)
    x = torch.randn((n, steps, sizes[0]) if batch_first else (steps, n, sizes[0]), dtype=torch.float64)
    state = torch.randn(layers * (2 if bidirectional else 1), n, sizes[1], dtype=torch.float64)
    pair = kind is FlipoutLSTM
    sample = layer.sample(n)
    y, _ = layer(x, (state, 2 * state) if pair else state, sample=sample)
    dim = 0 if batch_first else 1
    for i in range(n):
        own = state[:, i : i + 1].contiguous()
        expected, _ = functional_call(
            twin, example_parameters(sample, i), (x.narrow(dim, i, 1), (own, 2 * own) if pair else own)
        )
        torch.testing.assert_close(y.narrow(dim, i, 1), expected)


@each_case
@each_noise
@each_estimator
def test_forward_draws_what_sample_draws(case: Case, noise: Noise, estimator: Estimator) -> None:
    torch.manual_seed(0)
    layer = case.make(noise, estimator)
    torch.manual_seed(0)
    again = case.make(noise, estimator)
    x = case.input()
    sample = again.sample(5)
    assert torch.equal(output(layer(x)), output(again(x, sample=sample)))
    assert not torch.equal(output(layer(x)), output(again(x, sample=sample)))  # the next draw differs


@each_case
@each_noise
def test_eval_is_the_mean_twin(case: Case, noise: Noise) -> None:
    layer, twin, x = case.make(noise).eval(), case.twin(), case.input()
    means = {name: value for name, value in layer.state_dict().items() if not name.endswith("_rho")}
    twin.load_state_dict(means)
    assert torch.equal(output(layer(x)), output(twin(x)))
    missing, unexpected = layer.load_state_dict(twin.state_dict(), strict=False)
    assert not unexpected
    assert all(name.endswith("_rho") for name in missing)
    assert bool(missing) == isinstance(noise, AdditiveGaussian)
    assert list(twin.state_dict()) == list(means)


@each_case
def test_one_example_without_a_batch(case: Case) -> None:
    noise = NOISES["multiplicative"]
    layer = case.make(noise)
    x = case.input().select(case.batch_dim, 0)
    if case.kind is FlipoutLinear and x.ndim > 1:
        return  # (time, in) is a batch for a linear layer
    sample = layer.sample(1)
    y = layer(x, sample=sample)
    expected = functional_call(case.twin(), example_parameters(sample, 0), x)
    torch.testing.assert_close(output(y), output(expected))
    if isinstance(y, tuple):
        torch.testing.assert_close(y[1], expected[1])


@pytest.mark.parametrize("case", LSTM_CASES.values(), ids=list(LSTM_CASES))
def test_initial_state(case: Case) -> None:
    layer, twin, x = case.make(NOISES["additive"]), case.twin(), case.input()
    assert isinstance(layer, nn.RNNBase)
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    states = [torch.randn(rows, 5, size, dtype=torch.float64) for size in layer.state_sizes()]  # type: ignore[operator]
    sample = layer.sample(5)
    y, _ = layer(x, tuple(states) if len(states) > 1 else states[0], sample=sample)
    own = [state[:, 2:3].contiguous() for state in states]
    expected, _ = functional_call(
        twin, example_parameters(sample, 2), (x.narrow(case.batch_dim, 2, 1), tuple(own) if len(own) > 1 else own[0])
    )
    torch.testing.assert_close(y.narrow(case.batch_dim, 2, 1), expected)
    with pytest.raises(UserError, match=r"state of Flipout\w+ must have shape \(\d, 5"):
        layer(x, tuple(s[:, :3] for s in states) if len(states) > 1 else states[0][:, :3])


def test_recurrent_only() -> None:
    for noise in NOISES.values():
        layer = FlipoutLSTM(3, 4, 2, noise=noise, recurrent_only=True)
        sample = layer.sample(5)
        noisy = {name for name, parameter in sample.items() if parameter.delta is not None}
        biases = {"bias_hh_l0", "bias_hh_l1"} if noise.covers_bias else set()
        assert noisy == {"weight_hh_l0", "weight_hh_l1"} | biases


def test_dropout_between_recurrent_layers() -> None:
    x = torch.randn(6, 5, 3)
    layer = FlipoutLSTM(3, 4, 2, dropout=0.5, noise=NOISES["additive"], generator=torch.Generator().manual_seed(0))
    plain = FlipoutLSTM(3, 4, 2, noise=NOISES["additive"])
    plain.load_state_dict(layer.state_dict())
    sample = layer.sample(5)
    outputs = torch.stack([layer(x, sample=sample)[0] for _ in range(400)])
    assert not torch.equal(outputs[0], outputs[1])
    assert (
        len(outputs[:, 0, 0, 0].unique()) == 16
    )  # at the first step: every subset of the four units of the layer below
    state = torch.Generator().manual_seed(0)
    layer.generator = state
    layer.sample(5)
    torch.testing.assert_close(layer(x, sample=sample)[0], outputs[0])
    zeros = torch.zeros(2, 5, 4)
    torch.testing.assert_close(plain(x, (zeros, zeros), sample=sample)[1][0][0], layer(x, sample=sample)[1][0][0])


def test_deep_inner_dimensions_share_the_weights_of_their_example() -> None:
    layer = FlipoutLinear(3, 4, noise=NOISES["additive"])
    x = torch.randn(6, 1, 3).expand(6, 9, 3)
    y = layer(x)
    torch.testing.assert_close(y, y[:, :1].expand_as(y))  # equal inputs at all time steps, so equal outputs
    assert not torch.allclose(layer(x[:1].expand_as(x))[0], layer(x[:1].expand_as(x))[1])


@each_noise
def test_half_precision_and_autocast(noise: Noise) -> None:
    for case, estimator in itertools.product(CASES.values(), ESTIMATORS):
        layer, x = case.make(noise, estimator).float(), case.input().float()
        sample = layer.sample(5)
        exact = output(layer(x, sample=sample))
        with torch.autocast("cpu", torch.bfloat16):
            y = output(layer(x, sample=sample))
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), exact, rtol=0.1, atol=0.15)
        y.float().sum().backward()
        half = layer.to(torch.bfloat16)
        y = output(half(x.bfloat16()))
        assert y.dtype == torch.bfloat16
        assert y.isfinite().all()


@pytest.mark.parametrize("name", ["linear-time", "conv2d-depthwise", "lstm", "gru"])
@pytest.mark.parametrize("estimator", ["flipout", "independent"])
def test_compiles_into_one_graph(name: str, estimator: Estimator) -> None:
    case = CASES[name]
    layer = case.make(NOISES["additive"], estimator)
    layer.generator = None
    # Dynamo skips recurrent layers, including torch.nn's, by default.
    with torch._dynamo.config.patch(allow_rnn=True):  # type: ignore[attr-defined]
        compare_compiled(layer, torch.compile(layer, backend="aot_eager", fullgraph=True), case.input())


def compare_compiled(layer: nn.Module, compiled: Any, x: Tensor) -> None:
    torch.manual_seed(3)
    expected = output(layer(x))
    expected.sum().backward()
    grads = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    layer.zero_grad()
    torch.manual_seed(3)
    y = output(compiled(x))
    y.sum().backward()
    torch.testing.assert_close(y, expected)
    for parameter, grad in zip(layer.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # raised by dynamo at graph breaks
@pytest.mark.parametrize("estimator", [*ESTIMATORS, "local_reparameterization"])
@pytest.mark.parametrize("generator", [None, torch.Generator()], ids=["global", "generator"])
def test_compiles_for_any_batch_size(estimator: Estimator, generator: torch.Generator | None) -> None:
    layer = FlipoutLinear(4, 3, noise=NOISES["additive"], estimator=estimator, generator=generator)
    compiled = torch.compile(layer, backend="eager", fullgraph=generator is None)
    for n in (3, 4, 5):
        y = compiled(torch.randn(n, 4))
        assert y.shape == (n, 3)
        y.sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_recurrent_layers_compile_around() -> None:
    layer = FlipoutGRU(3, 4, noise=NOISES["additive"])
    compiled = torch.compile(nn.Sequential(nn.Linear(2, 3), layer), backend="eager")
    assert compiled(torch.randn(5, 6, 2))[0].shape == (5, 6, 4)
