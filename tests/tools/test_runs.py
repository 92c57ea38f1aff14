"""Tables and curves of runs."""

import json
from pathlib import Path

import numpy as np
import pytest
from tools.runs import write_run

from es_flipout import cli
from es_flipout.errors import UserError
from es_flipout.tools.curves import read_groups, sorted_values
from es_flipout.tools.runs import list_runs
from es_flipout.training.lock import locked
from es_flipout.training.metrics import COLUMNS


def write_metrics(run_dir: Path, scores: list[float | None], every: int = 100) -> None:
    """Write metrics whose mean return is twice the score, or 7 in generations without a score."""
    lines = [",".join(COLUMNS)]
    for generation, score in enumerate(scores, start=1):
        row = {"generation": generation, "env_steps": every * generation, "wall_s": generation / 2, "score": score}
        row["mean_return"] = 7 if score is None else 2 * score
        lines.append(",".join("" if row.get(name) is None else str(row[name]) for name in COLUMNS))
    (run_dir / "metrics.csv").write_text("\n".join([*lines, "9,9"]) + "\n")  # the last row is incomplete


def test_runs_are_listed_with_their_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished = write_run(tmp_path / "a" / "finished", "CartPole-v1", (4,), seed=3)
    (finished / "evaluation.json").write_text('{"mean_return": 499.5}')
    write_run(tmp_path / "stopped", "CartPole-v1", (4, 8), seed=2)
    write_run(tmp_path / "other", "Pendulum-v1")
    broken = write_run(tmp_path / "broken", "Pendulum-v1")
    (broken / "config.json").write_text("{}")
    with locked(tmp_path / "other"):
        found = {Path(run.run_dir).name: run for run in list_runs(tmp_path)}
        assert cli.main(["runs", str(tmp_path), "--json"]) == 0
    assert [run["state"] for run in json.loads(capsys.readouterr().out)] == [
        "stopped",
        "finished",
        "training",
        "unreadable",
    ]
    assert (found["finished"].score, found["finished"].state, found["finished"].seed) == (499.5, "finished", 3)
    assert (found["stopped"].score, found["stopped"].generation, found["stopped"].env_steps) == (1.5, 8, 80)
    assert (found["other"].score, found["other"].generation) == (None, 0)
    assert "not a configuration" in str(found["broken"].error)
    assert cli.main(["runs", str(tmp_path)]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[:5] == ["task", "seed", "generation", "steps", "score"]
    assert rows[1].split()[:6] == ["CartPole-v1", "3", "4", "40", "499.5", "finished"]


def test_curves_are_grouped_by_what_differs(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / str(number), "CartPole-v1", seed=seed, sigma=sigma, threads=number + 1)
        for number, (seed, sigma) in enumerate([(0, 0.1), (1, 0.1), (0, 0.2)])
    ]
    for number, run_dir in enumerate(runs):
        write_metrics(run_dir, [None, 1.0 + number, 3.0 + number])
    groups = read_groups(runs, "env_steps", "score")
    assert [(group.label, len(group.curves)) for group in groups] == [("sigma 0.1", 2), ("sigma 0.2", 1)]
    xs, ys = groups[0].curves[1]
    assert (xs.tolist(), ys.tolist()) == ([200, 300], [2.0, 4.0])
    assert [group.label for group in read_groups(runs[:2], "wall_s", "score")] == ["CartPole-v1"]
    by_seed = read_groups(runs, "generation", "mean_return", "seed")
    assert [(group.label, len(group.curves)) for group in by_seed] == [("seed 0", 2), ("seed 1", 1)]
    assert by_seed[1].curves[0][1].tolist() == [7, 4, 8]


def test_spread_is_that_of_the_seeds_where_all_have_values() -> None:
    curves = [(np.array([0.0, 10.0]), np.array([0.0, 10.0])), (np.array([2.0, 20.0]), np.array([5.0, 5.0]))]
    grid, values = sorted_values(curves, points=9)
    assert (grid[0], grid[-1]) == (2, 10)
    np.testing.assert_allclose(values[0], np.minimum(grid, 5))
    np.testing.assert_allclose(values[1], np.maximum(grid, 5))


def test_plot_writes_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(3):
        write_metrics(write_run(tmp_path / f"runs/{seed}", "CartPole-v1", seed=seed), [1.0 + seed, 2.0, 3.0 * seed])
    output = tmp_path / "curves.png"
    assert (
        cli.main(["plot", str(tmp_path / "runs"), "--output", str(output), "--x", "wall_s", "--y", "mean-return"]) == 0
    )
    assert capsys.readouterr().out == f"{output}: 3 runs in 1 curve\n"
    assert output.read_bytes().startswith(b"\x89PNG")
    assert cli.main(["plot", str(tmp_path / "runs"), "--output", str(output)]) == 2
    assert "--force" in capsys.readouterr().err


def test_what_cannot_be_plotted_is_named(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", "CartPole-v1")
    with pytest.raises(UserError, match="the run has not completed a generation"):
        read_groups([run_dir], "env_steps", "score")
    write_metrics(run_dir, [None, None])
    with pytest.raises(UserError, match="has no score yet"):
        read_groups([run_dir], "env_steps", "score")
    with pytest.raises(UserError, match=r"unknown column reward; metrics\.csv has generation, env_steps"):
        read_groups([run_dir], "env_steps", "reward")
    with pytest.raises(UserError, match="unknown option speed"):
        read_groups([run_dir], "env_steps", "score", "speed")
