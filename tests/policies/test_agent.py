"""An agent acts with its network, observation statistics and action map; saving and loading is lossless."""

from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete, Tuple
from torch import Tensor

from es_flipout.config import TrainConfig
from es_flipout.errors import UserError
from es_flipout.policies.action_map import ActionMap
from es_flipout.policies.agent import Agent
from es_flipout.policies.observation_norm import Moments, ObservationNorm
from es_flipout.training.checkpoint import load_tensors, save_tensors

OBSERVATIONS = Box(-np.inf, np.inf, (3,), np.float64)
TORQUE = Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 10.0], np.float32))
CONFIG = TrainConfig.of("Any-v0", hidden=(8,), output_gain=1.0)


def agent(config: TrainConfig = CONFIG, action_space: gymnasium.Space = TORQUE) -> Agent:
    return Agent(config, OBSERVATIONS, action_space)


def observations(n: int = 50) -> Tensor:
    return 3 * torch.randn(n, 3, dtype=torch.float64) + 1


def experienced(config: TrainConfig = CONFIG) -> Agent:
    """Return an agent of which every tensor differs from its initial value."""
    made = agent(config)
    with torch.no_grad():
        for parameter in made.module.parameters():
            parameter.add_(torch.randn_like(parameter))
    if isinstance(made.norm, ObservationNorm):
        seen = observations()
        made.norm.update(Moments(float(len(seen)), seen.sum(0), seen.square().sum(0)))
    return made


def test_actions_are_those_of_the_normalized_network() -> None:
    made, obs = experienced(), observations()
    assert isinstance(made.norm, ObservationNorm)
    outputs = made.module(made.norm(obs))
    low, high = torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 10.0])
    expected = (low + high) / 2 + (high - low) / 2 * outputs.clamp(-1, 1)
    actions = made.act(obs, None)[0]
    torch.testing.assert_close(actions, expected)
    assert ((actions == low) | (actions == high)).any(), "no action was clipped: choose larger observations"
    assert not actions.requires_grad


def test_discrete_actions_are_the_best_ones() -> None:
    made, obs = agent(action_space=Discrete(4, start=2)), observations()
    actions = made.act(obs, None)[0]
    assert actions.dtype == torch.int64
    assert torch.equal(actions, made.module(obs.float()).argmax(-1) + 2)
    assert len(actions.unique()) > 1


def test_squash_is_the_configured_one() -> None:
    made, obs = agent(CONFIG.replace(squash="tanh")), observations()
    torch.testing.assert_close(made.act(obs, None)[0][:, 0], 2 * made.module(obs.float())[:, 0].tanh())


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("policy", ["mlp", "linear"])
def test_saved_and_loaded_to_the_bit(tmp_path: Path, policy: str, norm: bool) -> None:
    config = CONFIG.replace(policy=policy, observation_norm=norm)
    made, obs = experienced(config), observations()
    save_tensors(tmp_path / "policy.safetensors", made.state_dict())
    again = agent(config)
    assert not torch.equal(again.act(obs, None)[0], made.act(obs, None)[0])
    again.load_state_dict(load_tensors(tmp_path / "policy.safetensors"))
    assert torch.equal(again.act(obs, None)[0], made.act(obs, None)[0])
    assert set(again.state_dict()) == set(made.state_dict())
    assert any(name.startswith("observation_norm.") for name in made.state_dict()) == norm


def test_the_start_follows_from_the_seed_and_nothing_else() -> None:
    first = agent().state_dict()
    torch.manual_seed(12345)
    second = agent().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = agent(CONFIG.replace(seed=1)).state_dict()
    assert not torch.equal(first["policy.layers.0.weight"], other["policy.layers.0.weight"])


@pytest.mark.parametrize(
    "other",
    [
        CONFIG.replace(hidden=(9,)),
        CONFIG.replace(hidden=(8, 8)),
        CONFIG.replace(policy="linear"),
    ],
)
def test_tensors_of_another_network_are_refused(other: TrainConfig) -> None:
    with pytest.raises(UserError, match="does not fit the configuration") as refused:
        agent(other).load_state_dict(agent().state_dict())
    assert "\n" not in str(refused.value)


def test_missing_statistics_are_refused() -> None:
    without = agent(CONFIG.replace(observation_norm=False))
    with pytest.raises(UserError, match=r"does not fit the configuration.*count"):
        agent().load_state_dict(without.state_dict())


def test_several_choices_at_once() -> None:
    space = MultiDiscrete([2, 3], start=[5, -1])
    action = ActionMap(space)
    assert action.size == 5
    chosen = action(torch.tensor([[0.0, 1.0, 9.0, 0.0, 2.0], [3.0, 1.0, -2.0, 0.0, 2.0]]))
    assert chosen.tolist() == [[6, -1], [5, 1]]
    assert all(space.contains(row.numpy()) for row in chosen)
    binary = ActionMap(MultiBinary(3))
    assert binary(torch.tensor([[-0.1, 0.0, 0.1]])).tolist() == [[0, 0, 1]]


@pytest.mark.parametrize("space", [MultiDiscrete(np.array([[2, 3]])), Tuple((Discrete(2), Discrete(3)))])
def test_unsupported_action_spaces_are_named(space: gymnasium.Space) -> None:
    with pytest.raises(UserError, match=r"action space (MultiDiscrete|Tuple)"):
        agent(action_space=space)


@pytest.mark.parametrize("space", [Discrete(5), Box(0, 1, (2, 2))])
def test_unsupported_observation_spaces_are_named(space: gymnasium.Space) -> None:
    with pytest.raises(UserError, match=r"observation space (Discrete|Box)"):
        Agent(CONFIG, space, TORQUE)
