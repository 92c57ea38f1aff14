"""Every layer, family and configuration: a population forward equals forwards with the dense weights of each member."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from populations import population_of
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from es_flipout.errors import UserError
from es_flipout.layers import UnsupportedLayerError, convert
from es_flipout.perturbations import Dense, Family, Flipout, LowRank
from es_flipout.strategy.evolution_strategy import EvolutionStrategy
from es_flipout.strategy.population import Population

P = 10
CPU = torch.device("cpu")


def double_population(module: nn.Module, family: Family, size: int = P) -> Population:
    return population_of(module.double(), family, size, row_block=4)


def check(module: nn.Module, family: Family, *shapes: tuple[int, ...] | Tensor, size: int = P) -> None:
    """Compare the population with ``member(n)(input[n])``; shapes are those of one member's inputs."""
    population = double_population(module, family, size)
    inputs = [x if isinstance(x, Tensor) else torch.randn(size, *x, dtype=torch.float64) for x in shapes]
    got = tree_leaves(population(*inputs))
    means = tree_leaves(module(*(x[0] for x in inputs)))
    moved = 0.0
    for n in range(size):
        expected = tree_leaves(population.member(n)(*(x[n] for x in inputs)))
        assert len(got) == len(expected) > 0
        for y, z in zip(got, expected, strict=True):
            torch.testing.assert_close(y[n], z.detach(), rtol=1e-9, atol=1e-9)
        if n == 0:
            moved = max(float((z - m).detach().abs().max()) for z, m in zip(expected, means, strict=True))
    assert moved > 1e-3, "the members do not differ from the mean, so nothing was tested"


def indices(*shape: int, below: int) -> Tensor:
    return torch.randint(below, (P, *shape))


class Tied(nn.Module):
    """Layers of several kinds, a bare parameter, and an output layer tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.position = nn.Parameter(torch.randn(5, 6))
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm = nn.LayerNorm(6)
        self.out = nn.Linear(6, 7)
        self.out.weight = self.embedding.weight

    def forward(self, index: Tensor) -> Tensor:
        x = self.embedding(index) + self.position[: index.shape[-1]]
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.out(x)


class UsesWeight(nn.Module):
    """Multiplies by the embedding's weight directly."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)

    def forward(self, index: Tensor) -> Tensor:
        return F.linear(self.embedding(index).mean(-2), self.embedding.weight)


class MixesRows(nn.Module):
    """Treats its first dimension as examples, which only works one member at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x - x.mean(0)).flatten(0).softmax(0)


class TransposedTo(nn.Module):
    """Requests an output of a given size from a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, output_size=[8, 9])


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrized() -> nn.Module:
    layer = nn.Linear(3, 4)
    nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


