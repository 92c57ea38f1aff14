"""The study's file: continued after a kill, refused if it is something else; pruning sees the mean of all seeds."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from es_flipout.errors import UserError
from es_flipout.tuning import study as studies
from es_flipout.tuning.study import JOURNAL, Plan, open_study

PLAN = Plan({"env_id": "CartPole-v1", "seeds": 2}, {"x": 0.5, "y": None}, "median", trials=9, seed=0)
COMPLETE, FAIL, PRUNED, RUNNING = TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED, TrialState.RUNNING


def ask(study: Any) -> Any:
    trial = studies.ask(study)
    trial.suggest_float("x", 0, 1)
    trial.suggest_categorical("y", (None, "a"))
    return trial


def states(study: Any) -> list[TrialState]:
    return [trial.state for trial in study.get_trials() if trial.state != TrialState.WAITING]


def test_a_killed_search_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with open_study(folder, PLAN) as study:
        first, second = ask(study), ask(study)
        assert first.params == PLAN.start, "the search starts from the configuration itself"
        studies.report(study, first, 1, (1.0, 2.0), last=2)
        studies.report(study, first, 2, (3.0, 4.0), last=2)
        studies.report(study, second, 1, (5.0, 6.0), last=2)
        third = ask(study)
    path = folder / JOURNAL
    with path.open("ab") as file:
        file.write(b'{"op_code":8,"worker_i')  # killed while it wrote a line, which was locked
    path.with_name(f"{JOURNAL}.lock").symlink_to(path)
    with open_study(folder, PLAN) as study:
        assert states(study) == [COMPLETE, FAIL, FAIL]
        assert [trial.number for trial in studies.finished(study)] == [0]
        assert study.best_value == 3.5
        assert studies.scores_of(study.trials[0]) == [3.0, 4.0]
        again = [ask(study).params for _ in range(2)]
        assert again == [second.params, third.params]
        fresh = ask(study).params
        assert fresh not in (first.params, *again), "the sampler does not repeat what it drew before"
        assert states(study)[3:] == [RUNNING] * 3


def test_only_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        open_study(tmp_path, PLAN),
        pytest.raises(UserError, match="is in use by process"),
        open_study(tmp_path, PLAN),
    ):
        pass
    with open_study(tmp_path, PLAN) as study:
        assert studies.finished(study) == []


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"env_id": "Pendulum-v1", "seeds": 2}, "holds a study with env_id CartPole-v1, and this one has Pendulum-v1"),
        ({"env_id": "CartPole-v1", "seeds": 3}, "a study with seeds 2, and this one has 3: repeat the command"),
        ({"env_id": "CartPole-v1", "seeds": 2, "extra": [1]}, r"extra null, and this one has \[1\]"),
    ],
)
def test_trials_that_cannot_be_compared_are_not_mixed(tmp_path: Path, settings: Any, line: str) -> None:
    with open_study(tmp_path, PLAN) as study:
        ask(study)
    before = (tmp_path / JOURNAL).read_bytes()
    with pytest.raises(UserError, match=line), open_study(tmp_path, dataclasses.replace(PLAN, settings=settings)):
        pass
    assert (tmp_path / JOURNAL).read_bytes() == before
    other = dataclasses.replace(PLAN, trials=99, pruner="halving")
    with open_study(tmp_path, other) as study:
        assert states(study) == [FAIL]


@pytest.mark.parametrize(
    ("contents", "line"),
    [
        (b"precious", "is not the journal of a study"),
        (b"precious\n", "is not the journal of a study"),
        (b"\xff\x00\n\n", "is not the journal of a study"),
        (b'{"op_code":77}\n', "is damaged"),
        (b'{"op_code":0,"worker_id":"w","study_name":"mine","directions":[2]}\n', r"holds another study \(mine\)"),
    ],
)
def test_another_file_is_refused_and_kept(tmp_path: Path, contents: bytes, line: str) -> None:
    path = tmp_path / JOURNAL
    path.write_bytes(contents)
    with pytest.raises(UserError, match=line) as refused, open_study(tmp_path, PLAN):
        pass
    assert "\n" not in str(refused.value)
    assert path.read_bytes() == contents


def test_a_study_of_another_program_is_refused(tmp_path: Path) -> None:
    with open_study(tmp_path, PLAN) as study:
        ask(study)
    path = tmp_path / JOURNAL
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(line for line in lines if json.loads(line)["op_code"] != 2), encoding="utf-8")
    with pytest.raises(UserError, match="that es-flipout tune did not make"), open_study(tmp_path, PLAN):
        pass


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    with pytest.raises(UserError, match="holds other files and no study"), open_study(tmp_path, PLAN):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
    with pytest.raises(OSError, match="precious"), open_study(tmp_path / "precious", PLAN):
        pass


def test_the_median_of_the_means_over_seeds_prunes(tmp_path: Path) -> None:
    with open_study(tmp_path, PLAN) as study:
        for mean in (10, 20, 30, 40, 50):
            trial = ask(study)
            going = [studies.report(study, trial, rung, (mean - 9.0, mean + 9.0), last=5) for rung in range(1, 6)]
            assert going == [True] * 4 + [False]
        good, bad = ask(study), ask(study)
        # One bad seed is not bad enough, two are; before the third report, every trial may go on.
        assert [studies.report(study, good, rung, (1.0, 61.0), last=5) for rung in (1, 2, 3, 4)] == [True] * 4
        assert [studies.report(study, bad, rung, (1.0, 57.0), last=5) for rung in (1, 2, 3)] == [True, True, False]
        assert [trial.number for trial in studies.best_first(study)] == [4, 3, 2, 1, 0]
        assert states(study) == [COMPLETE] * 5 + [RUNNING, PRUNED]


@pytest.mark.parametrize("rung", [1, 2])
def test_scores_that_are_not_finite_prune(tmp_path: Path, rung: int) -> None:
    with open_study(tmp_path, PLAN) as study:
        trial = ask(study)
        assert not studies.report(study, trial, rung, (1.0, float("nan")), last=2)
        assert states(study) == [PRUNED]


def test_of_equal_trials_the_faster_is_better(tmp_path: Path) -> None:
    with open_study(tmp_path, PLAN) as study:
        for early in (1.0, 3.0, 2.0):
            trial = ask(study)
            studies.report(study, trial, 1, (early,), last=2)
            studies.report(study, trial, 2, (9.0,), last=2)
        assert [trial.number for trial in studies.best_first(study)] == [1, 2, 0]
