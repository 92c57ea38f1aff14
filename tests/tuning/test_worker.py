"""A worker trains what ``es-flipout train`` would train; a process that fails or dies does not end the search silently."""

import threading
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest

from es_flipout.config import TrainConfig
from es_flipout.errors import UserError
from es_flipout.presets import preset
from es_flipout.training.evaluate import evaluate
from es_flipout.training.setup import make_trainer
from es_flipout.tuning import search as searches
from es_flipout.tuning.search import Search, runs_of, search
from es_flipout.tuning.worker import RUNGS, Done, Failed, Job, Report, _train

SMALL = preset("CartPole-v1").replace(
    env_steps=1500, population_size=8, hidden=(4,), score_episodes=3, evaluation_episodes=3, score_every=4
)


def played(job: Job, keep: int = RUNGS) -> list[Any]:
    """Run a job in a thread and return what it sends; after ``keep`` reports it is told to stop."""
    ours, theirs = Pipe()
    thread = threading.Thread(target=_train, args=(theirs, job))
    thread.start()
    received: list[Any] = []
    while thread.is_alive() or ours.poll():
        if ours.poll(0.05):
            received.append(ours.recv())
            if isinstance(received[-1], Report):
                ours.send(received[-1].rung < keep or job.evaluate)
    return received


def test_seeds_are_trained_side_by_side_as_each_would_be_alone() -> None:
    configs = runs_of(SMALL, (3, 4))
    *reports, done = played(Job(configs, evaluate=True))
    assert [report.rung for report in reports] == list(range(1, RUNGS + 1))
    alone = [make_trainer(config) for config in configs]
    for trainer in alone:
        trainer.train()
    assert reports[-1].scores == tuple(trainer.progress.score for trainer in alone)
    assert done == Done(tuple(evaluate(t.trained_agent(), SMALL, 3).mean_return for t in alone))
    assert len({report.scores for report in reports}) > 3, "the scores are those of the moment"
    for rung in (3,):
        trainer = make_trainer(configs[1])
        while trainer.progress.env_steps < 1500 * rung / RUNGS:
            trainer.step()
        assert reports[rung - 1].scores[1] == trainer.score()


def test_a_job_that_is_told_to_stop_sends_nothing_more() -> None:
    assert [report.rung for report in played(Job(runs_of(SMALL, (0,))), keep=2)] == [1, 2]


def test_a_user_error_reaches_the_search() -> None:
    nowhere = TrainConfig.of("Nowhere-v0", env_steps=10)
    (failed,) = played(Job(runs_of(nowhere, (0,))))
    assert isinstance(failed, Failed)
    assert "unknown environment 'Nowhere-v0'" in failed.message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ("cpu", 1, False)),
        ({"device": "cpu", "threads": 3, "overlap": True}, ("cpu", 3, True)),
        ({"device": "cuda"}, ("cuda", 1, None)),
    ],
)
def test_runs_share_the_machine(changes: Any, expected: Any) -> None:
    runs = runs_of(SMALL.replace(**changes), (5, 6))
    assert [run.schedule.seed for run in runs] == [5, 6]
    assert {(run.compute.device, run.compute.threads, run.compute.overlap) for run in runs} == {expected}


MORTAL = """
import gymnasium, numpy as np, os, signal
from gymnasium.spaces import Box

class Mortal(gymnasium.Env):
    action_space = observation_space = Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        os.kill(os.getpid(), signal.SIGKILL)

gymnasium.register("Mortal-v0", Mortal, max_episode_steps=3)
"""


@pytest.mark.slow
def test_a_trial_whose_process_dies_is_tried_three_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    (tmp_path / "mortal.py").write_text(MORTAL, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)  # processes inherit the path
    config = TrainConfig.of("mortal:Mortal-v0", env_steps=10, population_size=2, hidden=(4,))
    folder = tmp_path / "study"
    what = Search(config, folder, 2, 1, 1, ("sigma",), (), "none", confirm=0, confirm_seeds=1)
    with pytest.raises(UserError, match=r"the process of trial 2 ended with exit code -9"):
        search(what, Console(quiet=True))
    # Nothing is lost by it: the next command would try again.
    with searches.studies.open_study(
        folder, searches._plan(what, searches.make_space(config, searches._traits(config), ("sigma",)))
    ) as study:
        assert [trial.state.name for trial in study.trials] == ["FAIL", "FAIL", "FAIL", "WAITING"]
