"""Distributions of the weights of examples and pairs, signs, and unbiased gradients, within K standard errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from es_flipout.nn import (
    AdditiveGaussian,
    DropConnect,
    Estimator,
    FlipoutConv2d,
    FlipoutGRU,
    FlipoutLinear,
    FlipoutLSTM,
    MultiplicativeGaussian,
    Noise,
    NoisyLayer,
    ParameterSample,
)
from es_flipout.nn.noise import normals, signs

K = 5.0  # standard errors
DRAWS = 4000
NOISES: dict[str, Noise] = {
    "additive": AdditiveGaussian(initial_scale=0.3),
    "multiplicative": MultiplicativeGaussian(sigma=0.7),
    "dropconnect": DropConnect(),
}
each_noise = pytest.mark.parametrize("noise", NOISES.values(), ids=list(NOISES))
each_estimator = pytest.mark.parametrize("estimator", ["flipout", "shared", "independent"])


def centerd(values: Tensor, expected: Tensor | float) -> None:
    """Check that the mean over the first dimension is ``expected`` within K standard errors."""
    error = values.std(0) / len(values) ** 0.5
    assert ((values.mean(0) - expected).abs() <= K * error + 1e-12).all()


@each_noise
@each_estimator
def test_marginal_distribution_and_independence(noise: Noise, estimator: Estimator) -> None:
    layer = FlipoutLinear(2, 3, dtype=torch.float64, noise=noise, estimator=estimator)
    mean = layer.weight.detach()
    scale = layer.scale("weight").detach().abs()
    with torch.no_grad():
        samples = [layer.sample(2)["weight"] for _ in range(DRAWS)]
        weights = torch.stack([torch.stack([sample.example(n) for n in range(2)]) for sample in samples])
    unit = (weights - mean) / scale  # (draws, example, out, in)
    centerd(weights, mean)
    centerd(unit, 0.0)
    centerd(unit.square(), 1.0)
    centerd(unit**4, 3.0 if noise.gaussian else 1.0)
    flat = unit.flatten(2)
    for n in range(2):  # within an example, independent: no correlation of values or of magnitudes
        for f in (lambda u: u, lambda u: u.square() - 1):
            pairs = f(flat[:, n])[:, :, None] * f(flat[:, n])[:, None, :]
            off = ~torch.eye(6, dtype=torch.bool)
            centerd(pairs[:, off], 0.0)
    if estimator == "shared":
        assert torch.equal(unit[:, 0], unit[:, 1])
    else:
        centerd(flat[:, 0, :, None] * flat[:, 1, None, :], 0.0)  # between examples: no correlation of values
    if estimator == "flipout":
        torch.testing.assert_close(unit[:, 0].abs(), unit[:, 1].abs())
    if not noise.gaussian:
        assert set(
            torch.cat([weights.flatten(1) / (2 * mean.repeat(2, 1).flatten())]).round(decimals=9).unique().tolist()
        ) == {0.0, 1.0}


@each_noise
@each_estimator
def test_biases(noise: Noise, estimator: Estimator) -> None:
    layer = FlipoutLinear(2, 3, dtype=torch.float64, noise=noise, estimator=estimator)
    assert layer.bias is not None
    with torch.no_grad():
        bias = torch.stack(
            [
                torch.stack([sample.example(n) for n in range(2)])
                for sample in (layer.sample(2)["bias"] for _ in range(2000))
            ]
        )
    if not noise.covers_bias:
        assert torch.equal(bias, layer.bias.detach().expand_as(bias))
        return
    unit = (bias - layer.bias.detach()) / layer.scale("bias").detach()
    centerd(unit, 0.0)
    centerd(unit.square(), 1.0)
    if estimator == "shared":
        assert torch.equal(bias[:, 0], bias[:, 1])
    else:
        centerd(unit[:, 0, :, None] * unit[:, 1, None, :], 0.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_signs_are_signs(dtype: torch.dtype) -> None:
    drawn = signs((64, 96), torch.empty(0, dtype=dtype), None)
    assert drawn.dtype == dtype
    assert set(drawn.unique().tolist()) == {-1.0, 1.0}
    wide = drawn.double()
    assert torch.linalg.matrix_rank(wide) == 64
    assert len(drawn.unique(dim=0)) == 64
    assert len(drawn.unique(dim=1).T) == 96
    assert wide.mean().abs() < K / wide.numel() ** 0.5
    assert (wide @ wide.T - 96 * torch.eye(64)).abs().max() < 6 * 96**0.5


@pytest.mark.parametrize(
    "layer",
    [
        FlipoutLinear(40, 48, noise=NOISES["additive"]),
        FlipoutConv2d(40, 48, 3, groups=2, noise=NOISES["dropconnect"]),
        FlipoutLSTM(40, 48, 2, bidirectional=True, noise=NOISES["multiplicative"]),
        FlipoutGRU(40, 48, 1, noise=NOISES["multiplicative"]),
    ],
    ids=["linear", "conv", "lstm", "gru"],
)
def test_every_matrix_has_signs_of_its_own(layer: NoisyLayer) -> None:
    flipped = {name: p for name, p in layer.sample(32).items() if p.r is not None}
    assert set(flipped) == {name for name, p in layer.named_parameters() if p.ndim > 1 and not name.endswith("_rho")}
    vectors: list[Tensor] = []
    for name, parameter in flipped.items():
        assert parameter.r is not None
        assert parameter.s is not None
        assert parameter.delta is not None
        assert parameter.delta.shape == parameter.mean.shape
        assert parameter.r.shape == (32, parameter.mean.shape[0])  # one sign vector over all gates' outputs
        inputs = 40 if isinstance(layer, nn.Conv2d) else parameter.mean.shape[1]
        assert parameter.s.shape == (32, inputs), name
        vectors += [parameter.r, parameter.s]
    for v in vectors:
        assert set(v.unique().tolist()) == {-1.0, 1.0}
        assert torch.linalg.matrix_rank(v) == 32
    for i, a in enumerate(vectors):
        for b in vectors[:i]:
            size = min(a.shape[1], b.shape[1])
            overlap = (a[:, :size] * b[:, :size]).mean()
            assert overlap.abs() < K / (32 * size) ** 0.5


def gradients(layer: NoisyLayer, x: Tensor, target: Tensor, draws: int) -> Tensor:
    """Return mini-batch gradients of ``draws`` independent draws, ``(draws, parameters)``."""
    rows = []
    parameters = list(layer.parameters())
    for _ in range(draws):
        y = layer(x)
        loss = ((y[0] if isinstance(y, tuple) else y).tanh() - target).square().mean()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    return torch.stack(rows)


@each_noise
def test_gradients_are_unbiased(noise: Noise) -> None:
    layer = FlipoutLinear(3, 2, dtype=torch.float64, noise=noise)
    x, target = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    estimators: list[Estimator] = ["flipout", "shared", "independent"]
    if noise.gaussian:
        estimators.append("local_reparameterization")
    drawn = {}
    for estimator in estimators:
        layer.estimator = estimator
        drawn[estimator] = gradients(layer, x, target, 1500)
    reference = drawn.pop("independent")
    for values in drawn.values():
        error = ((values.var(0) + reference.var(0)) / 1500).sqrt()
        assert ((values.mean(0) - reference.mean(0)).abs() <= K * error).all()


def test_recurrent_gradients_are_unbiased() -> None:
    layer = FlipoutLSTM(2, 2, dtype=torch.float64, noise=NOISES["multiplicative"])
    x, target = torch.randn(3, 3, 2, dtype=torch.float64), torch.randn(3, 3, 2, dtype=torch.float64)
    flip = gradients(layer, x, target, 500)
    layer.estimator = "independent"
    own = gradients(layer, x, target, 500)
    assert ((flip.mean(0) - own.mean(0)).abs() <= K * ((flip.var(0) + own.var(0)) / 500).sqrt()).all()


def test_variance_of_a_linear_loss() -> None:
    """For a linear loss, flips cancel all that examples share (gamma = 0), so independent noise is no better."""
    layer = FlipoutLinear(8, 4, False, dtype=torch.float64, noise=MultiplicativeGaussian(1.0))
    x = 1 + torch.randn(256, 8, dtype=torch.float64)
    spread: dict[str, Tensor] = {}
    estimators: tuple[Estimator, ...] = ("flipout", "shared", "independent")
    for estimator in estimators:
        layer.estimator = estimator
        rows = [torch.autograd.grad(layer(x).mean(0).sum(), layer.weight)[0].flatten() for _ in range(500)]
        spread[estimator] = torch.stack(rows).var(0)
    independent = x.square().mean(0).repeat(4) / 256
    for expected, name in (
        (independent, "independent"),
        (independent, "flipout"),
        (x.mean(0).square().repeat(4), "shared"),
    ):
        assert (spread[name].mean() / expected.mean() - 1).abs() < 0.15


@pytest.mark.parametrize("noise", [NOISES["additive"], NOISES["multiplicative"]], ids=["additive", "multiplicative"])
def test_local_reparameterization_has_the_moments_of_the_weights(noise: Noise) -> None:
    layer = FlipoutLinear(3, 2, dtype=torch.float64, noise=noise, estimator="local_reparameterization")
    x = torch.randn(5, 3, dtype=torch.float64)
    with torch.no_grad():
        y = torch.stack([layer(x) for _ in range(DRAWS)])
        mean = nn.functional.linear(x, layer.weight, layer.bias)
        variance = x.square() @ layer.scale("weight").square().T
        if noise.covers_bias:
            variance = variance + layer.scale("bias").square()
    centerd(y, mean)
    centerd((y - mean).square(), variance)
    unit = (y - mean).flatten(1)
    pairs = unit[:, :, None] * unit[:, None, :]
    centerd(pairs[:, ~torch.eye(10, dtype=torch.bool)], 0.0)  # between examples and between outputs


def test_normals_are_normal() -> None:
    drawn = normals((50_000,), torch.empty(0, dtype=torch.float64), torch.Generator().manual_seed(0))
    for power, moment in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
        centerd(drawn[:, None] ** power, moment)


def test_a_parameter_without_noise_is_its_mean() -> None:
    mean = torch.randn(3)
    assert ParameterSample(mean).example(7) is mean
