import json
import math
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from es_flipout.bench import compare, compare_report
from es_flipout.bench.compare import CompareBench
from es_flipout.bench.compare_report import PowerLaw, dollars, power_law, rate_per_worker
from es_flipout.bench.contenders import STAGES, Contender
from es_flipout.cluster.connect import Connection
from es_flipout.config import TrainConfig
from es_flipout.envs import UnsupportedEnvironmentError
from es_flipout.envs.mujoco_cpu import usable_cores
from es_flipout.errors import UserError
from es_flipout.training.setup import make_trainer


def printed() -> tuple[Console, StringIO]:
    text = StringIO()
    return Console(file=text, width=120), text


# Statistics.


def test_rate_per_worker_is_the_least_squares_slope() -> None:
    assert rate_per_worker([1, 2, 4], [10.0, 20.0, 40.0]) == pytest.approx(10)
    # sum n y / sum n^2 = (1 * 12 + 2 * 18) / 5
    assert rate_per_worker([1, 2], [12.0, 18.0]) == pytest.approx(9.6)
    slope, best = rate_per_worker([1, 2, 3], [9.0, 15.0, 31.0]), math.inf
    for tried in torch.linspace(slope - 1, slope + 1, 201).tolist():
        best = min(best, sum((y - tried * n) ** 2 for n, y in zip([1, 2, 3], [9, 15, 31], strict=True)))
    assert sum((y - slope * n) ** 2 for n, y in zip([1, 2, 3], [9, 15, 31], strict=True)) <= best


def test_power_law_finds_its_own_numbers() -> None:
    law = power_law([1, 2, 4, 8], [5.0 * n**0.8 for n in (1, 2, 4, 8)])
    assert law is not None
    assert law.factor == pytest.approx(5)
    assert law.exponent == pytest.approx(0.8)
    assert law.workers_for(5 * 100**0.8) == pytest.approx(100)
    assert PowerLaw(10.0, 1.0).workers_for(30) == pytest.approx(3)
    assert power_law([2], [10.0]) is None


def test_dollars() -> None:
    assert dollars(1e9 / 3600, price_hour=2.5) == pytest.approx(2.5)
    assert dollars(1e6, price_hour=3.6) == pytest.approx(1.0)


# Options.


@pytest.mark.parametrize(
    ("option", "wrong"),
    [
        ({"workers": "1,x"}, "workers must be numbers such as 1,2,4, got '1,x'"),
        ({"workers": "0"}, "workers must be numbers"),
        ({"devices": "tpu"}, "devices must be cpu, cuda"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"seconds": -1.0}, "seconds must be 0 or greater"),
        ({"price_core_hour": 0.0}, "price-core-hour must be greater than 0"),
    ],
)
def test_bad_options_are_refused(option: dict[str, Any], wrong: str) -> None:
    with pytest.raises(UserError, match=wrong):
        CompareBench(env_id="CartPole-v1", **option)


def test_options_are_read() -> None:
    options = CompareBench(env_id="CartPole-v1", workers="4,1, 2", devices="cpu")
    assert options.worker_counts() == (1, 2, 4)
    assert options.device_names() == ("cpu",)
    assert CompareBench(env_id="CartPole-v1").worker_counts()[-1] == usable_cores()


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'es-flipout\[ray\]'"):
        compare.run(CompareBench(env_id="CartPole-v1"), printed()[0])


def test_a_run_of_another_environment_is_refused(tmp_path: Path) -> None:
    make_trainer(TrainConfig.of("CartPole-v1", generations=1), tmp_path / "run").create()
    with pytest.raises(UserError, match="run is a run of CartPole-v1, not of Pendulum-v1"):
        compare._center(CompareBench(env_id="Pendulum-v1", run_dir=tmp_path / "run"))


