"""Conversion, KL divergence, generators, state dicts and errors of es_flipout.nn."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import es_flipout as esf
from es_flipout.nn import (
    AdditiveGaussian,
    DropConnect,
    FlipoutConv2d,
    FlipoutGRU,
    FlipoutLinear,
    FlipoutLSTM,
    MultiplicativeGaussian,
    NoisyLayer,
    flipout,
    kl_divergence,
)

NOISE = MultiplicativeGaussian(0.5)


class Tagger(nn.Module):
    """Several kinds of layers, tied weights, and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Sequential(nn.Conv1d(6, 6, 3, padding=1), nn.GELU())
        self.again = self.conv[0]
        self.lstm = nn.LSTM(6, 6, batch_first=True)
        self.norm = nn.LayerNorm([5, 6])
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.again(self.conv(self.embed(tokens).mT)).mT
        return self.head(self.norm(self.lstm(x)[0]))


def test_conversion_keeps_the_weights_and_their_ties() -> None:
    model = Tagger().eval()
    tokens = torch.randint(11, (3, 5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    noisy = flipout(model, NOISE)
    assert isinstance(noisy, Tagger)
    assert type(model.lstm) is nn.LSTM  # the original is not changed
    assert type(noisy.lstm) is FlipoutLSTM
    assert noisy.again is noisy.conv[0]
    assert noisy.head.weight is noisy.embed.weight
    assert len(list(noisy.parameters())) == len(list(model.parameters()))
    assert not noisy.head.training
    torch.testing.assert_close(noisy(tokens), model(tokens), rtol=0, atol=0)
    noisy.train()
    assert not torch.equal(noisy(tokens), noisy(tokens))
    with torch.no_grad():
        noisy.head.weight.zero_()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    model.load_state_dict(noisy.state_dict())
    noisy.load_state_dict(before)
    noisy(tokens).sum().backward()
    assert all(parameter.grad is not None for parameter in noisy.parameters())


def test_conversion_of_a_single_layer_and_its_hooks() -> None:
    layer = nn.Linear(2, 3)
    calls: list[int] = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    noisy = flipout(layer, AdditiveGaussian())
    assert type(noisy) is FlipoutLinear
    noisy(torch.randn(4, 2))
    assert calls == [1]
    assert set(dict(noisy.named_parameters())) == {"weight", "bias", "weight_rho", "bias_rho"}
    assert set(dict(layer.named_parameters())) == {"weight", "bias"}


def test_keep() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4), nn.PReLU()), nn.LSTM(4, 2))
    noisy = flipout(model, NOISE, keep=["1", nn.LSTM])
    assert [type(layer) for layer in noisy] == [FlipoutLinear, nn.Sequential, nn.LSTM]
    assert type(noisy.get_submodule("1.0")) is nn.Linear
    with pytest.raises(esf.UserError, match="no layer of the module is named head"):
        flipout(model, NOISE, keep=["head"])


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.MultiheadAttention(4, 2), "MultiheadAttention"),
        (nn.ConvTranspose2d(2, 2, 3), "ConvTranspose2d"),
        (nn.LSTMCell(2, 2), "LSTMCell"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), "ParametrizedLinear"),
    ],
)
def test_layers_without_a_twin(layer: nn.Module, name: str) -> None:
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(2, 2), layer)})
    with pytest.raises(esf.UserError, match=rf"no weight noise for body\.1\S* .*({name}|ParametrizationList)"):
        flipout(model, NOISE)
    flipout(model, NOISE, keep=["body.1"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: FlipoutConv2d(2, 2, 3, noise=NOISE, estimator="local_reparameterization"),
            "does not support FlipoutConv2d",
        ),
        (lambda: FlipoutGRU(2, 2, noise=NOISE, estimator="local_reparameterization"), "use estimator='flipout'"),
        (
            lambda: FlipoutLinear(2, 2, noise=DropConnect(), estimator="local_reparameterization"),
            "needs Gaussian noise",
        ),
        (lambda: FlipoutLinear(2, 2, noise=NOISE, estimator=_any("lrt")), "estimator must be one of flipout, shared"),
        (lambda: FlipoutLinear(2, 2, noise=_any("gaussian")), "noise must be an es_flipout.nn.Noise"),
        (lambda: DropConnect(p=0.3), "DropConnect needs p=0.5"),
        (lambda: MultiplicativeGaussian(-1.0), "sigma must be a positive number"),
        (lambda: AdditiveGaussian(initial_scale=0.0), "initial_scale must be"),
        (lambda: kl_divergence(nn.Linear(2, 2)), "needs a layer with AdditiveGaussian"),
        (
            lambda: flipout(nn.Sequential(nn.Linear(2, 2), nn.Conv1d(2, 2, 1)), NOISE, "local_reparameterization"),
            "^1: local reparameterization",
        ),
        (
            lambda: FlipoutLinear(2, 2, noise=NOISE, estimator="local_reparameterization")(torch.ones(3, 4, 2)),
            r"needs an input \(batch, in\), got \(3, 4, 2\)",
        ),
        (
            lambda: FlipoutLinear(2, 2, noise=NOISE, estimator="local_reparameterization").sample(3),
            "draws outputs, not weights",
        ),
        (lambda: FlipoutLSTM(2, 2, noise=NOISE)(torch.ones(3, 4, 5)), r"needs an input \(time, batch, 2\)"),
        (
            lambda: FlipoutLSTM(2, 2, noise=NOISE)(nn.utils.rnn.pack_sequence([torch.ones(3, 2)])),
            "does not support packed sequences in training mode",
        ),
    ],
)
def test_errors(make: Any, message: str) -> None:
    with pytest.raises(esf.UserError, match=message):
        make()