def frozen(module: nn.Module) -> nn.Module:
    next(module.parameters()).requires_grad_(False)
    return module


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...]]] = {
    "linear": (lambda: nn.Linear(5, 4), ((3, 5),)),
    "bilinear": (lambda: nn.Bilinear(3, 4, 5), ((2, 3), (2, 4))),
    "bilinear-one": (lambda: nn.Bilinear(3, 4, 5, bias=False), ((3,), (4,))),
    "embedding": (lambda: nn.Embedding(7, 3), (indices(2, 4, below=7),)),
    "embedding-padding": (lambda: nn.Embedding(7, 3, padding_idx=2), (indices(6, below=7),)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), ((3, 4, 11),)),
    "conv1d-circular": (lambda: nn.Conv1d(2, 3, 3, padding=2, padding_mode="circular", bias=False), ((2, 2, 5),)),
    "conv2d": (lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0)), ((2, 3, 7, 6),)),
    "conv2d-one": (lambda: nn.Conv2d(3, 4, 3), ((3, 7, 6),)),
    "conv2d-groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), ((2, 4, 5, 5),)),
    "conv2d-depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), ((2, 4, 5, 5),)),
    "conv2d-same": (lambda: nn.Conv2d(2, 3, 3, padding="same", dilation=2), ((2, 2, 5, 6),)),
    "conv2d-reflect": (lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="reflect"), ((2, 5, 6),)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, padding=1), ((2, 2, 3, 4, 3),)),
    "transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1, groups=2), ((3, 4, 5),)),
    "transpose2d": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, dilation=(1, 2)), ((2, 3, 4, 5),)),
    "transpose2d-one": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False), ((4, 4, 5),)),
    "transpose2d-to-size": (TransposedTo, ((2, 2, 4, 5),)),
    "transpose3d": (lambda: nn.ConvTranspose3d(2, 3, 2), ((2, 3, 2, 3),)),
    "rnn": (lambda: nn.RNN(3, 4), ((5, 2, 3),)),
    "rnn-relu": (lambda: nn.RNN(3, 4, nonlinearity="relu", bias=False), ((5, 3), (1, 4))),
    "gru": (lambda: nn.GRU(3, 4, num_layers=2), ((5, 2, 3), (2, 2, 4))),
    "gru-both-ways": (lambda: nn.GRU(3, 4, num_layers=2, bidirectional=True, batch_first=True), ((2, 5, 3),)),
    "lstm": (lambda: nn.LSTM(3, 4), ((5, 3),)),
    "lstm-both-ways": (lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True), ((5, 2, 3),)),
    "lstm-projection": (lambda: nn.LSTM(3, 5, proj_size=2, num_layers=2, batch_first=True), ((2, 5, 3),)),
    "rnn-cell": (lambda: nn.RNNCell(3, 4), ((2, 3), (2, 4))),
    "gru-cell": (lambda: nn.GRUCell(3, 4), ((2, 3),)),
    "gru-cell-one": (lambda: nn.GRUCell(3, 4, bias=False), ((3,), (4,))),
    "lstm-cell": (lambda: nn.LSTMCell(3, 4), ((2, 3),)),
    "layer-norm": (lambda: nn.LayerNorm([2, 5]), ((3, 2, 5),)),
    "group-norm": (lambda: nn.GroupNorm(2, 4), ((3, 4, 5),)),
    "rms-norm": (lambda: nn.RMSNorm(5), ((3, 5),)),
    "prelu": (lambda: nn.PReLU(3), ((2, 3, 4),)),
    "attention": (lambda: nn.MultiheadAttention(6, 2), ((4, 2, 6), (3, 2, 6), (3, 2, 6))),
    "attention-first": (lambda: nn.MultiheadAttention(6, 3, batch_first=True, bias=False), 3 * ((2, 4, 6),)),
    "attention-one": (lambda: nn.MultiheadAttention(6, 2), 3 * ((4, 6),)),
    "attention-sizes": (lambda: nn.MultiheadAttention(6, 2, kdim=3, vdim=5), ((4, 2, 6), (3, 2, 3), (3, 2, 5))),
    "encoder": (lambda: nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True), ((2, 4, 6),)),
    "encoder-eval": (lambda: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True).eval(), ((2, 4, 6),)),
    "encoders": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True), 2).eval(),
        ((2, 4, 6),),
    ),
    "transformer": (lambda: nn.Transformer(4, 2, 1, 1, 8, 0.0, batch_first=True), ((2, 3, 4), (2, 4, 4))),
    "tied": (Tied, (indices(2, 5, below=7),)),
    "uses-weight": (UsesWeight, (indices(2, 5, below=7),)),
    "mixes-rows": (MixesRows, ((4, 3),)),
    "parametrized": (parametrized, ((2, 3),)),
    "frozen-linear": (lambda: frozen(nn.Linear(3, 4)), ((2, 3),)),
    "frozen-conv": (lambda: frozen(nn.Conv2d(3, 4, 2)), ((3, 4, 4),)),
    "frozen-embedding": (lambda: nn.Sequential(frozen(nn.Embedding(7, 3)), nn.Linear(3, 2)), (indices(2, below=7),)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_population_equals_every_member(family: Family, name: str) -> None:
    make, shapes = LAYERS[name]
    check(make(), family, *shapes)


EVERY_KIND_OF_PARAMETER = (
    "bilinear",
    "embedding-padding",
    "conv2d-groups",
    "transpose1d",
    "lstm",
    "tied",
    "frozen-conv",
)


@pytest.mark.parametrize("name", EVERY_KIND_OF_PARAMETER)
def test_weighted_sum_equals_the_sum_over_members(family: Family, name: str) -> None:
    module = LAYERS[name][0]()
    population = double_population(module, family)
    u = torch.randn(P, dtype=torch.float64)
    members = [dict(population.member(n).named_parameters()) for n in range(P)]
    sums = population.weighted_sum(u)
    means = dict(module.named_parameters())
    assert sums.keys() == means.keys()
    for name, total in sums.items():
        expected = sum(u[n] * (members[n][name] - means[name]) / 0.3 for n in range(P))
        assert isinstance(expected, Tensor)
        torch.testing.assert_close(total, expected.detach(), rtol=1e-9, atol=1e-9)


@settings(max_examples=40)
@given(
    dims=st.integers(1, 3),
    groups=st.integers(1, 3),
    channels=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 1),
    dilation=st.integers(1, 2),
    examples=st.sampled_from([(), (2,)]),
    transposed=st.booleans(),
    family=st.sampled_from([Flipout(), Flipout(base="gaussian", bases=2), LowRank(2), Dense()]),
)
def test_any_convolution(
    dims: int,
    groups: int,
    channels: tuple[int, int],
    kernel: int,
    stride: int,
    padding: int,
    dilation: int,
    examples: tuple[int, ...],
    transposed: bool,
    family: Family,
) -> None:
    kinds = (
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        if transposed
        else (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    )
    size_in, size_out = channels[0] * groups, channels[1] * groups
    layer = kinds[dims - 1](size_in, size_out, kernel, stride, padding, dilation=dilation, groups=groups)
    check(layer, family, (*examples, size_in, *(5,) * dims), size=4)


def test_masks_of_attention(family: Family) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor, padding: Tensor) -> Any:
            causal = torch.ones(3, 3, dtype=torch.bool).triu(1)
            per_head = torch.arange(36, dtype=x.dtype).view(4, 3, 3).sin()
            one = self.attention(x, x, x, attn_mask=causal, key_padding_mask=padding)
            other = self.attention(x, x, x, attn_mask=per_head, average_attn_weights=False)
            return one, other

    padding = torch.zeros(P, 2, 3, dtype=torch.bool)
    padding[:, 1, 2] = True
    check(Masked(), family, (2, 3, 4), padding)


