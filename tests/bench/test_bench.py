import dataclasses
import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from toy_envs import lanes_of

from es_flipout.bench import forward, rollout, ways
from es_flipout.bench.timing import Measured, Spread, interleave, repeated
from es_flipout.errors import UserError
from es_flipout.rollout.memory import stored_bytes
from es_flipout.training.setup import make_trainer


def fake(rates: list[float], calls: list[str], name: str) -> Callable[[], Measured]:
    waiting = list(rates)

    def measure() -> Measured:
        calls.append(name)
        return Measured(work=waiting.pop(0) * 2.0, seconds=2.0)

    return measure


def test_interleaved_rounds_leave_the_warm_up_out() -> None:
    calls: list[str] = []
    measures = {"a": fake([1, 10, 20], calls, "a"), "b": fake([2, 30, 40], calls, "b")}
    counts: list[int] = []
    found = interleave(measures, rounds=2, after_round=lambda found: counts.append(len(found.rates["b"])))
    assert counts == [1, 2]
    assert calls == ["a", "b"] * 3
    assert found.rates == {"a": [10, 20], "b": [30, 40]}


def test_ratio_is_taken_round_by_round() -> None:
    # The machine is ten times slower in the second round; the ratio of medians would be 2, or 0.2.
    calls: list[str] = []
    found = interleave({"a": fake([50, 5, 50], calls, "a"), "b": fake([100, 10, 25], calls, "b")}, rounds=3, warmup=0)
    assert found.ratio("a", "b") == Spread(median=0.5, min=0.5, max=2.0)
    assert found.rate("a") == Spread(median=50, min=5, max=50)


def test_rounds_must_be_positive() -> None:
    with pytest.raises(ValueError, match="rounds"):
        interleave({}, rounds=0)


def test_repeated_fills_the_time_and_leaves_the_first_call_out() -> None:
    now, calls = [0.0], [0]

    def call() -> None:
        calls[0] += 1
        now[0] += 100.0 if calls[0] == 1 else 0.01

    measure = repeated(call, seconds=1.0, clock=lambda: now[0])
    measured = measure()
    assert measured.work == pytest.approx(100, abs=1)
    assert measured.rate == pytest.approx(100)


def test_repeated_calls_at_least_once() -> None:
    now = [0.0]

    def slow() -> None:
        now[0] += 60.0

    assert repeated(slow, seconds=0.1, clock=lambda: now[0])() == Measured(1, 60.0)


