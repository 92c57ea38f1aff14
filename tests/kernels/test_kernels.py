"""Every kernel against its torch twin and dense members; without a GPU, in Triton's interpreter (conftest.py)."""

import dataclasses
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from es_flipout.kernels import Activation, MemberNoise, Precision, interpreted
from es_flipout.kernels import linear as linear_kernel
from es_flipout.kernels import mlp as mlp_kernel
from es_flipout.kernels.linear import FlipoutLayer, linear, linear_by_library, linear_torch
from es_flipout.kernels.low_rank import low_rank_linear, low_rank_linear_torch
from es_flipout.kernels.mlp import fits, mlp, mlp_torch
from es_flipout.kernels.signs import sign_words, sign_words_torch, signed, signed_torch
from es_flipout.kernels.tiles import activated_torch
from es_flipout.kernels.weighted_sum import weighted_sum, weighted_sum_torch
from es_flipout.randomness import Address, Stream, signs, unpacked_signs

DEVICE = torch.device("cpu" if interpreted() else "cuda")
# Tensor cores reduce mantissas to 10 bits for TF32 and 7 for bf16; the interpreter only reduces bf16 (rounding down).
TOLERANCE = {"ieee": 2e-5, "tf32x3": 5e-5, "tf32": 2e-2, "bf16": 6e-2}
SIGMA = 0.3


def layer_of(
    size_in: int,
    size_out: int,
    sources: int,
    number: int = 0,
    bases: int = 1,
    activation: Activation = "none",
    bias: bool = True,
) -> FlipoutLayer:
    address, source = Address(5, 6, number), torch.arange(sources, device=DEVICE)
    return FlipoutLayer(
        weight=torch.randn(size_out, size_in, device=DEVICE) / size_in**0.5,
        base=signs(address, Stream.BASE, torch.arange(bases, device=DEVICE), size_out * size_in)
        .float()
        .view(bases, size_out, size_in),
        r=sign_words(address, Stream.OUTPUT_SIGNS, source, size_out),
        s=sign_words(address, Stream.INPUT_SIGNS, source, size_in),
        base_of_source=None if bases == 1 else source * bases // sources,
        bias=torch.randn(size_out, device=DEVICE) if bias else None,
        bias_noise=torch.randn(sources, size_out, device=DEVICE) if bias else None,
        activation=activation,
    )


def dense(x: Tensor, layer: FlipoutLayer, members: Tensor, share: int) -> Tensor:
    """Compute row by row, with the dense weights of each row's member."""
    rows = []
    for row, member in zip(x.double(), members.tolist(), strict=True):
        source, sign = member // share, 1 - 2 * (member % 2) if share == 2 else 1
        size_out, size_in = layer.weight.shape
        r = unpacked_signs(layer.r[source : source + 1], size_out)[0].double()
        s = unpacked_signs(layer.s[source : source + 1], size_in)[0].double()
        m = 0 if layer.base_of_source is None else int(layer.base_of_source[source])
        weight = layer.weight.double() + SIGMA * sign * layer.base[m].double() * torch.outer(r, s)
        y = weight @ row
        if layer.bias is not None:
            y += layer.bias.double()
        if layer.bias_noise is not None:
            y += SIGMA * sign * layer.bias_noise[source].double()
        rows.append(activated_torch(y, layer.activation))
    return torch.stack(rows)


def assert_near(found: Tensor, expected: Tensor, precision: Precision = "ieee") -> None:
    scale = expected.abs().max().clamp(min=1.0)
    assert (found.double() - expected.double()).abs().max() / scale < TOLERANCE[precision]