def _any(value: Any) -> Any:
    return value


def test_kl_divergence_is_that_of_torch_and_counts_each_weight_once() -> None:
    noise = AdditiveGaussian(initial_scale=0.2, prior_scale=0.7)
    lstm = FlipoutLSTM(4, 2, noise=noise)
    model = nn.Sequential(FlipoutLinear(3, 4, noise=noise), lstm, nn.Linear(2, 2)).double()
    model.append(model[0])
    expected = torch.zeros((), dtype=torch.float64)
    for layer in list(model)[:2]:
        assert isinstance(layer, NoisyLayer)
        for name in layer._noisy:
            posterior = torch.distributions.Normal(getattr(layer, name), layer.scale(name))
            prior = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 0.7)
            expected = expected + torch.distributions.kl_divergence(posterior, prior).sum()
    kl = kl_divergence(model)
    torch.testing.assert_close(kl, expected)
    kl.backward()
    assert not any(p.grad is None for n, p in model.named_parameters() if not n.startswith("2."))
    x = torch.randn(9, 2, 4, dtype=torch.float64)
    lstm(x)  # nine steps
    torch.testing.assert_close(kl_divergence(model), kl)


def test_initial_scale_and_reset() -> None:
    layer = FlipoutLSTM(2, 3, noise=AdditiveGaussian(initial_scale=0.01), dtype=torch.float64)
    for name in layer._noisy:
        torch.testing.assert_close(layer.scale(name), torch.full_like(layer.scale(name), 0.01))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    layer.reset_parameters()
    torch.testing.assert_close(layer.scale("bias_hh_l0"), torch.full((12,), 0.01, dtype=torch.float64))
    assert layer.state_dict()["weight_hh_l0"].abs().min() > 0


def test_same_generator_seed_same_numbers() -> None:
    x = torch.randn(4, 3)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    outputs = []
    for seed in (1, 1, 2):
        generator = torch.Generator().manual_seed(seed)
        noisy = flipout(model, AdditiveGaussian(), generator=generator)
        assert all(layer.generator is generator for layer in noisy.modules() if isinstance(layer, NoisyLayer))
        torch.randn(3)  # the global state does not matter
        outputs.append(noisy(x))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("noise", [NOISE, AdditiveGaussian(), DropConnect()])
def test_copies_and_pickles(noise: Any) -> None:
    model = flipout(nn.Sequential(nn.Linear(3, 5), nn.Tanh()), noise)
    lstm = flipout(nn.LSTM(3, 4), noise, recurrent_only=True)
    for module in (model, lstm):
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert repr(other) == repr(module)
            assert "noise=" in repr(module)
            torch.manual_seed(1)
            y = module(torch.ones(2, 2, 3))
            torch.manual_seed(1)
            torch.testing.assert_close(other(torch.ones(2, 2, 3)), y, rtol=0, atol=0)


def test_local_reparameterization_of_a_dead_input_has_a_finite_gradient() -> None:
    layer = FlipoutLinear(3, 2, bias=False, noise=NOISE, estimator="local_reparameterization")
    x = torch.zeros(4, 3, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert x.grad.isfinite().all()
    assert layer.weight.grad.isfinite().all()


def test_training_learns_and_learns_the_scale() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 4)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5], [0.0]])
    model = flipout(nn.Linear(4, 1), AdditiveGaussian(initial_scale=0.3))
    optimizer = torch.optim.Adam(model.parameters(), 0.03)
    for _ in range(400):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean() / (2 * 0.1**2) + kl_divergence(model) / len(x)
        loss.backward()
        optimizer.step()
    assert isinstance(model, FlipoutLinear)
    assert (model.eval()(x) - y).square().mean() < 0.01
    assert float(model.scale("weight").detach().max()) < 0.1  # on its way from 0.3 to noise / sqrt(examples)