SHARED = torch.arange(15, dtype=torch.float64).view(3, 5).sin()


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        (((3, 4), (5, 4), (5, 6)), {}),
        (((2, 3, 4), (2, 5, 4), (2, 5, 6)), {"attn_mask": SHARED}),
        (((2, 4, 5, 4), (2, 4, 5, 4), (2, 4, 5, 4)), {"is_causal": True, "scale": 0.3}),
        (((2, 4, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4)), {"enable_gqa": True, "attn_mask": SHARED > 0}),
        (((2, 4, 3, 4), (2, 4, 5, 4), (2, 4, 5, 4)), {"attn_mask": torch.stack([SHARED, -SHARED])[:, None]}),
        (((2, 4, 3, 4), (2, 4, 5, 4), (2, 4, 5, 4)), {"attn_mask": torch.stack([SHARED, -SHARED, SHARED, SHARED])}),
        (((6, 2, 4, 3, 4), (1, 2, 4, 5, 4), (6, 1, 4, 5, 4)), {}),
    ],
    ids=["plain", "heads", "causal", "grouped", "mask-per-example", "mask-per-head", "broadcast"],
)
@pytest.mark.parametrize("own_mask", [False, True])
def test_attention_of_own_code_is_one_call(
    shapes: tuple[tuple[int, ...], ...], options: dict[str, Any], own_mask: bool
) -> None:
    """Keys that all members share, and masks of each member; vmap's loop over the members would warn (an error here)."""

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Linear(4, 4)
            self.keys = nn.Buffer(torch.randn(*shapes[1], dtype=torch.float64))

        def forward(self, query: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
            own = {"attn_mask": allowed} if own_mask and not options.get("is_causal") else {}
            return F.scaled_dot_product_attention(self.query(query), self.keys, value, **{**options, **own})

    shown = SHARED > -0.9
    allowed = torch.stack([shown.roll(n, 1) for n in range(P)])
    check(Attends(), Flipout(), shapes[0], shapes[2], allowed)


def test_recurrent_layer_has_one_weight_sample_for_the_sequence(family: Family) -> None:
    """The outputs are the same whether the sequence is fed step by step or at once."""
    population = double_population(nn.LSTM(3, 4), family)
    x = torch.randn(P, 6, 3, dtype=torch.float64)
    outputs, final = population(x)
    state, parts = None, []
    for t in range(6):
        part, state = population(x[:, t : t + 1]) if state is None else population(x[:, t : t + 1], state)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), outputs)
    assert state is not None
    torch.testing.assert_close(state[1], final[1])