@pytest.mark.parametrize("count", [1, 31, 32, 33, 130])
@pytest.mark.parametrize("seed", [0, 2**63 + 12345])
def test_device_signs_are_those_of_the_host(count: int, seed: int) -> None:
    address = Address(seed, 2**32 - 1, 2**24 - 1)
    members = torch.tensor([0, 5, 2**20, 3, 3], device=DEVICE)
    found = sign_words(address, Stream.INPUT_SIGNS, members, count)
    assert torch.equal(found, sign_words_torch(address, Stream.INPUT_SIGNS, members, count))
    host = signs(address, Stream.INPUT_SIGNS, members.cpu(), count)
    assert torch.equal(unpacked_signs(found, count).cpu(), host)


@pytest.mark.parametrize("size", [3, 40, 100])
@pytest.mark.parametrize("share", [1, 2])
def test_signed_rows(size: int, share: int) -> None:
    words = sign_words(Address(1), Stream.INPUT_SIGNS, torch.arange(4, device=DEVICE), size)
    members = torch.tensor([3, 0, 1, 3, 2], device=DEVICE)
    x, plus = torch.randn(5, size, device=DEVICE), torch.randn(5, size, device=DEVICE)
    for extra in ({}, {"scaled": True}, {"scaled": True, "plus": plus}, {"dtype": torch.float64}):
        arguments: Any = (x, words, MemberNoise(members, share, 0.3))
        assert torch.allclose(signed(*arguments, **extra), signed_torch(*arguments, **extra), atol=1e-6)


@pytest.mark.parametrize(("size_in", "size_out"), [(17, 64), (70, 33), (3, 1), (128, 6)])
@pytest.mark.parametrize("share", [1, 2])
@pytest.mark.parametrize("bases", [1, 3])
def test_linear(size_in: int, size_out: int, share: int, bases: int) -> None:
    layer = layer_of(size_in, size_out, 12, bases=bases, activation="tanh")
    members = torch.randint(12 * share, (37,), device=DEVICE)
    x = torch.randn(37, size_in, device=DEVICE)
    poisoned = torch.full((37, size_out), torch.inf, device=DEVICE)
    found = linear(x, layer, MemberNoise(members, share, SIGMA), out=poisoned)
    assert found is poisoned
    assert_near(found, linear_torch(x, layer, MemberNoise(members, share, SIGMA)))
    assert_near(found, dense(x, layer, members, share))


@pytest.mark.parametrize("precision", ["tf32x3", "tf32", "bf16"])
def test_linear_in_other_precisions(precision: Precision) -> None:
    layer = layer_of(40, 50, 8, activation="elu")
    members = torch.randint(16, (20,), device=DEVICE)
    x = torch.randn(20, 40, device=DEVICE)
    found = linear(x, layer, MemberNoise(members, 2, SIGMA, precision))
    assert_near(found, dense(x, layer, members, 2), precision)
    if precision == "bf16":
        narrow = dataclasses.replace(layer, weight=layer.weight.bfloat16(), base=layer.base.bfloat16())
        assert_near(linear(x.bfloat16(), narrow, MemberNoise(members, 2, SIGMA, precision)), found, precision)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_a_base_of_signs_is_exact_in_few_bits(dtype: torch.dtype, precision: Precision) -> None:
    layer = layer_of(40, 20, 8)
    layer.base[:, 3] = 0  # an output that is not perturbed
    members, x = torch.arange(16, device=DEVICE), torch.randn(16, 40, device=DEVICE)
    few = dataclasses.replace(layer, base=layer.base.to(dtype))
    wide, found = (linear(x, which, MemberNoise(members, 2, SIGMA, precision)) for which in (layer, few))
    assert torch.equal(wide, found)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize(("precision", "least", "most"), [("ieee", 0.0, 5e-7), ("tf32x3", 5e-7, 3e-5)])