def test_timed_environment_is_the_environment() -> None:
    options = CompareBench(env_id="CartPole-v1", population_size=8, hidden=(4,))
    config = compare._center(options).config
    plain, clocked = make_trainer(config), make_trainer(config, build=compare._build_timed)
    expected = plain.generation()
    split = Contender("engine_cpu", clocked, 1).split()
    assert torch.equal(clocked.generation().lengths, plain.generation().lengths)
    assert not torch.equal(expected.lengths, plain.generation().lengths)
    assert sum(value for value in split.values() if value is not None) == pytest.approx(1)
    assert all(value is not None and 0 <= value < 1 for value in split.values())
    assert split["physics"]


# The whole benchmark.


def test_compare(ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "cores", 2)
    console, text = printed()
    options = CompareBench(
        env_id="CartPole-v1",
        workers="1,2,3",
        devices="cpu",
        price_core_hour=0.05,
        population_size=16,
        hidden=(8,),
        rounds=2,
        seconds=0.0,
        out=tmp_path / "new",
    )
    path, rounds_before = tmp_path / "new" / "CartPole-v1.json", []
    split = Contender.split

    def looking(contender: Contender) -> Any:
        found = json.loads(path.read_text())["results"]["compare"]["contenders"][contender.name]
        rounds_before.append(len(found["steps_per_s_by_round"]))
        return split(contender)

    monkeypatch.setattr(Contender, "split", looking)
    returned = compare.run(options, console)
    assert rounds_before == [2] * 5, "rates are on disk before the split of time is measured"
    written = json.loads(path.read_text())
    assert set(written) == {"command", "options", "environment", "results"}
    assert (tmp_path / "new" / "CartPole-v1.png").read_bytes().startswith(b"\x89PNG")
    results = written["results"]["compare"]
    assert results == json.loads(json.dumps(returned["results"]["compare"]))
    points = results["contenders"]
    assert list(points) == ["classic_1", "classic_2", "classic_3", "engine_cpu", "engine_ray"]
    for point in points.values():
        assert len(point["steps_per_s_by_round"]) == 2
        assert point["mean_length"] > 1
        assert point["split"]["update"] > 0
    for point in [point for name, point in points.items() if name != "engine_ray"]:
        assert sum(point["split"].values()) == pytest.approx(1)
        assert point["split"]["physics"] > 0
    assert points["engine_ray"]["split"]["physics"] is None  # the workers do not report it
    # Three workers on two cores are measured, but tell nothing about the rate of a core.
    assert results["scaling"]["workers"] == [1, 2]
    assert "3 classic workers share 2 cores" in results["warnings"][0]
    assert "3 classic workers share 2 cores" in " ".join(text.getvalue().split())
    equal = results["equivalent_cores"]["engine_cpu"]
    rates = {name: point["steps_per_s_by_round"] for name, point in points.items()}
    slopes = [rate_per_worker([1, 2], pair) for pair in zip(rates["classic_1"], rates["classic_2"], strict=True)]
    cores = sorted(rate / slope for rate, slope in zip(rates["engine_cpu"], slopes, strict=True))
    assert equal["linear"] == pytest.approx({"min": cores[0], "median": sum(cores) / 2, "max": cores[1]})
    price = 1e9 / rates["classic_2"][0] / 3600 * 0.05 * 2
    spread = points["classic_2"]["dollars_per_1e9"]
    assert price in (pytest.approx(spread["min"]), pytest.approx(spread["max"]))
    for word in ("contender", "classic_2", "engine_cpu", "equivalent classic cores", "physics", "does the work of"):
        assert word in text.getvalue()


