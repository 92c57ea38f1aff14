"""Policies as plain modules, and the mapping from network outputs to actions of a space."""

import warnings
from typing import Any, Literal

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from es_flipout.errors import UserError
from es_flipout.policies.action_map import ActionMap, check_observation_space
from es_flipout.policies.networks import MLP, ConvNet, Linear, Recurrent, initial_state, tanh

ASYMMETRIC = Box(np.array([-1.0, 2.0, -7.0], np.float32), np.array([3.0, 2.5, 0.0], np.float32))
UNBOUNDED = Box(-np.inf, np.inf, (2,), np.float32)


def test_mlp_layers_and_start() -> None:
    network = MLP(5, 3, hidden=(8, 4), activation="relu")
    first, second, last = (layer for layer in network.modules() if isinstance(layer, nn.Linear))
    assert [tuple(layer.weight.shape) for layer in (first, second, last)] == [(8, 5), (4, 8), (3, 4)]
    torch.testing.assert_close(first.weight.T @ first.weight, torch.eye(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(second.weight @ second.weight.T, torch.eye(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(last.weight @ last.weight.T, 0.01 * torch.eye(3), atol=1e-6, rtol=0)
    assert all(not layer.bias.any() for layer in (first, second, last))


def test_mlp_computes_what_it_says() -> None:
    network = MLP(3, 2, hidden=(4,), activation="tanh")
    first, last = (layer for layer in network.modules() if isinstance(layer, nn.Linear))
    x = torch.randn(6, 3)
    expected = np.tanh(x.numpy() @ first.weight.detach().numpy().T) @ last.weight.detach().numpy().T
    np.testing.assert_allclose(network(x).detach().numpy(), expected, atol=1e-6)


@torch.no_grad()
def test_tanh_without_gradients_is_torchs_to_rounding() -> None:
    x = torch.cat(
        [torch.linspace(-12, 12, 100_001), torch.logspace(-30, 1, 1000), torch.tensor([0.0, -torch.inf, torch.inf])]
    )
    torch.testing.assert_close(tanh(x).double(), x.double().tanh(), atol=0, rtol=3e-7)
    assert tanh(torch.tensor([torch.nan, 0.5])).isnan().tolist() == [True, False]
    assert tanh(torch.tensor(0.5)).shape == ()
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.int64):
        values = torch.ones(3, dtype=dtype)
        assert torch.equal(tanh(values), values.tanh())


@torch.no_grad()
def test_tanh_has_the_same_bits_anywhere_in_memory() -> None:
    x = torch.randn(300)
    whole = tanh(x)
    for first in range(70):
        for size in (1, 7, 16, 33, 128):
            part = slice(first, first + size)
            assert torch.equal(tanh(x[part]), whole[part])
            assert torch.equal(tanh(x[part].clone()), whole[part])


def test_tanh_under_the_transforms_of_torch() -> None:
    x = torch.randn(4, 5)
    slope = 1 - x.tanh().square()
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(lambda row: tanh(row).sum()))(x), slope)
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(tanh)(x), x.tanh())
        with warnings.catch_warnings(action="ignore"):  # tracing is deprecated, but still used
            traced = torch.jit.trace(tanh, (x,))
        torch.testing.assert_close(traced(2 * x), (2 * x).tanh())  # pyright: ignore[reportCallIssue]


def test_mlp_without_hidden_layers_is_linear() -> None:
    network, x = MLP(3, 2, hidden=()), torch.randn(4, 3)
    ((weight, bias),) = [(layer.weight, layer.bias) for layer in network.modules() if isinstance(layer, nn.Linear)]
    torch.testing.assert_close(network(x), x @ weight.T + bias)


def test_mlp_start_follows_its_generator_alone() -> None:
    def weights(seed: int) -> list[torch.Tensor]:
        network = MLP(3, 2, generator=torch.Generator().manual_seed(seed))
        return [parameter.detach() for parameter in network.parameters()]

    torch.manual_seed(1)
    one = weights(7)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(one, weights(7), strict=True))
    assert not torch.equal(one[0], weights(8)[0])