@pytest.mark.parametrize("sizes", [(40, 20), (17, 64, 64, 6)])
def test_noise_of_signs_is_a_sum_of_products_in_bf16(
    dtype: torch.dtype, precision: Precision, least: float, most: float, sizes: tuple[int, ...]
) -> None:
    """Three bf16 numbers have all bits of a float32 number, two have sixteen; one would have an error of 4e-3."""
    layers = [
        dataclasses.replace(layer, weight=torch.zeros_like(layer.weight), base=layer.base.to(dtype))
        for layer in (layer_of(*pair, 16, number, bias=False) for number, pair in enumerate(pairwise(sizes)))
    ]
    members, x = torch.arange(32, device=DEVICE), torch.randn(32, sizes[0], device=DEVICE)
    expected, stepwise = x.double(), x
    for layer in layers:
        expected = dense(expected, layer, members, 2)
        stepwise = linear(stepwise, layer, MemberNoise(members, 2, SIGMA, precision))
    for found in (mlp(x, layers, MemberNoise(members, 2, SIGMA, precision)), stepwise):
        error = float((found.double() - expected).abs().max() / expected.abs().max())
        assert least <= error < most


@pytest.mark.filterwarnings("ignore:invalid value")
def test_infinity_is_not_lost_when_it_is_split() -> None:
    layer = layer_of(1, 32, 4, bias=False)
    layer = dataclasses.replace(layer, base=layer.base.bfloat16(), weight=torch.ones_like(layer.weight))
    x = torch.full((8, 1), torch.inf, device=DEVICE)
    found = linear(x, layer, MemberNoise(torch.arange(8, device=DEVICE), 2, SIGMA))
    assert (found == torch.inf).any(1).all()


def test_linear_with_biases_of_the_rows_and_several_rows_of_a_member() -> None:
    layer = layer_of(9, 20, 8)
    members = torch.tensor([3, 0, 3, 15, 7], device=DEVICE, dtype=torch.int32)
    x, bias_rows = torch.randn(15, 9, device=DEVICE), torch.randn(5, 20, device=DEVICE)
    found = linear(x, layer, MemberNoise(members, 2, SIGMA), bias_rows=bias_rows)
    assert_near(found, linear_torch(x, layer, MemberNoise(members, 2, SIGMA), bias_rows=bias_rows))
    bare = dataclasses.replace(layer, bias=None, bias_noise=None)
    expected = dense(x, bare, members.repeat_interleave(3), 2) + bias_rows.repeat_interleave(3, 0)
    assert_near(found, expected)
    assert_near(linear(x, bare, MemberNoise(members, 2, SIGMA)), dense(x, bare, members.repeat_interleave(3), 2))
    fixed = dataclasses.replace(layer, bias_noise=None)
    assert_near(linear(x, fixed, MemberNoise(members, 2, SIGMA)), dense(x, fixed, members.repeat_interleave(3), 2))


@pytest.mark.parametrize("sizes", [(17, 64, 64, 6), (348, 70, 33, 17), (3, 1), (5, 130, 2), (4, 3, 3, 3, 2)])
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_mlp(sizes: tuple[int, ...], precision: Precision) -> None:
    layers = [
        layer_of(*pair, 10, number, activation="tanh" if number < len(sizes) - 2 else "none")
        for number, pair in enumerate(pairwise(sizes))
    ]
    members = torch.randint(20, (37,), device=DEVICE)
    x = torch.randn(37, sizes[0], device=DEVICE)
    assert fits(layers)
    found = mlp(x, layers, MemberNoise(members, 2, SIGMA, precision))
    assert_near(found, mlp_torch(x, layers, MemberNoise(members, 2, SIGMA)), precision)
    expected = x.double()
    for layer in layers:
        expected = dense(expected, layer, members, 2)
    assert_near(found, expected, precision)


