"""The sweeps of ``scripts/learning/``."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from es_flipout.config import TrainConfig
from es_flipout.presets import preset
from es_flipout.training.setup import make_trainer
from es_flipout.training.trainer import Trainer
from scripts import report
from scripts.learning._runs import Job, compare, final_scores, job, sweep

RESULTS = Path(__file__).parents[2] / "results"
TINY = TrainConfig.of(
    "CartPole-v1",
    population_size=4,
    hidden=(4,),
    generations=2,
    score_every=1,
    score_episodes=2,
    evaluation_episodes=2,
    threads=1,
    device="cpu",
)


def test_sweep_keeps_runs_and_configurations(tmp_path: Path) -> None:
    jobs = [Job("tiny", TINY.replace(seed=seed)) for seed in (0, 1)]
    sweep(jobs, tmp_path, 1)
    sweep([*jobs, Job("wide", TINY.replace(hidden=(8,)))], tmp_path, 1)
    runs, curves = (report.read_csv(tmp_path / f"{name}.csv") for name in ("runs", "curves"))
    assert list(runs["name"]) == ["tiny", "tiny", "wide"]
    assert len(curves) == 6
    assert {name: len(scores) for name, scores in final_scores(tmp_path).items()} == {"tiny": 2, "wide": 1}
    configs = report.read_json(tmp_path / "config.json")
    assert configs["wide"]["hidden"] == [8]
    assert configs["tiny"] == json.loads(json.dumps(TINY.replace(seed=1).flat()))


def test_an_interrupted_run_continues(tmp_path: Path) -> None:
    sweep([Job("tiny", TINY)], tmp_path / "whole", 1)
    begun = make_trainer(TINY, tmp_path / "parts" / "runs" / "tiny_seed0")
    begun.create()
    begun.generation()
    begun.progress = dataclasses.replace(begun.progress, generation=1, env_steps=123)
    begun.save()
    sweep([Job("tiny", TINY)], tmp_path / "parts", 1)
    whole, parts = (report.read_csv(tmp_path / name / "runs.csv") for name in ("whole", "parts"))
    assert list(whole["mean_return"]) == list(parts["mean_return"])
    assert list(report.read_csv(tmp_path / "parts" / "curves.csv")["generation"]) == [2]  # the first was not repeated


def test_an_interrupted_sweep_keeps_no_row_of_an_unfinished_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep([Job("tiny", TINY)], tmp_path / "whole", 1)
    monkeypatch.setattr(Trainer, "train", lambda self: self.interrupt())
    with pytest.raises(KeyboardInterrupt):
        sweep([Job("tiny", TINY)], tmp_path / "parts", 1)
    assert not (tmp_path / "parts" / "runs.csv").exists()
    monkeypatch.undo()
    sweep([Job("tiny", TINY)], tmp_path / "parts", 1)
    whole, parts = (report.read_csv(tmp_path / name / "runs.csv") for name in ("whole", "parts"))
    assert list(whole["mean_return"]) == list(parts["mean_return"])


@pytest.mark.parametrize("folder", sorted(RESULTS.glob("families_*")), ids=lambda folder: folder.name)
def test_committed_configurations_are_still_understood(folder: Path) -> None:
    configs = report.read_json(folder / "config.json")
    config = TrainConfig.of(**configs["HalfCheetah-v5: dense"])
    assert dataclasses.asdict(config)["strategy"]["perturbation"] == "dense"


def test_jobs_are_presets_on_one_core() -> None:
    made = job("name", "CartPole-v1", 3, env_steps=10)
    assert made.key == {"name": "name", "seed": 3}
    assert (made.config.compute.threads, made.config.schedule.env_steps) == (1, 10)


def test_a_variant_changes_options_of_its_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = preset("CartPole-v1").replace(threads=1).flat()
    tiny = {name: value for name, value in TINY.flat().items() if value != usual[name]}
    monkeypatch.setattr(sys, "argv", ["script.py", "--out", str(tmp_path), "--seeds", "0", "--processes", "1"])
    compare(None, {"CartPole-v1": {**tiny, "env_steps": None}}, {"ranks": {}, "wide": {"hidden": (8,)}})
    configs = report.read_json(tmp_path / "config.json")
    assert {name: config["hidden"] for name, config in configs.items()} == {
        "CartPole-v1: ranks": [4],
        "CartPole-v1: wide": [8],
    }
