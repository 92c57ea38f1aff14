"""``es-flipout tune`` from start to end: killed, continued, and ended with a preset that ``train`` takes."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from es_flipout import cli
from es_flipout.config import TrainConfig
from es_flipout.presets import preset, read_preset

ROOT = Path(__file__).parents[2]
QUICK = [
    *("tune", "CartPole-v1", "--env-steps", "600", "--population-size", "4", "--hidden", "4", "--score-episodes", "2"),
    *("--evaluation-episodes", "2", "--jobs", "1", "--seeds", "2", "--confirm", "1", "--confirm-seeds", "2"),
    *("--search", "sigma", "learning-rate"),
]


def opened(folder: Path) -> optuna.Study:
    storage = JournalStorage(JournalFileBackend(str(folder / "study.journal")))
    return optuna.load_study(study_name=None, storage=storage)


def alive(group: int) -> bool:
    """Return whether any process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_search_ends_with_a_preset_that_can_be_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "study"
    args = [*QUICK, "--trials", "3", "--output", str(folder)]
    assert cli.main(args) == 0
    captured = capsys.readouterr()
    assert {path.name for path in folder.iterdir()} == {
        *("study.journal", "history.png", "importance.png", "preset.json"),
    }
    assert (folder / "history.png").read_bytes().startswith(b"\x89PNG")
    study = opened(folder)
    assert len(study.trials) == 3
    assert {name for trial in study.trials for name in trial.params} == {"sigma", "learning_rate"}
    usual = preset("CartPole-v1")
    assert study.trials[0].params == {"sigma": usual.strategy.sigma, "learning_rate": usual.strategy.learning_rate}
    for trial in study.trials:
        assert f"trial {trial.number}: " in captured.err, "without a terminal, every trial is a line"
    found = read_preset(folder / "preset.json")
    (named,) = re.findall(r"preset \((start|trial (\d+))", captured.out)
    if named[0] != "start":
        values = study.trials[int(named[1])].params
        assert found.strategy.sigma == float(f"{values['sigma']:.3g}")
        assert found.strategy.learning_rate == float(f"{values['learning_rate']:.3g}")
    assert (found.schedule.env_steps, found.strategy.population_size) == (600, 4)
    confirmed = {name: scores for name, scores in study.user_attrs.items() if name.startswith("confirmed ")}
    assert all(set(scores) == {"1000", "1001"} for scores in confirmed.values()), "seeds that no trial had"
    assert f"es-flipout train --preset {folder / 'preset.json'}" in captured.out
    run_dir = tmp_path / "run"
    train = ["train", "--preset", str(folder / "preset.json"), "--device=cpu", "--evaluation-episodes=2"]
    assert cli.main([*train, "--run-dir", str(run_dir)]) == 0
    trained = TrainConfig.from_json((run_dir / "config.json").read_text(encoding="utf-8"))
    assert trained.replace(device="auto", physics="auto", compile="auto") == found.replace(evaluation_episodes=2)

    # The same command again has nothing to do, and says the same; more trials go on from there.
    capsys.readouterr()
    before = (folder / "study.journal").read_bytes()
    assert cli.main(args) == 0
    assert (folder / "study.journal").read_bytes() == before
    assert capsys.readouterr().out == captured.out
    refused = cli.main([*args, "--seeds", "3"])
    assert (refused, (folder / "study.journal").read_bytes()) == (2, before)
    assert "holds a study with seeds 2, and this one has 3" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_search_that_is_stopped_goes_on(
    tmp_path: Path, how: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "study"
    args = [*QUICK, "--env-steps", "4000", "--trials", "3", "--jobs", "2", "--output", str(folder)]
    process = subprocess.Popen(
        [sys.executable, "-m", "es_flipout", *args],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    journal = folder / "study.journal"
    while not (journal.exists() and b'"op_code":7' in journal.read_bytes()):  # a first report
        assert process.poll() is None, process.stderr
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, how) if how == signal.SIGINT else process.kill()
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    if how == signal.SIGINT:
        assert process.returncode == 0, err
        assert f"of 3 trials in {folder}; continue with the same command" in out
    while alive(process.pid):  # the workers end with the search
        assert time.monotonic() < deadline
        time.sleep(0.05)
    stopped = opened(folder).trials
    interrupted = [trial for trial in stopped if trial.state in (TrialState.RUNNING, TrialState.FAIL)]
    assert interrupted
    assert cli.main(args) == 0
    trials = opened(folder).trials
    finished = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    assert len(finished) == 3
    assert all(trials[trial.number].state == TrialState.FAIL for trial in interrupted)
    assert all(trial.params in [other.params for other in finished] for trial in interrupted), "tried again"
    assert read_preset(folder / "preset.json").task.env_id == "CartPole-v1"
    assert "train with it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ([], r"which environment\? es-flipout tune ENV_ID"),
        (["CartPole-v7"], r"unknown environment 'CartPole-v7'"),
        (["CartPole-v1", "--trials", "0"], "trials must be at least 1, got 0"),
        (["CartPole-v1", "--jobs", "0"], "jobs must be at least 1, got 0"),
        (["CartPole-v1", "--confirm", "-1"], "confirm must be at least 0, got -1"),
        (["CartPole-v1", "--pruner", "best"], "--pruner must be one of median, halving, none, got best"),
        (["CartPole-v1", "--search", "speed"], "speed cannot be searched; choose from learning_rate"),
        (["CartPole-v1", "--search", "squash"], "squash cannot be searched with discrete actions"),
        (["CartPole-v1", "--backend", "ray"], "backend must be local"),
        (["CartPole-v1", "--output", "taken"], "taken holds other files and no study"),
        (["CartPole-v1", "--preset", "taken/file"], "taken/file: not a preset file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[str], line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    assert cli.main(["tune", *args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(rf"error: .*{line}.*\n", captured.err), captured.err
    assert [path.name for path in tmp_path.rglob("*")] == ["taken", "file"]


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing(name: str, *args: Any) -> None:
        assert name == "optuna"

    monkeypatch.setattr("importlib.util.find_spec", missing)
    assert cli.main(["tune", "CartPole-v1"]) == 2
    assert capsys.readouterr().err == "error: es-flipout tune needs Optuna: pip install 'es-flipout[tune]'\n"