def test_mlp_in_bf16() -> None:
    layers = [
        layer_of(17, 40, 10, 0, activation="tanh"),
        layer_of(40, 40, 10, 1, activation="relu"),
        layer_of(40, 3, 10, 2),
    ]
    members = torch.randint(20, (20,), device=DEVICE)
    x = torch.randn(20, 17, device=DEVICE)
    found = mlp(x, layers, MemberNoise(members, 2, SIGMA, "bf16"))
    assert found.dtype == torch.float32
    assert_near(found, mlp_torch(x, layers, MemberNoise(members, 2, SIGMA)), "bf16")


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    layers = [layer_of(17, 64, 10, 0, activation="tanh"), layer_of(64, 6, 10, 1)]
    members = torch.arange(20, device=DEVICE).repeat(5)
    x = torch.randn(20, 17, device=DEVICE).repeat(5, 1)
    whole = mlp(x, layers, MemberNoise(members, 2, SIGMA))
    assert torch.equal(whole[:20], whole[40:60])
    order = torch.randperm(100, device=DEVICE)
    assert torch.equal(mlp(x[order], layers, MemberNoise(members[order], 2, SIGMA)), whole[order])
    assert torch.equal(mlp(x[7:8], layers, MemberNoise(members[7:8], 2, SIGMA)), whole[7:8])
    assert torch.equal(
        linear(x[7:8], layers[0], MemberNoise(members[7:8], 2, SIGMA)),
        linear(x, layers[0], MemberNoise(members, 2, SIGMA))[7:8],
    )


@pytest.mark.parametrize("activation", get_args(Activation))
def test_activations(activation: Activation) -> None:
    # A layer with weight 1 and no noise returns the activation of its input.
    layer = dataclasses.replace(
        layer_of(1, 1, 1, activation=activation, bias=False), weight=torch.ones(1, 1, device=DEVICE)
    )
    values = torch.cat([torch.linspace(-120, 120, 241), torch.linspace(-1, 1, 401), torch.logspace(-20, -1, 20)])
    x = values[:, None].to(DEVICE)
    members = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    found = linear(x, layer, MemberNoise(members, 1, 0.0))
    assert torch.allclose(found, activated_torch(x, activation), rtol=3e-6, atol=6e-7)


@pytest.mark.parametrize("activation", get_args(Activation))
def test_nan_stays_in_its_row_and_is_not_lost(activation: Activation) -> None:
    layers = [layer_of(5, 20, 4, 0, activation=activation), layer_of(20, 3, 4, 1, activation=activation)]
    x = torch.randn(9, 5, device=DEVICE)
    members = torch.arange(8, device=DEVICE).repeat(2)[:9]
    clean = mlp(x, layers, MemberNoise(members, 2, SIGMA))
    x[4, 2] = torch.nan
    for found in (
        mlp(x, layers, MemberNoise(members, 2, SIGMA)),
        mlp(x, layers, MemberNoise(members, 2, SIGMA, "tf32")),
    ):
        assert found[4].isnan().all()
        assert not found[[0, 1, 2, 3, 5, 6, 7, 8]].isnan().any()
    assert torch.equal(mlp(x, layers, MemberNoise(members, 2, SIGMA))[:4], clean[:4])