@pytest.mark.slow
def test_compare_plays_around_the_policy_of_a_run(ray: Any, tmp_path: Path) -> None:
    config = TrainConfig.of("CartPole-v1", generations=1, policy="linear", observation_norm=False, sigma=0.02)
    trainer = make_trainer(config, tmp_path / "run")
    trainer.create()
    # Pushes in the direction in which the pole leans and turns, which keeps it up for hundreds of steps.
    weight = dict(trainer.strategy._mean.named_parameters())["layer.weight"]
    with torch.no_grad():
        weight.copy_(torch.tensor([[0.0, 0.0, -1.0, -1.0], [0.0, 0.0, 1.0, 1.0]]))
    trainer.save()
    options = CompareBench(
        env_id="CartPole-v1",
        workers="1",
        devices="cpu",
        population_size=8,
        rounds=1,
        seconds=0.0,
        run_dir=tmp_path / "run",
    )
    results = compare.run(options, printed()[0])["results"]["compare"]
    assert results["mean_policy"] == "run run"
    assert results["policy"] == {"kind": "linear", "hidden": (64, 64), "sigma": 0.02}
    lengths = {name: point["mean_length"] for name, point in results["contenders"].items()}
    assert min(lengths.values()) > 100, "an untrained policy falls after 10 to 25 steps"
    assert results["contenders"]["classic_1"]["dollars_per_1e9"] is None


def test_unknown_environments_are_named(ray: Any) -> None:
    with pytest.raises(UnsupportedEnvironmentError, match="CartPoole"):
        compare.run(CompareBench(env_id="CartPoole-v1", workers="1", devices="cpu"), printed()[0])


def test_no_gpu_is_said(ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device cuda was requested, but"):
        compare.run(CompareBench(env_id="CartPole-v1", workers="1", devices="cuda"), printed()[0])


def test_beyond_what_was_measured_is_called_extrapolated() -> None:
    results = {
        "scaling": {"workers": [1, 2], "exponent": {"median": 0.9}},
        "contenders": {},
        "equivalent_cores": {
            "engine_cpu": {"linear": {"median": 1.5, "min": 1.4, "max": 1.6}, "power_law": None, "extrapolated": False},
            "engine_cuda": {
                "linear": {"median": 50.0, "min": 45.0, "max": 55.0},
                "power_law": {"median": 80.0, "min": 70.0, "max": 90.0},
                "extrapolated": True,
            },
        },
    }
    assert compare_report._sentences(results) == [
        "engine_cpu does the work of 1.5 (1.4 to 1.6) classic cores.",
        "engine_cuda does the work of 50.0* (45.0 to 55.0) classic cores.",
        "* More than 2 classic workers were not measured: extrapolated by linear scaling. With the measured scaling "
        "(workers to the power of 0.90): engine_cuda 80.0 (70.0 to 90.0).",
    ]


def test_the_figure_has_whole_numbers_and_a_line_for_the_gpu() -> None:
    def point(rate: float, workers: int | None = None, device: str = "cpu") -> dict[str, Any]:
        spread = {"median": rate, "min": 0.9 * rate, "max": 1.1 * rate}
        return {"workers": workers, "steps_per_s": spread, "device": device, "split": dict.fromkeys(STAGES, 0.25)}

    results = {
        "env_id": "HalfCheetah-v5",
        "population_size": 512,
        "scaling": {"workers": [1, 2], "per_worker": {"median": 900.0}},
        "contenders": {
            "classic_1": point(910.0, 1),
            "classic_2": point(1790.0, 2),
            "engine_cpu": point(40_372.0),
            "engine_cuda": point(1_234_567.0, device="cuda"),
        },
        "equivalent_cores": {
            name: {"linear": {"median": n}} for name, n in (("engine_cpu", 45), ("engine_cuda", 1372))
        },
    }
    figure = compare_report.figure_of(results)
    figure.canvas.draw()
    rates = figure.axes[0]
    (line,) = [line for line in rates.lines if line.get_label() == "engine, GPU: 1,234,567"]
    assert np.all(np.asarray(line.get_ydata()) == 1_234_567.0)
    low, high = rates.get_xlim()
    shown = [tick for tick in rates.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    assert [tick.label1.get_text() for tick in shown][:6] == ["1", "2", "5", "10", "20", "50"]
    assert [text.get_text() for text in rates.get_yticklabels() if low < text.get_position()[1]]
    for text in rates.get_yticklabels():
        assert text.get_text().replace(",", "").isdigit(), text.get_text()
    assert not any(text.get_text() for axis in (rates.xaxis, rates.yaxis) for text in axis.get_ticklabels(minor=True))
