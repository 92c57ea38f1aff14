"""Training past the end, from the configuration of another run, and with a preset in sight."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import SMALL

from es_flipout import cli
from es_flipout.config import TrainConfig
from es_flipout.presets import preset
from es_flipout.training.metrics import COLUMNS
from es_flipout.training.run_directory import load_agent, read_config

SHORT = ["CartPole-v1", *SMALL, "--learning-rate", "0.1", "--learning-rate-final", "0.01", "--sigma-final", "0.05"]


def train(run_dir: Path, *args: str) -> None:
    assert cli.main(["train", *SHORT, *args, "--run-dir", str(run_dir)]) == 0


def column(run_dir: Path, name: str) -> list[float]:
    rows = (run_dir / "metrics.csv").read_text(encoding="utf-8").splitlines()[1:]
    return [float(row.split(",")[COLUMNS.index(name)]) for row in rows]


def test_a_run_goes_on_past_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same as a run with that end from the beginning, whose sigma and learning rate change as the shorter one's."""
    run_dir, whole = tmp_path / "run", tmp_path / "whole"
    train(run_dir, "--generations", "4")
    capsys.readouterr()
    assert cli.main(["resume", str(run_dir), "--generations", "7"]) == 0
    said = capsys.readouterr().err
    assert "from 4 generations on, these keep their final values: sigma (0.05), learning rate (0.01)" in said
    train(whole, "--generations", "7", "--anneal-generations", "4")
    for which in ("best", "last"):
        tensors, expected = (load_agent(path, which)[0].state_dict() for path in (run_dir, whole))
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert column(run_dir, "learning_rate") == pytest.approx([0.1, 0.0775, 0.055, 0.0325, 0.01, 0.01, 0.01])
    schedule = read_config(run_dir).schedule
    assert (schedule.generations, schedule.anneal_generations, schedule.env_steps) == (7, 4, None)
    assert cli.main(["resume", str(run_dir), "--env-steps", "1e3"]) == 0
    assert column(run_dir, "env_steps")[-1] >= 1000 > column(run_dir, "env_steps")[-2]
    assert read_config(run_dir).schedule.anneal_generations == 4, "the first end stays that of the changes"


def test_an_end_that_has_passed_is_refused(tmp_path: Path, refused: Any, capsys: Any) -> None:
    train(tmp_path / "run", "--generations", "2")
    before = (tmp_path / "run" / "config.json").read_bytes()
    capsys.readouterr()
    assert "has already done 2 generations" in refused("resume", tmp_path / "run", "--generations", "1")
    assert (tmp_path / "run" / "config.json").read_bytes() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_another_device(tmp_path: Path, refused: Any, capsys: Any) -> None:
    run_dir = tmp_path / "run"
    train(run_dir, "--generations", "2")
    config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    config["compute"] |= {"device": "cuda", "physics": "gpu", "slots": 60000}  # as if it was made on a GPU
    config["schedule"]["generations"] = 3
    (run_dir / "config.json").write_text(json.dumps(config), encoding="utf-8")
    capsys.readouterr()
    assert "torch finds no CUDA GPU" in refused("resume", run_dir)
    assert cli.main(["resume", str(run_dir), "--device", "cpu"]) == 0
    compute = read_config(run_dir).compute
    assert (compute.device, compute.physics, compute.slots) == ("cpu", "cpu", None)
    assert cli.main(["resume", str(run_dir)]) == 0, "the run is on that device from now on"


def test_from_the_configuration_of_another_run(tmp_path: Path, refused: Any, capsys: Any) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    train(first, "--seed", "4")
    assert cli.main(["train", "--config", str(first), "--sigma", "0.2", "--run-dir", str(second)]) == 0
    assert read_config(second) == read_config(first).replace(sigma=0.2)
    file = str(first / "config.json")
    assert cli.main(["train", "Acrobot-v1", f"--config={file}", "--env-steps", "1", "--run-dir", str(third)]) == 0
    there = read_config(third)
    assert (there.task.env_id, there.schedule.seed, there.schedule.generations) == ("Acrobot-v1", 4, None)
    capsys.readouterr()
    strange = tmp_path / "strange.json"
    strange.write_text(read_config(first).replace(env_id="payload:CartPole-v1").to_json(), encoding="utf-8")
    assert "name the environment: es-flipout train payload:CartPole-v1" in refused("train", "--config", strange)
    strange.write_text(read_config(first).replace(backend="ray", ray_address="10.0.0.1:1").to_json(), encoding="utf-8")
    assert "name yours with --ray-address" in refused("train", "--config", strange)
    strange.write_text("{}", encoding="utf-8")
    assert "strange.json: not a configuration" in refused("train", "--config", strange)


def test_a_preset_is_shown_and_can_be_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["presets", "CartPole-v1"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("CartPole-v1 (tuned)")
    assert "* --population-size        32\n" in shown
    assert "  --optimizer              adam\n" in shown
    assert cli.main(["presets", "CartPole-v1", "--json"]) == 0
    text = capsys.readouterr().out
    assert TrainConfig.from_json(text) == preset("CartPole-v1")