@pytest.mark.parametrize("precision", get_args(Precision))
def test_activations_stay_in_the_cache_of_a_gpu(precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    """An H100 has 132 multiprocessors and 50 MB of cache."""
    monkeypatch.setattr(mlp_kernel, "_multiprocessors", lambda device: 132)
    allocated, empty = [], torch.empty

    def counted(*shape: Any, **kwargs: Any) -> Tensor:
        made = empty(*shape, **kwargs)
        allocated.append(made.nbytes)
        return made

    launched: list[Any] = []
    monkeypatch.setattr(mlp_kernel, "_mlp", SimpleNamespace(launch=lambda grid, *_, **__: launched.append(grid)))
    monkeypatch.setattr(torch, "empty", counted)
    layers = [layer_of(20, 256, 4, 0), layer_of(256, 256, 4, 1), layer_of(256, 3, 4, 2)]
    members = torch.zeros(1 << 16, dtype=torch.int64, device=DEVICE)
    mlp(torch.zeros(1 << 16, 20, device=DEVICE), layers, MemberNoise(members, 2, SIGMA, precision))
    kept = max(allocated)
    assert 1e7 < kept < 40e6
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for config in mlp_kernel._configs(256, precision, False):
        (programs,) = launched[0](config.kwargs)
        assert programs >= 132
        width = 2 if precision == "bf16" else 4
        assert programs * 2 * config.kwargs["BLOCK_M"] * 256 * width <= kept, "programs write beyond the buffer"


@pytest.mark.parametrize("precision", get_args(Precision))
def test_configurations_use_the_same_instructions(precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hopper multiplies tiles of 64 rows and more in other units than smaller ones; three products are added by tile."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for configs in (
        *(linear_kernel._configs(*sizes, precision) for sizes in ((64, 17), (256, 348), (6, 64), (1000, 1000))),
        *(mlp_kernel._configs(widest, precision, False) for widest in (16, 64, 256)),
        *(mlp_kernel._configs(widest, precision, True) for widest in (16, 64) if precision != "ieee"),
    ):
        assert len({config.kwargs["BLOCK_M"] >= 64 for config in configs}) == 1
        assert len({config.kwargs["BLOCK_K"] for config in configs}) == 1


def test_what_fits_into_one_kernel() -> None:
    assert fits([layer_of(400, 256, 2), layer_of(256, 1, 2)])
    assert not fits([layer_of(4, 257, 2)])
    assert not fits([layer_of(4, 4, 4, bases=2)])
    assert not fits([layer_of(2, 2, 2)] * 5)
    assert not fits([])


@pytest.mark.parametrize(("sources", "size_out", "size_in"), [(5, 6, 17), (600, 70, 40), (33, 3, 1)])
def test_weighted_sum(sources: int, size_out: int, size_in: int) -> None:
    layer, v = layer_of(size_in, size_out, sources), torch.randn(sources, device=DEVICE)
    found = weighted_sum(v, layer.r, layer.s, size_out, size_in)
    assert_near(found, weighted_sum_torch(v, layer.r, layer.s, size_out, size_in))
    r, s = unpacked_signs(layer.r, size_out).double(), unpacked_signs(layer.s, size_in).double()
    brute = sum((v[n].double() * torch.outer(r[n], s[n]) for n in range(sources)), torch.zeros(size_out, size_in).to(r))
    assert_near(found, brute)
    assert torch.equal(found, weighted_sum(v, layer.r, layer.s, size_out, size_in))


def test_weighted_sum_of_nothing_is_zero() -> None:
    layer = layer_of(3, 2, 4)
    found = weighted_sum(torch.zeros(0, device=DEVICE), layer.r[:0], layer.s[:0], 2, 3)
    assert torch.equal(found, torch.zeros(2, 3, device=DEVICE))


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("share", [1, 2])
def test_low_rank(rank: int, share: int) -> None:
    weight, bias = torch.randn(9, 70, device=DEVICE), torch.randn(11, 9, device=DEVICE)
    left, right = torch.randn(6, rank, 9, device=DEVICE), torch.randn(6, rank, 70, device=DEVICE)
    members, x = torch.randint(6 * share, (11,), device=DEVICE), torch.randn(11, 70, device=DEVICE)
    for bias_rows in (None, bias):
        found = low_rank_linear(x, weight, left, right, MemberNoise(members, share, SIGMA), bias_rows)
        assert_near(found, low_rank_linear_torch(x, weight, left, right, MemberNoise(members, share, SIGMA), bias_rows))
        for i, member in enumerate(members.tolist()):
            scale = SIGMA * (1 - 2 * (member % 2) if share == 2 else 1)
            own = weight + scale * torch.einsum("ko,ki->oi", left[member // share], right[member // share])
            expected = own.double() @ x[i].double() + (0 if bias_rows is None else bias_rows[i])
            assert_near(found[i], expected)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_by_library(bias: bool) -> None:
    layer = layer_of(40, 20, 8, bias=bias)
    members, x = torch.randint(16, (11,), device=DEVICE), torch.randn(11, 40, device=DEVICE)
    assert_near(linear_by_library(x, layer, MemberNoise(members, 2, SIGMA)), dense(x, layer, members, 2))
