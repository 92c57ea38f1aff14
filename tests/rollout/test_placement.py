"""Placement: what is requested and chosen, and that it does not change the results."""

import dataclasses
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from populations import build_on_device
from torch import Tensor

from es_flipout.cli import main
from es_flipout.config import TrainConfig
from es_flipout.envs import UnsupportedEnvironmentError
from es_flipout.errors import UserError
from es_flipout.rollout import builder, placement
from es_flipout.rollout.builder import make_lanes
from es_flipout.rollout.episodes import Episodes
from es_flipout.rollout.placement import Placement, faster, measured, missing_cuda, place
from es_flipout.rollout.players import LocalPlayer
from es_flipout.strategy.evolution_strategy import EvolutionStrategy
from es_flipout.training.run_directory import read_config
from es_flipout.training.setup import make_trainer, resume_trainer
from es_flipout.training.trainer import Trainer

CPU, MIXED, GPU = Placement("cpu", "cpu"), Placement("cuda", "cpu"), Placement("cuda", "gpu")
CONFIG = TrainConfig.of("CartPole-v1", population_size=16, generations=4, hidden=(8,), score_every=2)


def with_gpu(monkeypatch: pytest.MonkeyPatch, rates: dict[Placement, float]) -> list[Placement]:
    """Pretend that there is a GPU and that measurements give ``rates``."""
    asked = []

    def measure(config: TrainConfig, say: Any) -> float:
        asked.append(Placement(config.compute.device, config.compute.physics))
        return rates[asked[-1]]

    monkeypatch.setattr(placement, "missing_cuda", lambda: None)
    monkeypatch.setattr(placement, "measured", measure)
    monkeypatch.setattr(placement, "device_slots", lambda config: 7)
    return asked


def test_without_a_gpu_it_is_the_cpu_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "missing_cuda", lambda: "there is none")
    monkeypatch.setattr(placement, "measured", lambda config: pytest.fail("measured"))
    said: list[str] = []
    found = place(CONFIG, said.append)
    assert (found.compute.device, found.compute.physics, found.compute.slots, said) == ("cpu", "cpu", None, [])
    for asked, message in (
        ({"device": "cuda"}, "device cuda was requested, but there is none; use --device cpu"),
        ({"physics": "gpu"}, "physics gpu was requested, but there is none; use --physics cpu"),
    ):
        with pytest.raises(UserError, match=message):
            place(CONFIG.replace(**asked))
    with pytest.raises(UserError, match="physics gpu"):
        place(CONFIG.replace(device="cpu", physics="gpu"))