def test_tied_weights_stay_tied_and_count_once() -> None:
    strategy = EvolutionStrategy(Tied(), P, 0.1)
    population = strategy.ask()
    member = population.member(3)
    assert isinstance(member, Tied)
    assert member.out.weight is member.embedding.weight
    strategy.tell(torch.randn(P))
    mean = strategy.mean_module()
    assert isinstance(mean, Tied)
    assert mean.out.weight is mean.embedding.weight
    assert mean.state_dict().keys() == Tied().state_dict().keys()
    Tied().load_state_dict(mean.state_dict())


def test_padding_of_an_embedding_never_moves(family: Family) -> None:
    layer = nn.Embedding(5, 3, padding_idx=1)
    population = double_population(layer, family)
    for n in range(P):
        member = population.member(n)
        assert isinstance(member, nn.Embedding)
        assert not member.weight[1].any()
        assert member.weight[0].any()
    assert not population.weighted_sum(torch.randn(P))["weight"][1].any()


def test_frozen_parameters_never_move() -> None:
    module = nn.Sequential(frozen(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))
    strategy = EvolutionStrategy(module, P, 0.1, weight_decay=0.1)
    for _ in range(3):
        population = strategy.ask()
        strategy.tell(population(torch.randn(P, 3)).sum(1))
    mean = strategy.mean_module()
    assert torch.equal(mean.get_parameter("0.weight"), module.get_parameter("0.weight"))
    for name in ("0.bias", "2.weight", "2.bias"):
        assert not torch.equal(mean.get_parameter(name), module.get_parameter(name)), name


@pytest.mark.parametrize("family_of_few", [Flipout(), LowRank()])
def test_signs_are_constant_over_space_and_vary_over_channels(family_of_few: Family) -> None:
    member = double_population(nn.Conv2d(8, 8, 3), family_of_few, 2).member(0)
    assert isinstance(member, nn.Conv2d)
    assert len((member.weight[:, 0, 0, 0]).unique()) == 8


def test_flipout_convolution_differs_from_its_base_by_signs_of_channels() -> None:
    layer = nn.Conv2d(6, 6, 3)
    population = double_population(layer, Flipout(), 40)
    noise = torch.stack([population.perturbations["weight"].noise(n) for n in range(0, 40, 2)])
    assert noise.unique().tolist() == [-1.0, 1.0]
    ratio = noise / noise[:1]
    assert torch.equal(ratio, ratio[..., :1, :1].expand_as(ratio)), "one sign over the kernel"
    assert torch.linalg.matrix_rank(ratio[..., 0, 0]).tolist() == [1] * 20
    assert len(ratio[..., 0, 0].flatten(1).unique(dim=0)) == 20


def test_depthwise_kernels_are_explored_in_every_direction() -> None:
    population = double_population(nn.Conv2d(4, 4, 3, groups=4), Flipout(), 100)
    noise = torch.stack([population.perturbations["weight"].noise(n) for n in range(0, 100, 2)])
    assert torch.linalg.matrix_rank(noise[:, 0].flatten(1)) == 9


BATCH_NORMS = [
    nn.BatchNorm1d(3),
    nn.BatchNorm2d(3),
    nn.SyncBatchNorm(3),
    nn.InstanceNorm2d(3, track_running_stats=True),
]


