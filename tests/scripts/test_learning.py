"""The sweeps of ``scripts/learning/``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from es_flipout.config import TrainConfig
from scripts import report
from scripts.learning._runs import Job, adopt, final_scores, job, sweep

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


def test_equal_runs_are_taken_over(tmp_path: Path) -> None:
    other, out = tmp_path / "other", tmp_path / "out"
    sweep([Job("tiny", TINY)], other, 1)
    configs = report.read_json(other / "config.json")
    del configs["tiny"]["kernels"]  # an older version knew fewer options
    report.write_json(other / "config.json", configs)
    out.mkdir()
    adopt([Job("mine", TINY), Job("mine", TINY.replace(seed=1)), Job("wide", TINY.replace(hidden=(8,)))], other, out)
    adopt([Job("mine", TINY)], other, out)
    assert report.done(out, Job.KEY) == {("mine", "0")}
    assert len(report.read_csv(out / "curves.csv")) == 2


@pytest.mark.parametrize("folder", sorted(RESULTS.glob("families_*")), ids=lambda folder: folder.name)
def test_committed_configurations_are_still_understood(folder: Path, tmp_path: Path) -> None:
    configs = report.read_json(folder / "config.json")
    config = TrainConfig.of(**configs["HalfCheetah-v5: dense"])
    assert dataclasses.asdict(config)["strategy"]["perturbation"] == "dense"
    adopt([Job("same", config.replace(hidden=tuple(config.policy.hidden), seed=2))], folder, tmp_path)
    assert report.done(tmp_path, Job.KEY) == {("same", "2")}


def test_jobs_are_presets_on_one_core() -> None:
    made = job("name", "CartPole-v1", 3, env_steps=10)
    assert made.key == {"name": "name", "seed": 3}
    assert (made.config.compute.threads, made.config.schedule.env_steps) == (1, 10)