@pytest.mark.parametrize("bench", ["forward", "ways", "rollout"])
def test_every_point_is_on_disk_when_the_next_one_begins(
    bench: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, begun = tmp_path / "points.json", []
    common: dict[str, Any] = {"populations": (2, 4), "rounds": 1, "json": path}
    if bench == "rollout":
        options: Any = rollout.RolloutBench(env_ids=("HalfCheetah-v5",), **common)
        module, function, run = rollout, "_measure_point", rollout.run
    else:
        chosen = ("plain",) if bench == "ways" else ()
        options = forward.ForwardBench(
            widths=(8,), ways=chosen, precisions=("ieee",), wide=0, memory_members=0, **common
        )
        module, function, run = forward, "measure" if bench == "ways" else "_measure_point", forward.run
    whole = getattr(module, function)

    def held() -> list[dict[str, Any]]:
        return json.loads(path.read_text())["results"][bench] if path.exists() else []

    def measure(*arguments: Any) -> dict[str, Any]:
        begun.append(len(held()))
        if fails and len(begun) == 2:
            raise RuntimeError("the card fell off")
        if bench != "rollout":
            return whole(*arguments)
        spread = {"median": 1.0, "min": 1.0, "max": 1.0}
        return {"steps_per_s": {"physics": spread, "training": spread}, "training_to": {"physics": spread}}

    monkeypatch.setattr(module, function, measure)
    fails = True
    with pytest.raises(RuntimeError, match="fell off"):
        run(options, printed()[0])
    first, failed = held()
    assert (first["population"], failed["population"], failed["error"]) == (2, 4, "RuntimeError: the card fell off")
    fails = False
    resumed = run(dataclasses.replace(options, resume=True), printed()[0])["results"][bench]
    assert (resumed, begun) == ([first, failed], [0, 1])
    run(options, printed()[0])
    assert begun == [0, 1, 2, 1]  # the old file is there until the first new point is
    with pytest.raises(UserError, match="other options"):
        run(dataclasses.replace(options, resume=True, rounds=2), printed()[0])
    monkeypatch.setattr("es_flipout.bench.timing.environment", lambda: {"hardware": "another"})
    with pytest.raises(UserError, match="another machine"):
        run(dataclasses.replace(options, resume=True), printed()[0])


def test_stored_bytes_counts_shared_memory_once() -> None:
    whole = torch.zeros(100)
    holder = SimpleNamespace(parts={"a": whole[:50], "b": [whole[50:], whole]})
    holder.itself = holder
    assert stored_bytes(holder) == 400


def printed() -> tuple[Console, StringIO]:
    text = StringIO()
    return Console(file=text, width=200), text


def written(path: Path, returned: dict[str, Any]) -> dict[str, Any]:
    found = json.loads(path.read_text())
    assert set(found) == {"command", "options", "environment", "results"}
    assert found["command"] == returned["command"]
    return found["results"]


def test_forward(tmp_path: Path) -> None:
    console, text = printed()
    threads = torch.get_num_threads()
    options = forward.ForwardBench(
        widths=(8,),
        populations=(16,),
        families=("flipout", "flipout_gaussian_8", "low_rank", "dense", "vmap"),
        rounds=1,
        seconds_per_point=0.001,
        memory_members=64,
        memory_hidden=(8, 8),
        json=tmp_path / "new" / "forward.json",
    )
    assert options.json is not None
    results = written(options.json, forward.run(options, console))
    (point,) = results["forward"]
    assert set(point["ratio"]) == set(options.families)
    assert all(spread["median"] > 0 for spread in point["ratio"].values())
    memory = {row["family"]: row["population_bytes"] for row in results["memory"]}
    weights = 349 * 8 + 9 * 8 + 9 * 17
    assert memory["dense"] == 64 * weights * 4
    assert memory["flipout"] < memory["low_rank"] < memory["dense"]
    assert "flipout" in text.getvalue()
    assert torch.get_num_threads() == threads


def test_forward_leaves_out_what_does_not_fit() -> None:
    console, text = printed()
    options = forward.ForwardBench(
        widths=(8,), populations=(16,), families=("dense",), rounds=1, seconds_per_point=0.001, memory_limit_gib=1e-6,
        memory_members=0,
    )  # fmt: skip
    (point,) = forward.run(options, console)["results"]["forward"]
    needed = 16 * (18 * 8 + 9 * 8 + 9 * 6) * 4 * 1.5
    assert point["left_out_bytes"] == {"dense": needed}
    assert "- (0.03 MB)" in text.getvalue()


def test_forward_by_way(tmp_path: Path) -> None:
    pytest.importorskip("triton")  # its interpreter stands in for the device
    console, text = printed()
    options = forward.ForwardBench(
        widths=(8,), populations=(4,), rounds=1, seconds_per_point=0.001, ways=ways.WAYS, precisions=("ieee", "bf16"),
        wide=32, wide_batch=4, json=tmp_path / "ways.json",
    )  # fmt: skip
    assert options.json is not None
    results = written(options.json, forward.run(options, console))
    assert [point["precision"] for point in results["ways"]] == ["ieee", "bf16"]
    for point in results["ways"]:
        assert point["reference"] == "plain"
        assert set(point["ratio"]) == set(ways.WAYS) - {"plain", "plain_compiled"}
        assert set(point["left_out"]) == {"plain_compiled"}
        assert all(spread["median"] > 0 for spread in point["ratio"].values())
    (wide,) = results["wide"]
    assert set(wide["left_out"]) == {"flipout_fp8"}
    assert set(wide["ratio"]) == {"low_rank", "low_rank_kernel", "flipout", "flipout_layers", "flipout_library"}
    assert "flipout_mlp" in text.getvalue()


def test_forward_by_way_says_what_it_leaves_out() -> None:
    console, _ = printed()
    options = forward.ForwardBench(
        widths=(8,), populations=(4,), rounds=1, seconds_per_point=0.001, ways=("plain", "dense"), precisions=("ieee",),
        wide=0, memory_limit_gib=1e-6,
    )  # fmt: skip
    (point,) = forward.run(options, console)["results"]["ways"]
    assert point["left_out"] == {"dense": "needs 0.01 MB"}


def test_the_reference_is_compiled_for_its_shape_and_captured_like_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise ratios would flatter the population forward: it would be compared with launches from Python."""
    events: list[tuple[str, object]] = []

    def compiled(module: torch.nn.Module, **options: object) -> torch.nn.Module:
        events.append(("compile", options))
        return module

    def graphed(device: torch.device, forward: ways.Forward) -> ways.Forward:
        events.append(("graph", device.type))
        return forward

    def make(point: ways.Point, way: ways.Way) -> ways.Forward:
        return ways.network_way(forward._vmap, point, way)

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(torch.compiler, "reset", lambda: events.append(("reset", None)))
    monkeypatch.setattr(ways, "graphed", graphed)
    monkeypatch.setattr(ways, "repeated_on", lambda device, call, seconds: repeated(call, seconds))
    for population in (4, 8):
        point = forward._ways_point(torch.device("cpu"), 8, population, "ieee")
        point = ways.replace(point, device=torch.device("cuda"))
        found = ways.measure(("plain_compiled", "plain", "plain_eager"), make, point, 1, 0.001)
        assert found["reference"] == "plain_compiled"
        options = {"mode": "max-autotune-no-cudagraphs", "dynamic": False, "fullgraph": True}
        assert events == [("reset", None), ("compile", options), ("graph", "cuda"), ("graph", "cuda")]
        events.clear()


def test_a_way_that_fails_ends_nothing() -> None:
    def make(point: ways.Point, way: str) -> ways.Forward:
        if way in ("plain_compiled", "flipout"):
            raise RuntimeError(f"no kernel\nfor {way}")
        return lambda: None

    point = forward._ways_point(torch.device("cpu"), 8, 4, "ieee")
    found = ways.measure(("plain_compiled", "plain", "flipout", "dense"), make, point, 1, 0.001)
    assert found["left_out"] == {way: f"RuntimeError: no kernel for {way}" for way in ("plain_compiled", "flipout")}
    assert (found["reference"], set(found["ratio"])) == ("plain", {"dense"})
    point = {"width": 8, "population": 4, **ways.measure(("flipout", "dense"), make, point, 1, 0.001)}
    assert (point["reference"], point["ratio"], set(point["seconds"])) == (None, {}, {"dense"})
    ways.table("without a reference", [point])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_forward_on_a_device_that_is_not_there() -> None:
    console, _ = printed()
    with pytest.raises(UserError, match="no CUDA GPU"):
        forward.run(forward.ForwardBench(device="cuda"), console)


def test_vmap_computes_the_perturbed_networks_of_the_right_shape() -> None:
    module = forward.MLP(17, 6, (8,))
    output = forward._vmap(module, torch.zeros(4, 17))()
    assert isinstance(output, torch.Tensor)
    assert output.shape == (4, 6)
    assert len(output.unique(dim=0)) == 4


@pytest.mark.parametrize(("env_id", "preset"), [("HalfCheetah-v5", True), ("Humanoid-v5", False)])
def test_rollout(env_id: str, preset: bool, tmp_path: Path) -> None:
    console, text = printed()
    path = tmp_path / "rollout.json"
    options = rollout.RolloutBench(
        env_ids=(env_id,),
        populations=(4,),
        rounds=1,
        seconds=0.01,
        shortest_episode=3,
        threads=1,
        json=path,
        preset=preset,
    )
    *presets, point = written(path, rollout.run(options, console))["rollout"]
    forces = {"physics_and_forces"} if env_id == "Humanoid-v5" else set()
    assert set(point["training_to"]) == {"physics"} | forces
    assert set(point["steps_per_s"]) == {"training", "physics"} | forces
    assert all(spread["median"] > 0 for spread in point["steps_per_s"].values())
    assert env_id in text.getvalue()
    assert [(point["population"], point["preset"]) for point in presets] == ([(64, True)] if preset else [])
    assert ("64 (preset)" in text.getvalue()) == preset


@pytest.mark.parametrize("horizon", [None, 3])
def test_rollout_replays_the_physics_of_training(horizon: int | None) -> None:
    limit = json.dumps({"max_episode_steps": 5 if horizon is None else 12})
    config = rollout.TrainConfig.of(
        "HalfCheetah-v5", env_kwargs=limit, population_size=4, generations=9, threads=1, horizon=horizon, overlap=True
    )
    trainer = make_trainer(config)
    physics = rollout._Physics(trainer, generations=1 if horizon is None else 3)
    lanes = lanes_of(trainer)
    assert len(lanes) == 2
    measured = physics.plain()()
    assert measured.work == (20 if horizon is None else 36)
    # The final states are bitwise identical to those of the recorded generation (nothing was reset after it).
    ends = torch.cat([torch.from_numpy(lane._fields["qpos"].copy()) for lane in lanes])  # pyright: ignore
    assert torch.equal(torch.from_numpy(physics.env._fields["qpos"].copy()), ends)


def test_rollout_needs_physics_of_our_own() -> None:
    console, _ = printed()
    with pytest.raises(UserError, match="torch backend"):
        rollout.run(rollout.RolloutBench(env_ids=("CartPole-v1",), populations=(4,)), console)


@pytest.mark.slow
def test_rollout_against_gymnasium() -> None:
    console, _ = printed()
    options = rollout.RolloutBench(
        env_ids=("HalfCheetah-v5",), populations=(4,), rounds=1, seconds=0.05, shortest_episode=3, gymnasium=True
    )
    (point,) = rollout.run(options, console)["results"]["rollout"]
    assert point["training_to"]["gymnasium"]["median"] > 0
