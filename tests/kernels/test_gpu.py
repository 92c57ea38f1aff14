"""Tests that need a GPU: compiled kernels at realistic sizes, CUDA graphs, and tuning that does not change results."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from es_flipout.bench.ways import graphed
from es_flipout.kernels import MemberNoise, Precision
from es_flipout.kernels import linear as linear_kernel
from es_flipout.kernels import mlp as mlp_kernel
from es_flipout.kernels.linear import FlipoutLayer, linear, linear_by_library, linear_torch
from es_flipout.kernels.mlp import mlp, mlp_torch
from es_flipout.kernels.signs import sign_words, sign_words_torch
from es_flipout.kernels.weighted_sum import weighted_sum, weighted_sum_torch
from es_flipout.perturbations import Flipout
from es_flipout.policies.networks import MLP
from es_flipout.randomness import Address, Stream, signs
from es_flipout.strategy.evolution_strategy import EvolutionStrategy

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
SIGMA = 0.03
TOLERANCE = {"ieee": 1e-5, "tf32x3": 2e-5, "tf32": 5e-3, "bf16": 3e-2}
PRECISIONS: tuple[Precision, ...] = ("ieee", "tf32x3", "tf32", "bf16")


def layers_of(sizes: tuple[int, ...], sources: int, precision: Precision) -> list[FlipoutLayer]:
    layers = []
    for number, (size_in, size_out) in enumerate(pairwise(sizes)):
        address, source = Address(1, 2, number), torch.arange(sources, device=CUDA)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        base = signs(address, Stream.BASE, torch.zeros(1, dtype=torch.int64, device=CUDA), size_out * size_in)
        layers.append(
            FlipoutLayer(
                weight=(torch.randn(size_out, size_in, device=CUDA) / size_in**0.5).to(dtype),
                base=base.view(1, size_out, size_in).to(torch.float32 if precision == "tf32" else torch.bfloat16),
                r=sign_words(address, Stream.OUTPUT_SIGNS, source, size_out),
                s=sign_words(address, Stream.INPUT_SIGNS, source, size_in),
                bias=torch.randn(size_out, device=CUDA),
                bias_noise=torch.randn(sources, size_out, device=CUDA),
                activation="none" if number == len(sizes) - 2 else "tanh",
            )
        )
    return layers


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.abs().max())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("sizes", [(17, 64, 64, 6), (348, 256, 256, 17), (3, 1), (376, 100, 200, 50, 17)])
def test_mlp(sizes: tuple[int, ...], precision: Precision) -> None:
    rows = 10_007
    layers = layers_of(sizes, 4096, precision)
    x, members = torch.randn(rows, sizes[0], device=CUDA), torch.randint(8192, (rows,), device=CUDA)
    assert (
        error(
            mlp(x, layers, MemberNoise(members, 2, SIGMA, precision)),
            mlp_torch(x, layers, MemberNoise(members, 2, SIGMA)),
        )
        < TOLERANCE[precision]
    )


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("size_in", "size_out"), [(64, 64), (348, 1000), (1024, 1024)])
def test_linear(size_in: int, size_out: int, precision: Precision) -> None:
    (layer,) = layers_of((size_in, size_out), 500, precision)
    x, members = torch.randn(1003, size_in, device=CUDA), torch.randint(1000, (1003,), device=CUDA)
    poisoned = torch.full((1003, size_out), torch.inf, device=CUDA)
    found = linear(x, layer, MemberNoise(members, 2, SIGMA, precision), out=poisoned)
    assert error(found, linear_torch(x, layer, MemberNoise(members, 2, SIGMA))) < TOLERANCE[precision]


@pytest.mark.parametrize("fp8", [False, True])
def test_linear_by_library(fp8: bool) -> None:
    (layer,) = layers_of((512, 256), 64, "bf16")
    base = layer.base.to(torch.float8_e4m3fn) if fp8 else layer.base
    layer = FlipoutLayer(layer.weight, base, layer.r, layer.s)
    x, members = torch.randn(128, 512, device=CUDA).bfloat16(), torch.arange(128, device=CUDA)
    assert (
        error(
            linear_by_library(x, layer, MemberNoise(members, 2, SIGMA)),
            linear_torch(x, layer, MemberNoise(members, 2, SIGMA)),
        )
        < 3e-2
    )


def _one_of(configs: Callable[..., tuple[Any, ...]], number: int) -> Callable[..., tuple[Any, ...]]:
    return lambda *sizes: (configs(*sizes) * 2)[number : number + 1]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_configuration_changes_a_bit(precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = layers_of((20, 256, 256, 17), 256, precision)
    small = layers_of((20, 64, 64, 5), 256, precision)
    x, members = torch.randn(500, 20, device=CUDA), torch.randint(512, (500,), device=CUDA)

    def compute() -> list[torch.Tensor]:
        whole = [mlp(x, which, MemberNoise(members, 2, SIGMA, precision)) for which in (layers, small)]
        return [*whole, linear(x, layers[0], MemberNoise(members, 2, SIGMA, precision))]

    results = []
    for number in range(3):
        with monkeypatch.context() as patch:
            for kernel in (mlp_kernel, linear_kernel):
                one_of = _one_of(kernel._configs, number)
                patch.setattr(kernel, "_configs", one_of)
            results.append(compute())
    for found in results[1:]:
        for a, b in zip(found, results[0], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_mlp_in_a_cuda_graph(precision: Precision) -> None:
    module = MLP(17, 6, (64, 64))
    strategy = EvolutionStrategy(module, 256, SIGMA, Flipout(), device=CUDA, kernels="triton", precision=precision)
    population = strategy.ask().fixed_copy()
    members = torch.arange(256, device=CUDA)
    selection = population.select(members)
    x, y = torch.randn(256, 17, device=CUDA), torch.full((256, 6), torch.inf, device=CUDA)
    replay = graphed(CUDA, lambda: y.copy_(selection(x)))
    y.fill_(torch.inf)
    replay()
    assert torch.equal(y, strategy.ask()(x))
    strategy.tell(torch.randn(256))
    strategy.sigma = 0.5
    population.load_(strategy.ask())
    x.normal_()
    replay()
    assert torch.equal(y, strategy.ask()(x))


def test_signs_of_many() -> None:
    members = torch.arange(100_000, device=CUDA)
    found = sign_words(Address(7, 8, 9), Stream.INPUT_SIGNS, members, 348)
    assert torch.equal(found.cpu(), sign_words_torch(Address(7, 8, 9), Stream.INPUT_SIGNS, members.cpu(), 348))


def test_weighted_sum_of_many() -> None:
    (layer,) = layers_of((348, 256), 32_768, "ieee")
    v = torch.randn(32_768, device=CUDA)
    found = weighted_sum(v, layer.r, layer.s, 256, 348)
    assert error(found, weighted_sum_torch(v.double(), layer.r, layer.s, 256, 348)) < 1e-5
    assert torch.equal(found, weighted_sum(v, layer.r, layer.s, 256, 348))
