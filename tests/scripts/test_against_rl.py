"""``scripts/learning/against_rl.py``: what is kept, what is run again, and what the table makes of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from es_flipout.config import TrainConfig
from es_flipout.rollout.builder import make_agent, make_one_env
from es_flipout.training import run_directory
from es_flipout.training.evaluate import evaluate
from scripts import report
from scripts.learning import _rl_worker, against_rl
from scripts.learning._rl_worker import Clock, Spec, Vector, load_es_flipout, name_of, play, snapshots


def spec(folder: Path, **changes: Any) -> Spec:
    values = {
        "method": "es_flipout",
        "env_id": "InvertedPendulum-v5",
        "seed": 0,
        "cores": [0],
        "marks": [1.0, 2.0, 4.0],
    }
    return Spec(**{**values, "folder": str(folder), **changes})


def test_marks_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(_rl_worker.time, "perf_counter", lambda: now)
    clock = Clock(spec(tmp_path))
    clock.start()

    def save(folder: Path) -> None:
        nonlocal now
        now += 50.0  # not training
        folder.mkdir()

    for seconds, steps in ((0.5, 10), (2.5, 20), (0.5, 30)):
        now += seconds
        clock.look(steps, save)
    clock.finish(40, save)
    clock.finish(50, save)
    assert [(row["mark_s"], row["wall_s"], row["env_steps"], row["final"]) for row in snapshots(tmp_path)] == [
        (2.0, 3.0, 20, False),
        (4.0, 3.5, 40, True),
    ]


def test_episodes_are_those_of_the_engines_own_evaluation(tmp_path: Path) -> None:
    config = TrainConfig.of("InvertedPendulum-v5", hidden=(4,), output_gain=1.0, generations=1)
    env = make_one_env(config)
    agent = make_agent(config, env)
    env.close()
    folder = tmp_path / name_of(1.0)
    run_directory.create(folder, config)
    run_directory.save_policy(folder, agent.state_dict(), "best")
    returns = play(load_es_flipout(spec(tmp_path), folder, 6), "InvertedPendulum-v5", 6)
    own = evaluate(agent, config, 6)
    assert len(set(returns)) > 1
    assert (returns.mean(), returns.std(), returns.max()) == (own.mean_return, own.std_return, own.max_return)


def row(method: str, cores: int, seed: int, mark: float, score: float) -> dict[str, Any]:
    run = {"env_id": "HalfCheetah-v5", "method": method, "cores": cores, "seed": seed}
    return {
        **run,
        "mark_s": mark,
        "wall_s": mark + 0.5,
        "env_steps": 1e5 * mark,
        "final": mark == 20.0,
        "mean_return": score,
    }


def test_table_and_figure(tmp_path: Path) -> None:
    rows = [row("ppo", 1, seed, mark, 10.0 * mark * (seed + 1)) for seed in (2, 0, 1) for mark in (2.0, 10.0, 20.0)]
    rows += [row("es_flipout", 2, seed, mark, 100.0 * mark) for seed in (0, 1) for mark in (10.0, 20.0)]
    rows += [row("es_flipout", 2, seed, 10.0, 9e9) for seed in (2, 3, 4)]  # runs that are not complete
    rows += [row("sac", 1, 0, 10.0, 7e7)]
    against_rl.write_lines(tmp_path / "rows.jsonl", rows)
    config = {"seconds": 20.0, "episodes": 2, "final_episodes": 4, "side_by_side": 2, "all_cores": 2}
    report.write_json(tmp_path / "config.json", config)
    trials = [
        {"env_id": "HalfCheetah-v5", "kind": "dummy", "n_envs": n, "threads": 1, "steps_per_s": n} for n in (8, 4)
    ]
    against_rl.write_lines(tmp_path / "trials.jsonl", trials)
    text = against_rl.table(tmp_path)
    assert [line for line in text.splitlines() if line.startswith("| Half")] == [
        "| HalfCheetah-v5 | es_flipout, 2 cores |  | 1,000 | **2,000** | 2,000, 2,000 | 5.00 | 2M | 20.5 (20.5 to 20.5) |",
        "| HalfCheetah-v5 | PPO, 1 core | 40 | 200 | **400** | 200, 400, 600 | 1.00 | 2M | 20.5 (20.5 to 20.5) |",
    ]
    assert "8 in one process, 1 threads, 8 steps/s (the slowest of 2: 4)" in text
    against_rl.plot(tmp_path)
    assert (tmp_path / "figure.png").exists()


def test_environments_to_choose_from_leave_enough_steps_to_each() -> None:
    found = list(against_rl.choices(2, 512))
    assert Vector("dummy", 8, 2) in found
    assert all(512 // choice.n_envs >= 64 for choice in against_rl.choices(64, 512))


@pytest.mark.slow
def test_run_that_was_trained_is_only_played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, kept = tmp_path / "out", tmp_path / "policies"
    words = "--venv no --methods es_flipout --cores one --envs Swimmer-v5 --seeds 0 --seconds 1 --episodes 1 --final-episodes 2"
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(out), "--snapshots", str(kept), *words.split()])
    monkeypatch.setattr(against_rl, "installed", lambda *_: Path(sys.executable))
    against_rl.main()
    rows = against_rl.read_lines(out / "rows.jsonl")
    assert rows[-1]["final"]
    assert rows[-1]["episodes"] == 2
    assert np.isfinite(rows[-1]["mean_return"])
    saved = kept / "Swimmer-v5_es_flipout_1-core_seed0" / "snapshots.jsonl"
    before = saved.read_text()

    against_rl.write_lines(out / "rows.jsonl", rows[:-1])
    against_rl.main()
    assert against_rl.read_lines(out / "rows.jsonl") == rows
    assert saved.read_text() == before

    saved.unlink()  # trained again: nothing is left of the old rows
    against_rl.write_lines(out / "rows.jsonl", [{**rows[0], "final": False, "mean_return": 12345.0}])
    against_rl.main()
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert [row["final"] for row in rows].count(True) == 1
    assert 12345.0 not in [row["mean_return"] for row in rows]