@pytest.mark.parametrize("layer", BATCH_NORMS, ids=lambda layer: type(layer).__name__)
def test_statistics_of_a_batch_are_refused(layer: nn.Module) -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.ModuleDict({"norm": layer}))
    with pytest.raises(UnsupportedLayerError, match=rf"'1\.norm'.*{type(layer).__name__}.*mix.*GroupNorm"):
        EvolutionStrategy(module, 4, 0.1)


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (nn.EmbeddingBag(3, 4), r"'0' of type EmbeddingBag .* supported.*Linear"),
        (nn.LazyLinear(3), r"'0' of type LazyLinear has no size"),
        (nn.MultiheadAttention(4, 2, add_bias_kv=True), r"'0' of type MultiheadAttention uses add_bias_kv"),
        (nn.Embedding(3, 4, max_norm=1.0), r"'0' of type Embedding uses max_norm"),
        (nn.Linear(3, 4, dtype=torch.complex64), r"'0' of type Linear .*complex64.*floating point"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_unsupported_layers_are_named(layer: nn.Module, says: str) -> None:
    with pytest.raises(UnsupportedLayerError, match=says):
        EvolutionStrategy(nn.Sequential(layer), 4, 0.1)


@pytest.mark.parametrize(
    ("layer", "x", "state", "wanted"),
    [
        (nn.GRUCell(3, 4), (2, 3), (2, 5), r"\(2, 4\)"),
        (nn.GRU(3, 4, num_layers=2), (5, 2, 3), (1, 2, 4), r"\(2, 2, 4\)"),
        (nn.RNN(3, 4), (5, 3), (1, 2, 4), r"\(1, 4\)"),
    ],
)
def test_recurrent_state_of_the_wrong_size(
    layer: nn.Module, x: tuple[int, ...], state: tuple[int, ...], wanted: str
) -> None:
    population = double_population(layer, Flipout())
    with pytest.raises(ValueError, match=rf"state h must have shape {wanted}"):
        population(torch.zeros(P, *x).double(), torch.zeros(P, *state).double())


def test_every_input_needs_a_row_for_every_member() -> None:
    population = double_population(nn.GRUCell(3, 4), Flipout())
    with pytest.raises(ValueError, match=rf"P = {P}, got \(9, 4\)"):
        population(torch.zeros(P, 3).double(), torch.zeros(9, 4).double())


def test_packed_sequences_are_refused() -> None:
    class Packs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 4)

        def forward(self, x: Tensor) -> Any:
            data = torch.zeros(5, 3, dtype=x.dtype)
            return self.lstm(nn.utils.rnn.PackedSequence(data, torch.tensor([2, 2, 1])))

    with pytest.raises(UserError, match="packed sequences"):
        double_population(Packs(), Flipout())(torch.zeros(P, 5, 3).double())


def test_forward_that_depends_on_values_is_refused() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if x.sum() > 0 else x

    with pytest.raises(UserError, match="all members at once"):
        double_population(Branches(), Flipout())(torch.zeros(P, 3).double())


def test_hooks_of_a_layer_are_heard() -> None:
    def twice(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return 2 * output

    layer = nn.Linear(3, 2)
    layer.register_forward_hook(twice)
    check(layer, Flipout(), (3,))


def test_inputs_in_containers() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, inputs: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
            return {"y": self.layer(inputs["x"]) * scale}

    population = double_population(Named(), Flipout())
    x = torch.randn(P, 3).double()
    y = population({"x": x}, 2.0)["y"]
    expected: Tensor = population.member(7)({"x": x[7]}, 2.0)["y"]
    torch.testing.assert_close(y[7], expected.detach())


def test_the_usual_modules_are_called_with_all_rows_at_once() -> None:
    """Calling member by member costs tens of microseconds per layer."""
    assert convert(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))).row_wise
    assert not convert(nn.Sequential(nn.Linear(3, 4), nn.Softmax(0))).row_wise
    assert not convert(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))).row_wise
    assert not convert(nn.LSTM(3, 4)).row_wise
    assert not convert(MixesRows()).row_wise


def test_large_inputs_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    population = double_population(nn.Conv2d(3, 4, 3), Flipout())
    x = torch.randn(P, 2, 3, 5, 5, dtype=torch.float64)
    whole = population(x)
    monkeypatch.setattr("es_flipout.strategy.population._CALL_NUMBERS", 2 * x[0].numel())
    torch.testing.assert_close(population(x), whole)


def test_outputs_may_have_any_structure() -> None:
    outputs, (h, c) = double_population(nn.LSTM(3, 4, num_layers=2), Flipout())(torch.randn(P, 5, 3).double())
    assert tree_map(lambda y: tuple(y.shape), (outputs, h, c)) == ((P, 5, 4), (P, 2, 4), (P, 2, 4))
