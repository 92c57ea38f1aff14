"""Plans, compared with the bytes that are actually stored."""

import json
from typing import Any

import pytest
import torch
from populations import build_on_device
from toy_envs import lanes_of

from es_flipout.cli import main
from es_flipout.config import TrainConfig
from es_flipout.envs import make_env
from es_flipout.errors import UserError
from es_flipout.rollout import plan as plan_module
from es_flipout.rollout.memory import stored_bytes
from es_flipout.rollout.placement import planned
from es_flipout.rollout.plan import device_slots, make_plan, slots_in_turns
from es_flipout.training.setup import make_trainer

CONFIG = TrainConfig.of("CartPole-v1", population_size=2048, generations=1, hidden=(32, 16), row_block=512)
KINDS: list[dict[str, Any]] = [
    {},
    {"perturbation": "low_rank", "rank": 2},
    {"perturbation": "dense", "population_size": 512, "slots": 256, "row_block": 256},
    {"base": "gaussian", "bases": 8, "env_id": "Acrobot-v1", "hidden": (64, 64), "optimizer": "clipup"},
    {"policy": "recurrent", "hidden": (16,), "cell": "lstm", "observed": (0, 2)},
    {"episodes": 3, "antithetic": False, "observation_norm": False, "population_size": 1001},
]


@pytest.mark.parametrize("changes", KINDS)
def test_predicts_what_a_run_on_a_device_stores(changes: dict[str, Any]) -> None:
    settings = {"slots": 512} | changes
    config = CONFIG.replace(episode_cap=3, episode_cap_until=1.0, score_every=10**6, **settings)
    on_cpu = config.replace(device="cpu", physics="cpu")
    trainer = make_trainer(on_cpu, build=build_on_device)
    trainer.generation()
    population = trainer.strategy.ask()
    stored = stored_bytes(trainer.strategy, population, trainer.player)
    planned_run = make_plan(config.replace(device="cuda", physics="gpu"))
    predicted = planned_run.total - planned_run.parts["working memory"] - planned_run.parts["CUDA graphs"]
    assert stored > 2e5
    assert predicted == pytest.approx(stored, rel=0.1)
    assert planned_run.parts["perturbations"] == pytest.approx(stored_bytes(population), rel=0.02)


def test_counts_on_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Like a GPU, the device "meta" raises at tensors that are mixed with those of the CPU."""
    monkeypatch.setattr(plan_module, "_counting_device", lambda: torch.device("meta"))
    assert make_plan(CONFIG.replace(device="cuda", physics="gpu", slots=512)).slots == 512


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "HalfCheetah-v5"])
def test_predicts_what_a_run_on_the_cpu_stores(env_id: str) -> None:
    config = CONFIG.replace(env_id=env_id, device="cpu", physics="cpu", slots=300, threads=1, row_block=128)
    predicted = make_plan(config)
    trainer = make_trainer(config)
    population = trainer.strategy.ask()
    selection = population.select(torch.arange(300))
    assert predicted.blocks == 3
    assert predicted.parts["perturbations"] == pytest.approx(stored_bytes(population), rel=0.02)
    rows = stored_bytes(population, selection) - stored_bytes(population)
    assert predicted.parts["selection"] == pytest.approx(rows, rel=0.02)
    assert predicted.parts["environments"] == pytest.approx(stored_bytes(*lanes_of(trainer)), rel=0.1)
    trainer.player.close()


def test_sums_over_observations_do_not_grow_with_the_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIG.replace(device="cuda", physics="gpu", slots=1024)
    all_slots = make_plan(config).parts["slots and queue"]
    monkeypatch.setattr(plan_module, "MOMENT_JOBS", 100)
    rows = (1024 - 100) + (2048 - 100)  # fewer slots and fewer jobs with two float64 sums of four numbers
    assert all_slots - make_plan(config).parts["slots and queue"] == 2 * 8 * 4 * rows


def with_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(plan_module, "free_bytes", lambda device: free)


def test_slots_are_the_most_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIG.replace(device="cuda", physics="gpu", population_size=16384, row_block=None)
    with_free(monkeypatch, 10**12)
    assert device_slots(config) == make_plan(config).slots == 16384
    room = make_plan(config.replace(slots=1000)).total / 0.9
    with_free(monkeypatch, round(room))
    slots = device_slots(config)
    assert slots == 964  # at most 1000 fit, and 17 equal turns need no more
    assert make_plan(config.replace(slots=slots)).total <= 0.9 * room


@pytest.mark.parametrize(
    ("jobs", "fits", "busy", "slots"),
    [
        (100, 100, None, 100),
        (100, 99, None, 50),  # rather than one slot in a second turn of its own
        (100, 30, None, 25),
        (101, 30, None, 26),
        (100, 100, 40, 50),
        (100, 100, 51, 100),
        (100, 10, 40, 10),  # memory decides
        (7, 9, 8, 7),
    ],
)
def test_slots_play_equal_turns(jobs: int, fits: int, busy: int | None, slots: int) -> None:
    assert slots_in_turns(jobs, fits, busy) == slots


@pytest.mark.parametrize(("env_id", "slots"), [("Hopper-v5", 64), ("HalfCheetah-v5", 256), ("CartPole-v1", 256)])
def test_where_episodes_can_end_there_are_fewer_slots(env_id: str, slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environments are those of the CPU, which have the same tasks and are created faster."""
    monkeypatch.setattr(plan_module, "BUSY_SLOTS", {"torch": 65536, "mujoco": 60})
    monkeypatch.setattr(plan_module, "_warp_env", lambda config, slots: make_env(env_id, slots, threads=1))
    with_free(monkeypatch, 10**12)
    config = CONFIG.replace(env_id=env_id, population_size=256, device="cuda", physics="gpu")
    assert device_slots(config) == slots


def test_a_card_too_small_for_one_slot_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, 10**6)
    with pytest.raises(UserError, match=r"needs .* GiB even with one environment at a time.*reduce --population-size"):
        device_slots(CONFIG.replace(device="cuda", physics="gpu"))


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "CartPole-v1", "--population-size", "256", "--device", "cuda"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "256 members" in shown
    assert "perturbations, second buffer" in shown
    assert "total" in shown
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["total"] == sum(found["parts"].values())
    assert (found["slots"], found["physics"]) == (256, "gpu")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "which environment?"),
        (["CartPole-v1", "--populaton-size", "2"], "did you mean --population-size?"),
        (["CartPole-v1", "--device", "cpu", "--physics", "gpu"], "physics gpu requires device cuda"),
        (["Taxi-v3", "--device", "cuda", "--physics", "gpu"], "no GPU physics"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("perturbation", ["flipout", "low_rank"])
def test_predicts_what_the_gpu_allocates(perturbation: Any) -> None:
    config = CONFIG.replace(
        population_size=65536, hidden=(256, 256), perturbation=perturbation, device="cuda", row_block=None
    )
    predicted = make_plan(planned(config))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    trainer = make_trainer(config.replace(episode_cap=5, episode_cap_until=1.0, score_every=10**6))
    trainer.generation()
    peak = torch.cuda.max_memory_allocated() - before
    # What graphs keep in their pool is reserved, but not allocated; what is cached is reserved, too.
    assert predicted.total - predicted.parts["CUDA graphs"] == pytest.approx(peak, rel=0.1)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - before <= 1.1 * predicted.total
