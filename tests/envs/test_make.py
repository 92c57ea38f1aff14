"""Creating environments by id."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import gymnasium
import pytest
import torch

from es_flipout.envs import BatchEnv, UnsupportedEnvironmentError, make_env, native_env_ids


@pytest.mark.parametrize("name", ["HalfCheetah", "halfcheetah-v5", "HalfCheeta-v5", "es_flipout/HalfCheetah"])
def test_unknown_id_suggests_the_nearest(name: str) -> None:
    with pytest.raises(UnsupportedEnvironmentError, match="did you mean HalfCheetah-v5") as caught:
        make_env(name, 1)
    assert "\n" not in str(caught.value)


def test_unknown_id_with_nothing_near() -> None:
    with pytest.raises(UnsupportedEnvironmentError, match=r"unknown environment 'qqqqqqqq'$"):
        make_env("qqqqqqqq", 1)


def test_module_that_cannot_be_imported() -> None:
    with pytest.raises(UnsupportedEnvironmentError, match="cannot import no_such_module"):
        make_env("no_such_module:Thing-v0", 1)


def test_missing_dependency() -> None:
    def entry_point(**kwargs: Any) -> gymnasium.Env:
        raise gymnasium.error.DependencyNotInstalled("Box3D is not installed, run `pip install box3d`")

    gymnasium.register("EsFlipoutMissing-v0", entry_point)
    with pytest.raises(UnsupportedEnvironmentError, match=r"EsFlipoutMissing-v0 needs a package .*pip install box3d"):
        make_env("EsFlipoutMissing-v0", 1)
    del gymnasium.registry["EsFlipoutMissing-v0"]


def test_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "Box2D", None)  # simulates a failing import
    for module in ("lunar_lander", "bipedal_walker", ""):
        monkeypatch.delitem(sys.modules, f"gymnasium.envs.box2d.{module}".rstrip("."), raising=False)
    with pytest.raises(UnsupportedEnvironmentError, match=r"^LunarLander-v3 needs .* 'es-flipout\[box2d\]'$"):
        make_env("LunarLander-v3", 1)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Hopper-v5", "FrozenLake-v1"])
def test_size_must_be_positive(env_id: str) -> None:
    with pytest.raises(ValueError, match="num_envs must be at least 1, got 0"):
        make_env(env_id, 0)


def test_simulators_on_the_cpu_refuse_other_devices() -> None:
    with pytest.raises(UnsupportedEnvironmentError, match="FrozenLake-v1 runs on the CPU only"):
        make_env("FrozenLake-v1", 1, device="cuda")
    with pytest.raises(UnsupportedEnvironmentError, match="Hopper-v5 runs on 'cpu' or 'cuda', not on 'meta'"):
        make_env("Hopper-v5", 1, device="meta")


@pytest.mark.parametrize("env_id", ["Hopper-v5", "CartPole-v1"])
def test_cuda_without_a_card(env_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UnsupportedEnvironmentError, match="device 'cuda' was requested, but torch finds no CUDA GPU"):
        make_env(env_id, 1, device="cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UnsupportedEnvironmentError, match=r"device 'cuda:3' .* torch finds only 1 CUDA GPU"):
        make_env(env_id, 1, device="cuda:3")


def test_mujoco_on_cuda_without_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setitem(sys.modules, "es_flipout.envs.mujoco_gpu", None)  # simulates a failing import in it
    with pytest.raises(
        UnsupportedEnvironmentError, match=r"Hopper-v5 on 'cuda' requires .* 'es-flipout\[gpu\]'"
    ) as caught:
        make_env("Hopper-v5", 1, device="cuda")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("env_id", [*native_env_ids(), "FrozenLake-v1"])
def test_attributes(env_id: str) -> None:
    env = make_env(f"es_flipout/{env_id}", 2)
    assert isinstance(env, BatchEnv)
    assert (env.env_id, env.num_envs, env.kwargs) == (env_id, 2, {})
    assert env.backend == native_env_ids().get(env_id, "gymnasium")
    assert env.max_episode_steps == gymnasium.spec(env_id).max_episode_steps
    assert env.device == torch.device("cpu")
    assert env.diverged.tolist() == [False, False]
    env.close()


@pytest.mark.slow
def test_import_leaves_mujoco_alone() -> None:
    code = "import sys, es_flipout.envs; assert 'mujoco' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ids_of_a_plugin_are_registered_when_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Like those of MinAtar, through the entry point of their namespace."""

    class Plugin:
        def load(self) -> Callable[[], None]:
            return lambda: gymnasium.register("Plugged/Pole-v0", "gymnasium.envs.classic_control.cartpole:CartPoleEnv")

    def plugins(group: str, name: str) -> list[Plugin]:
        return [Plugin()] if (group, name) == ("gymnasium.envs", "Plugged") else []

    monkeypatch.setattr("es_flipout.envs.make.entry_points", plugins)
    try:
        assert make_env("Plugged/Pole-v0", 2).observation_space.shape == (4,)
        with pytest.raises(UnsupportedEnvironmentError, match="unknown environment 'Plugged/Pale-v0'"):
            make_env("Plugged/Pale-v0", 2)
    finally:
        del gymnasium.registry["Plugged/Pole-v0"]
