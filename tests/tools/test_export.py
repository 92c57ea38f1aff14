"""An exported policy plays whole episodes as the agent does, to the bit where physics would amplify a difference."""

import json
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import onnxruntime
import pytest
import torch
from tools.runs import write_run
from torch import nn

import es_flipout
from es_flipout.errors import UserError
from es_flipout.tools import export as module
from es_flipout.tools.export import export, load_onnx, load_program
from es_flipout.tools.policy import TrainedPolicy, make_gymnasium_env

POLICIES: dict[str, dict[str, Any]] = {
    "linear": {"env_id": "HalfCheetah-v5", "policy": "linear", "squash": "tanh"},
    "mlp": {"env_id": "CartPole-v1", "observed": (2, 3)},
    "recurrent": {"env_id": "Pendulum-v1", "policy": "recurrent", "cell": "lstm", "hidden": (4, 3)},
    "convnet": {"env_id": "MinAtar/Breakout-v1", "policy": "convnet"},
}


def in_onnxruntime(path: Path, policy: TrainedPolicy, seed: int) -> tuple[float, int]:
    """Play an episode with onnxruntime alone; return return and length."""
    session = onnxruntime.InferenceSession(path)
    env = make_gymnasium_env(policy.config)
    state = {each.name: np.zeros((1, each.shape[1])) for each in session.get_inputs()[1:]}
    observation, _ = env.reset(seed=seed)
    total, steps, ended = 0.0, 0, False
    while not ended:
        action, *after = session.run(None, {"observation": observation[None], **state})
        state = dict(zip(state, after, strict=True))
        observation, reward, terminated, truncated, _ = env.step(np.asarray(action)[0])
        total, steps, ended = total + float(reward), steps + 1, terminated or truncated
    env.close()
    return total, steps


def by_agent(policy: TrainedPolicy, seed: int) -> tuple[float, int]:
    env = make_gymnasium_env(policy.config)
    observation, _ = env.reset(seed=seed)
    policy.reset()
    total, steps, ended = 0.0, 0, False
    while not ended:
        observation, reward, terminated, truncated, _ = env.step(policy.act(observation))
        total, steps, ended = total + float(reward), steps + 1, terminated or truncated
    env.close()
    return total, steps


@pytest.mark.parametrize("options", POLICIES.values(), ids=list(POLICIES))
def test_onnx_plays_the_episodes_of_the_agent(options: dict[str, Any], tmp_path: Path) -> None:
    policy = es_flipout.load(write_run(tmp_path / "run", **options))
    signature, check = export(policy, tmp_path / "policy.onnx", generation=7)
    assert check.difference == 0
    for seed in (3, 4):
        assert in_onnxruntime(tmp_path / "policy.onnx", policy, seed) == by_agent(policy, seed)
    session = onnxruntime.InferenceSession(tmp_path / "policy.onnx")
    described = json.loads(session.get_modelmeta().custom_metadata_map["es_flipout"])
    assert (described["env_id"], described["generation"]) == (options["env_id"], 7)
    assert [each.name for each in session.get_inputs()] == signature.inputs
    assert session.get_inputs()[0].shape == ["batch", *signature.observation]
    assert session.get_outputs()[0].shape == ["batch", *signature.action]


def test_batches_are_rows(tmp_path: Path) -> None:
    policy = es_flipout.load(write_run(tmp_path / "run", "Pendulum-v1", policy="recurrent", cell="gru"))
    export(policy, tmp_path / "policy.pt2")
    act = load_program(tmp_path / "policy.pt2")
    observations, states = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32), np.ones((5, 8))
    actions, after = act(observations, states)
    rows = [act(observations[i : i + 1], states[i : i + 1]) for i in range(5)]
    np.testing.assert_allclose(actions, np.concatenate([row[0] for row in rows]), rtol=1e-6)
    np.testing.assert_allclose(np.asarray(after), np.concatenate([np.asarray(row[1]) for row in rows]), rtol=1e-12)


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


class Bessel(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x)


@pytest.mark.parametrize("layer", [Branch(), Bessel()], ids=["trace", "operator"])
def test_layer_that_cannot_be_exported_is_named(layer: nn.Module, tmp_path: Path) -> None:
    policy = es_flipout.load(write_run(tmp_path / "run", "Pendulum-v1", policy="linear"))
    policy.agent.module = nn.Sequential(policy.agent.module, layer)
    with pytest.raises(UserError, match=rf"layer policy\.1 \({type(layer).__name__}\) cannot be exported: \w"):
        export(policy, tmp_path / "policy.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "CartPole-v1"])
def test_policy_that_acts_differently_is_not_written(
    env_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = es_flipout.load(write_run(tmp_path / "run", env_id, policy="linear"))
    other = load_program

    def wrong(path: Path) -> module.Exported:
        act = other(path)
        return lambda observation, state: (1 - act(observation, state)[0], None)

    monkeypatch.setattr(module, "load_program", wrong)
    with pytest.raises(UserError, match="does not act like the agent"):
        export(policy, tmp_path / "policy.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = es_flipout.load(write_run(tmp_path / "run", "Pendulum-v1", policy="linear"))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"pip install 'es-flipout\[export\]'"):
        export(policy, tmp_path / "policy.onnx")


class Given(gymnasium.Env):
    """An environment with the given action space."""

    observation_space = gymnasium.spaces.Box(-1, 1, (4,), np.float32)

    def __init__(self, action_space: gymnasium.Space) -> None:
        self.action_space = action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.np_random.random(4, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert action in self.action_space
        return self.np_random.random(4, np.float32), float(np.sum(action)), False, False, {}


@pytest.mark.parametrize(
    ("space", "ending"),
    [
        (gymnasium.spaces.Discrete(2, start=3), ".pt2"),
        (gymnasium.spaces.MultiDiscrete([2, 3, 4], start=[5, -1, 0]), ".onnx"),
        (gymnasium.spaces.MultiDiscrete(np.array([[2, 3], [4, 2]]), start=np.array([[1, 2], [3, 4]])), ".pt2"),
        (gymnasium.spaces.MultiBinary((2, 3)), ".onnx"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_actions_are_elements_of_the_space(space: gymnasium.Space, ending: str, tmp_path: Path) -> None:
    gymnasium.register("Given-v0", lambda **_: Given(space), max_episode_steps=20)
    output = tmp_path / f"policy{ending}"
    try:
        policy = es_flipout.load(write_run(tmp_path / "run", "Given-v0", policy="linear"))
        signature, check = export(policy, output)
    finally:
        gymnasium.registry.pop("Given-v0")
    assert check.difference == 0
    assert (signature.action, signature.action_dtype) == (space.shape, "int64")
    observations = np.random.default_rng(0).uniform(-5, 5, (50, 4)).astype(np.float32)
    actions, _ = (load_onnx if ending == ".onnx" else load_program)(output)(observations, None)
    own = np.stack([policy.act(row) for row in observations])
    np.testing.assert_array_equal(actions, own)
    assert all(np.squeeze(action).astype(space.dtype) in space for action in actions)
    assert len(np.unique(own, axis=0)) > 1