@pytest.mark.parametrize(
    ("env_id", "asked", "options"),
    [
        ("Humanoid-v5", {}, [CPU, MIXED, GPU]),
        ("CartPole-v1", {}, [CPU, GPU]),
        ("MountainCarContinuous-v0", {"physics": "cpu"}, [CPU, MIXED]),
        ("Taxi-v3", {}, [CPU, MIXED]),
        ("Humanoid-v5", {"physics": "cpu"}, [CPU, MIXED]),
        ("Humanoid-v5", {"physics": "gpu"}, []),
        ("Humanoid-v5", {"device": "cuda"}, []),
        ("Humanoid-v5", {"device": "cpu"}, []),
        ("Humanoid-v5", {"backend": "ray"}, []),
    ],
)
def test_what_is_measured(
    env_id: str, asked: dict[str, Any], options: list[Placement], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = with_gpu(monkeypatch, {CPU: 1.0, MIXED: 2.0, GPU: 3.0})
    place(CONFIG.replace(env_id=env_id, **asked))
    assert seen == options


@pytest.mark.parametrize(
    ("env_id", "asked", "chosen", "slots"),
    [
        ("Humanoid-v5", {"device": "cuda"}, GPU, 7),
        ("Humanoid-v5", {"device": "cuda", "slots": 5}, GPU, 5),
        ("Humanoid-v5", {"device": "cuda", "physics": "cpu"}, MIXED, None),
        ("Taxi-v3", {"device": "cuda"}, MIXED, None),
        ("CartPole-v1", {"physics": "gpu"}, GPU, 7),
        ("CartPole-v1", {}, GPU, 7),
        ("Taxi-v3", {}, MIXED, None),
        ("CartPole-v1", {"device": "cpu"}, CPU, None),
    ],
)
def test_what_is_chosen(
    env_id: str, asked: dict[str, Any], chosen: Placement, slots: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpu(monkeypatch, {CPU: 1.0, MIXED: 2.0, GPU: 3.0})
    found = place(CONFIG.replace(env_id=env_id, **asked))
    assert (found.compute.device, found.compute.physics, found.compute.slots) == (*chosen, slots)
    # a resumed run has this configuration: nothing is measured again, and nothing changes
    monkeypatch.setattr(placement, "measured", lambda config: pytest.fail("measured"))
    assert place(found) == found


def test_the_choice_is_told_with_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpu(monkeypatch, {CPU: 1234.4, GPU: 98765.0})
    said: list[str] = []
    place(CONFIG, said.append)
    assert said == ["device: GPU (environment steps per second measured: CPU 1,234, GPU 98,765)"]


def test_what_does_not_work_is_left_out() -> None:
    def measure(option: Placement) -> float:
        if option == GPU:
            raise UnsupportedEnvironmentError("the driver is\ntoo old")
        return {CPU: 2.0, MIXED: 1.0}[option]

    said: list[str] = []
    assert faster([CPU, MIXED, GPU], measure, said.append) == CPU
    assert said[0] == "not possible on the GPU: the driver is too old"

    def broken(option: Placement) -> float:
        raise UserError("broken")

    with pytest.raises(UserError, match="no device can be used: CPU: broken; GPU: broken"):
        faster([CPU, GPU], broken, said.append)


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (RuntimeError("Failed to find C compiler.\nSpecify CC"), "RuntimeError: Failed to find C compiler."),
        (RuntimeError("CUDA error: an illegal memory access\nCUDA kernel"), "RuntimeError: CUDA error: an illegal mem"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_any_fault_of_a_gpu_leaves_the_cpu(error: Exception, shown: str) -> None:
    def measure(option: Placement) -> float:
        if option.device == "cuda":
            raise error
        return 1.0

    said: list[str] = []
    assert faster([CPU, GPU], measure, said.append) == CPU
    assert said[0].startswith(f"not possible on the GPU: {shown}")
    assert "\n" not in said[0]

    def bug(option: Placement) -> float:
        raise error

    with pytest.raises(type(error)):
        faster([CPU, GPU], bug)


@pytest.mark.parametrize("where", ["make_env", "EvolutionStrategy"])
def test_a_run_goes_on_without_a_broken_gpu(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fault may appear wherever the GPU is first used: with the environments or with the perturbations."""
    monkeypatch.setattr(placement, "missing_cuda", lambda: None)
    monkeypatch.setattr(placement, "_SECONDS", 0.02)
    make = getattr(builder, where)

    def faulty(*args: Any, **kwargs: Any) -> Any:
        if any(str(value) == "cuda" for value in (*args, *kwargs.values())):
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be")
        return make(*args, **kwargs)

    if where == "make_env":
        monkeypatch.setattr(builder, where, faulty)
    else:
        monkeypatch.setattr(builder.make_strategy, "__defaults__", (None, faulty))
    run_dir = tmp_path / "run"
    options = ["--generations", "1", "--population-size", "8", "--hidden", "4", "--score-episodes", "1"]
    env_id = "CartPole-v1" if where == "make_env" else "Blackjack-v1"
    assert main(["train", env_id, "--run-dir", str(run_dir), "--env-steps", "100", "--threads", "1", *options]) == 0
    shown = " ".join(capsys.readouterr())
    faults = [line for line in shown.splitlines() if "ECC" in line]
    assert len(faults) == 1
    assert "not possible on the GPU" in faults[0]
    assert "RuntimeError: CUDA error: uncorrectable ECC error encountered" in faults[0]
    assert read_config(run_dir).compute.device == "cpu"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            RuntimeError("Unexpected error from cudaGetDeviceCount(). Did you run"),
            "failed: Unexpected error from cudaGet",
        ),
        (
            torch.AcceleratorError("CUDA error: no kernel image is available\nCUDA kernel"),
            "failed: CUDA error: no kernel im",
        ),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access"), r"failed: Triton Error \[CUDA\]: an illegal"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to"), "the GPU has too little memory for this"),
        (RuntimeError("CUDA error: out of memory"), "the GPU has too little memory for this"),
        (RuntimeError("Failed to allocate 9 bytes on device 'cuda:0'"), "the GPU has too little memory for this"),
    ],
)
@pytest.mark.parametrize("when", ["at the start", "while training"])
def test_a_broken_gpu_that_was_asked_for_is_one_line(
    when: str,
    error: Exception,
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def faulty(*args: Any, **kwargs: Any) -> Any:
        raise error

    device = "cuda" if when == "at the start" else "cpu"
    if device == "cuda":
        monkeypatch.setattr(placement, "missing_cuda", lambda: None)
        monkeypatch.setattr(builder.make_strategy, "__defaults__", (None, faulty))
    else:
        monkeypatch.setattr(EvolutionStrategy, "tell", faulty)
    run_dir = tmp_path / "run"
    options = ["--generations", "1", "--population-size", "8", "--hidden", "4", "--physics", "cpu", "--device", device]
    assert main(["train", "Pendulum-v1", "--run-dir", str(run_dir), "--threads", "1", "--starts", "1", *options]) == 2
    (shown,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    assert re.search(line, shown)
    goes_on = "failed" in line and when == "while training"
    assert (f"continue with: es-flipout resume {run_dir}" in shown) == goes_on
    assert ("use --device cpu" in shown) == ("failed" in line)
    assert run_dir.exists() == (when == "while training")


@pytest.mark.parametrize("slow", [True, False])
def test_a_long_compilation_is_announced(slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    make, said = builder.make_env, []

    def make_slowly(*arguments: Any, **options: Any) -> Any:
        if slow:
            while not said:
                time.sleep(0.01)
        return make(*arguments, **options)

    monkeypatch.setattr(builder, "_SLOW_S", 0.02 if slow else 60.0)
    config = CONFIG.replace(device="cpu")
    one_env = builder.make_one_env(config)
    monkeypatch.setattr(builder, "make_one_env", lambda config: one_env)
    monkeypatch.setattr(builder, "make_env", make_slowly)
    builder.device_player(config, torch.device("cpu"), said.append)
    assert ["compiling the physics of CartPole-v1" in line for line in said] == [True] * slow


def test_no_physics_for_the_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpu(monkeypatch, {})
    with pytest.raises(UserError, match="Taxi-v3 has no GPU physics; use --physics cpu"):
        place(CONFIG.replace(env_id="Taxi-v3", physics="gpu"))


@pytest.mark.parametrize("env_id", ["Hopper-v5", "Pendulum-v1"])
def test_a_measurement_plays_as_the_run_would(env_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    caps, clock = [], [0.0]
    config = CONFIG.replace(
        env_id=env_id, device="cpu", physics="cpu", threads=1, population_size=64, slots=9, episodes=3
    )
    play = LocalPlayer.play

    def listening(self: LocalPlayer, population: Any, episodes: Episodes, *args: Any) -> Any:
        caps.append((*episodes.seeds.shape, episodes.step_cap))
        rollout = play(self, population, episodes, *args)
        clock[0] += 0.01 * rollout.env_steps
        return rollout

    monkeypatch.setattr(LocalPlayer, "play", listening)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    assert measured(config, seconds=2.56) == pytest.approx(100.0)
    # 8 members with 16 steps each: 128 steps at 100 per second; twice as many fill the time
    assert caps == [(8, 1, 1), (8, 1, 16), (8, 1, 32)]


def test_the_mixed_placement_has_two_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("es_flipout.rollout.builder.usable_cores", lambda: 2)
    for env_id in ("Hopper-v5", "MountainCar-v0", "Blackjack-v1"):
        for device, lanes in (("cpu", 1), ("cuda", 1 if env_id == "MountainCar-v0" else 2)):
            envs = make_lanes(CONFIG.replace(env_id=env_id, device=device), 5)
            assert [env.num_envs for env in envs] == ([3, 2] if lanes == 2 else [5])
            for env in envs:
                env.close()


def test_two_halves_of_any_gymnasium_environment_give_the_same_bits() -> None:
    config = CONFIG.replace(env_id="Blackjack-v1", device="cpu", slots=7, row_block=8)
    trainers = [make_trainer(config.replace(overlap=overlap)) for overlap in (False, True)]
    one, two = (trainer.generation() for trainer in trainers)
    assert torch.equal(one.episode_returns, two.episode_returns)
    assert torch.equal(one.lengths, two.lengths)


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    return trainer.tensors()


@pytest.mark.parametrize("changes", [{}, {"episodes": 2, "slots": 5}, {"policy": "recurrent", "observed": (0, 2)}])
def test_a_run_on_a_device_is_the_same_run(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIG.replace(row_block=8, **changes)
    here = make_trainer(config)
    here.train()
    there = make_trainer(config, build=build_on_device)
    there.train()
    expected, found = state_of(here), state_of(there)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert dataclasses.replace(there.progress, wall_s=0.0) == dataclasses.replace(here.progress, wall_s=0.0)


def test_a_run_on_a_device_resumes_to_the_bit(tmp_path: Path) -> None:
    config = CONFIG.replace(slots=5, checkpoint_every=1, sigma_final=0.01)
    whole = make_trainer(config, build=build_on_device)
    whole.train()
    first = make_trainer(config, tmp_path / "run", build=build_on_device)
    first.create()
    assert (read_config(tmp_path / "run").compute.device, read_config(tmp_path / "run").compute.physics) == (
        "cpu",
        "cpu",
    )
    generation = first.generation

    def twice() -> Any:
        if first.progress.generation == 1:
            first.interrupted = True
        return generation()

    first.generation = twice
    first.train()
    assert not first.finished
    resumed = resume_trainer(tmp_path / "run", build=build_on_device)
    resumed.train()
    expected, found = state_of(whole), state_of(resumed)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_config_says_what_was_chosen(tmp_path: Path) -> None:
    assert (
        main(
            [
                "train",
                "CartPole-v1",
                "--generations",
                "1",
                "--run-dir",
                str(tmp_path / "r"),
                "--evaluation-episodes",
                "1",
            ]
        )
        == 0
    )
    config = read_config(tmp_path / "r")
    assert config.compute.device in ("cpu", "cuda")
    assert config.compute.physics in ("cpu", "gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "CartPole-v1", "--generations", "1", "--device", "cuda"]) == 2
    error = capsys.readouterr().err
    assert "device cuda was requested, but torch finds no CUDA GPU" in error
    assert error.count("\n") == 1


def test_a_driver_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    def unavailable() -> bool:
        warnings.warn(
            "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040). Please update",
            stacklevel=1,
        )
        return False

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", unavailable)
    assert missing_cuda() == (
        "torch finds no CUDA GPU (CUDA initialization: The NVIDIA driver on your system is too old (found version 11040))"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Blackjack-v1", "Hopper-v5"])
def test_the_gpu_is_measured_and_trains(env_id: str, tmp_path: Path) -> None:
    config = CONFIG.replace(env_id=env_id, episode_cap=20, episode_cap_until=1.0)
    trainer = make_trainer(config)
    trainer.train()
    assert trainer.finished
    mixed = make_trainer(config.replace(device="cuda", physics="cpu"))
    mixed.train()
    assert mixed.finished