@pytest.mark.parametrize(
    ("name", "activation"),
    [("tanh", nn.Tanh()), ("relu", nn.ReLU()), ("elu", nn.ELU()), ("silu", nn.SiLU()), ("gelu", nn.GELU())],
)
def test_activations(name: Any, activation: nn.Module) -> None:
    network, x = MLP(2, 1, hidden=(3,), activation=name), torch.randn(8, 2)
    first, last = (layer for layer in network.modules() if isinstance(layer, nn.Linear))
    torch.testing.assert_close(network(x), last(activation(first(x))))


def test_unknown_activation() -> None:
    with pytest.raises(UserError, match=r"tanh, relu.*'sine'"):
        MLP(2, 1, activation="sine")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("bias", [True, False])
def test_linear_starts_at_zero(bias: bool) -> None:
    network = Linear(4, 2, bias=bias)
    assert network(torch.randn(3, 4)).tolist() == [[0.0, 0.0]] * 3
    assert len(list(network.parameters())) == 1 + bias


MAKE_CELL = {"gru": nn.GRUCell, "lstm": nn.LSTMCell}


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_recurrent_layers_are_those_of_torch(cell: Literal["gru", "lstm"]) -> None:
    """Compares two layers over five steps with torch's own layer with the same weights."""
    policy = Recurrent(3, 2, hidden=(4, 4), cell=cell, output_gain=1.0)
    layer = (nn.GRU if cell == "gru" else nn.LSTM)(3, 4, num_layers=2)
    for number, own in enumerate(policy.cells):
        assert isinstance(own, MAKE_CELL[cell])
        for name, value in own.named_parameters():
            nn.init.normal_(value)
            layer.get_parameter(f"{name}_l{number}").data.copy_(value)
    x, state = torch.randn(5, 7, 3), initial_state(policy, 7, torch.device("cpu"))
    assert state is not None
    expected, _ = layer(x)
    for t in range(5):
        output, state = policy(x[t], state)
        torch.testing.assert_close(output, policy.output(expected[t]))
    assert initial_state(MLP(3, 2), 7, torch.device("cpu")) is None


def test_recurrent_starts_orthogonal_and_follows_its_generator_alone() -> None:
    one, other = (Recurrent(5, 2, (4,), generator=torch.Generator().manual_seed(3)) for _ in range(2))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    for gate in one.cells[0].get_parameter("weight_hh").split(4):
        torch.testing.assert_close(gate @ gate.T, torch.eye(4))
    with pytest.raises(UserError, match=r"gru, lstm, got 'rnn'"):
        Recurrent(3, 2, cell="rnn")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("shape", "to_channels_first"), [((7, 6), None), ((7, 6, 3), (2, 0, 1)), ((3, 7, 6), (0, 1, 2))]
)
def test_convnet_computes_what_it_says(shape: tuple[int, ...], to_channels_first: tuple[int, ...] | None) -> None:
    policy = ConvNet(shape, 4, channels=(5, 6), hidden=(8,), output_gain=1.0)
    x = torch.randn(9, *shape)
    y = x[:, None] if to_channels_first is None else x.permute(0, *(1 + d for d in to_channels_first))
    for layer in policy.convolutions:
        y = nn.functional.conv2d(y, layer.get_parameter("weight"), stride=2, padding=1).relu()
    torch.testing.assert_close(policy(x.flatten(1)), policy.head(y.flatten(1)))
    torch.testing.assert_close(policy(x.flatten(1)[4]), policy(x.flatten(1))[4])


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4, 5)])
def test_convnet_needs_an_image(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"\(H, W, C\)"):
        ConvNet(shape, 2)


@pytest.mark.parametrize("start", [0, 5, -2])
def test_discrete_takes_the_largest_output(start: int) -> None:
    space = Discrete(3, start=start)
    action_map = ActionMap(space)
    assert action_map.size == 3
    actions = action_map(torch.tensor([[0.1, 0.3, 0.2], [5.0, -1.0, 0.0], [-3.0, -2.0, -1.0]]))
    assert actions.dtype == torch.int64
    assert actions.tolist() == [start + 1, start, start + 2]
    assert all(space.contains(np.int64(action)) for action in actions.tolist())


