"""What all scripts share."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from es_flipout.errors import UserError
from scripts import report


@dataclass(frozen=True)
class Job(report.Job):
    KEY = ("name", "seed")
    name: str
    seed: int
    unit: float = 0.5


def run(job: Job) -> dict[str, report.Rows]:
    return {
        "curves": [{**job.key, "step": step, "loss": job.unit * step} for step in range(3)],
        "runs": [{**job.key, "loss": job.unit}],
    }


@pytest.mark.parametrize("processes", [1, 2])
def test_runs_that_are_done_are_not_repeated(tmp_path: Path, processes: int) -> None:
    report.run_missing([Job("a", 0)], run, tmp_path)
    report.run_missing([Job("a", 0, unit=7.0), Job("a", 1), Job("b, c", 0)], run, tmp_path, processes)
    runs = report.read_csv(tmp_path / "runs.csv").sort_values(["name", "seed"])
    assert list(runs.itertuples(index=False, name=None)) == [("a", 0, 0.5), ("a", 1, 0.5), ("b, c", 0, 0.5)]
    assert len(report.read_csv(tmp_path / "curves.csv")) == 9
    assert report.done(tmp_path, Job.KEY) == {("a", "0"), ("a", "1"), ("b, c", "0")}


def test_folder_of_another_configuration_is_refused(tmp_path: Path) -> None:
    report.begin(tmp_path, {"size": 1})
    report.append_csv(tmp_path / "runs.csv", [{"a": 1}])
    report.begin(tmp_path, {"size": 1})
    assert len(report.read_csv(tmp_path / "runs.csv")) == 1
    with pytest.raises(UserError, match="another configuration"):
        report.begin(tmp_path, {"size": 2})
    report.begin(tmp_path, {"size": 2}, fresh=True)
    assert report.read_json(tmp_path / "config.json") == {"size": 2}
    with pytest.raises(UserError, match="without --render"):
        report.read_csv(tmp_path / "runs.csv")


def test_rows_are_appended_under_the_first_header(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    report.append_csv(path, [])
    assert not path.exists()
    report.append_csv(path, [{"a": 1, "b": None}])
    report.append_csv(path, [{"b": 0.1, "a": 2}])
    assert path.read_text() == "a,b\n1,\n2,0.1\n"
    with pytest.raises(ValueError, match="'c'"):
        report.append_csv(path, [{"c": 1}])


def test_numbers_come_back_as_they_were(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal(1000) * 1e-5
    report.append_csv(tmp_path / "x.csv", [{"x": float(value)} for value in values])
    assert list(report.read_csv(tmp_path / "x.csv")["x"]) == list(values)


def test_table() -> None:
    text = report.markdown("| b", [("x", 1), ("", 2.5)])
    assert text == "| | b |\n|---|---|\n| x | 1 |\n|  | 2.5 |\n"


def test_spread() -> None:
    assert report.spread([3, 1, 2], ".1f") == "2.0 (1.0 to 3.0)"
    assert report.spread({"median": 1.5, "min": 1.0, "max": 4.0}, "g") == "1.5 (1 to 4)"
    assert report.mean_and_error([1.0, 3.0]) == (2.0, 1.0)
    assert np.isnan(report.mean_and_error([1.0])[1])


def test_groups_keep_their_order() -> None:
    frame = pd.DataFrame({"a": ["z", "y", "z"], "b": [1, 1, 2], "c": [0, 1, 2]})
    assert [(key, list(own["c"])) for key, own in report.groups(frame, "a")] == [("z", [0, 2]), ("y", [1])]
    assert [key for key, _ in report.groups(frame, "a", "b")] == [("z", 1), ("y", 1), ("z", 2)]


def test_figure(tmp_path: Path) -> None:
    curves = pd.DataFrame({"seed": [0, 0, 1, 1], "x": [0, 10, 0, 20], "y": [0.0, 1.0, 2.0, 4.0]})
    figure, axes = report.panels(3, 2, 1, columns=2)
    report.plot_seeds(axes[0], curves, "x", "y", "C0")
    median, *seeds = axes[0].lines
    assert np.asarray(median.get_xdata())[[0, -1]].tolist() == [0, 10]
    assert np.asarray(median.get_ydata())[[0, -1]].tolist() == [1, 2]
    assert len(seeds) == 2
    report.save(figure, tmp_path)
    assert len(figure.axes) == 3
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_errors_of_the_user_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["somewhere/script.py"])
    parser = report.script_parser("doc", quick="small")
    with pytest.raises(SystemExit) as ended:
        report.run_script(lambda: report.parse(parser))
    assert ended.value.code == 2
    assert capsys.readouterr().err == "script.py: --out DIRECTORY is missing (only --quick works without it)\n"
    monkeypatch.setattr(sys, "argv", ["somewhere/script.py", "--quick"])
    assert report.parse(parser).out == Path("runs/script_quick")