def test_clipped_outputs_reach_asymmetric_bounds() -> None:
    action_map = ActionMap(ASYMMETRIC)
    assert action_map.size == 3
    outputs = torch.tensor([[-1.0] * 3, [0.0] * 3, [1.0] * 3, [0.5, -0.5, 0.5], [9.0, -9.0, torch.inf]])
    expected = torch.tensor(
        [[-1.0, 2.0, -7.0], [1.0, 2.25, -3.5], [3.0, 2.5, 0.0], [2.0, 2.125, -1.75], [3.0, 2.0, 0.0]]
    )
    torch.testing.assert_close(action_map(outputs), expected)


def test_tanh_squashes_into_the_bounds() -> None:
    outputs = torch.tensor([[0.0, 1.0, -1.0], [50.0, -50.0, 50.0]])
    t = float(np.tanh(1.0))
    expected = torch.tensor([[1.0, 2.25 + 0.25 * t, -3.5 - 3.5 * t], [3.0, 2.0, 0.0]])
    torch.testing.assert_close(ActionMap(ASYMMETRIC, squash="tanh")(outputs), expected)


@pytest.mark.parametrize("squash", ["clip", "tanh"])
def test_unit_box(squash: Literal["clip", "tanh"]) -> None:
    outputs = torch.linspace(-3, 3, 12).view(4, 3)
    expected = outputs.clamp(-1, 1) if squash == "clip" else torch.from_numpy(np.tanh(outputs.numpy()))
    torch.testing.assert_close(ActionMap(Box(-1, 1, (3,), np.float32), squash)(outputs), expected)


@pytest.mark.parametrize("squash", ["clip", "tanh"])
def test_unbounded_outputs_are_the_actions(squash: Literal["clip", "tanh"]) -> None:
    outputs = torch.tensor([[-50.0, 3.5], [0.0, 1e6]])
    assert torch.equal(ActionMap(UNBOUNDED, squash)(outputs), outputs)


@pytest.mark.parametrize("squash", ["clip", "tanh"])
def test_only_entries_with_an_infinite_bound_are_unbounded(squash: Literal["clip", "tanh"]) -> None:
    space = Box(np.array([-2.0, -np.inf], np.float32), np.array([2.0, np.inf], np.float32))
    actions = ActionMap(space, squash)(torch.tensor([[50.0, 50.0], [-50.0, -50.0], [0.0, 0.0]]))
    assert actions.tolist() == [[2.0, 50.0], [-2.0, -50.0], [0.0, 0.0]]


@given(
    low=st.floats(-100, 100, width=32),
    width=st.floats(0.015625, 100, width=32),
    output=st.floats(-100, 100, width=32),
    squash=st.sampled_from(["clip", "tanh"]),
)
def test_actions_lie_in_the_space(low: float, width: float, output: float, squash: Literal["clip", "tanh"]) -> None:
    space = Box(np.array([low], np.float32), np.array([low + width], np.float32))
    for value in (output, 1.0, -1.0):
        action = ActionMap(space, squash)(torch.tensor([[value]]))[0]
        assert space.contains(action.numpy())


def test_outputs_are_not_changed() -> None:
    for action_map in (ActionMap(ASYMMETRIC), ActionMap(ASYMMETRIC, "tanh"), ActionMap(Box(-1, 1, (3,), np.float32))):
        outputs = torch.full((2, 3), 4.0)
        action_map(outputs)
        assert torch.equal(outputs, torch.full((2, 3), 4.0))


@pytest.mark.parametrize("space", [Box(-1, 1, (2, 3), np.float32), gymnasium.spaces.Dict({"a": Discrete(2)})], ids=str)
def test_unsupported_action_space_is_named(space: gymnasium.Space) -> None:
    with pytest.raises(UserError, match=type(space).__name__):
        ActionMap(space)


def test_observation_space() -> None:
    assert check_observation_space(Box(-np.inf, np.inf, (17,), np.float64)) == 17


@pytest.mark.parametrize("space", [Box(0, 255, (8, 8), np.uint8), Discrete(4)], ids=str)
def test_unsupported_observation_space_is_named(space: gymnasium.Space) -> None:
    with pytest.raises(UserError, match=type(space).__name__):
        check_observation_space(space)
