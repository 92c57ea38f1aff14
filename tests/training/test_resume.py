"""A run that is interrupted anywhere and resumed is bitwise identical to an uninterrupted run."""

import dataclasses
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_runs import rows

from es_flipout import cli
from es_flipout.config import TrainConfig
from es_flipout.errors import UserError
from es_flipout.rollout.episodes import Rollout
from es_flipout.training.checkpoint import checkpoints, load_checkpoint, load_tensors
from es_flipout.training.metrics import Metrics, Silent
from es_flipout.training.run_directory import read_config
from es_flipout.training.setup import make_trainer, resume_trainer
from es_flipout.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
GENERATIONS = 24
HOLD = GENERATIONS - 3

# Runs the command line in a separate process. It prints every completed generation to stdout and waits before the last
# ones, so that the run cannot end before it is interrupted, however slow the machine is.
CHILD = """
import signal, sys
from es_flipout.training import metrics

class Watched(metrics.TerminalReporter):
    def show(self, done, progress):
        super().show(done, progress)
        print("done", done.generation, flush=True)
        if done.generation >= int(sys.argv[1]):
            signal.pause()

metrics.TerminalReporter = Watched
from es_flipout.cli import main
sys.exit(main(sys.argv[2:]))
"""

SETTINGS = {
    "CartPole-v1": {"hidden": "8", "sigma": "0.2", "learning-rate": "0.01"},
    "Hopper-v5": {"hidden": "8", "sigma": "0.05", "learning-rate": "0.01", "threads": "1"},
}


def arguments(env_id: str, optimizer: str, run_dir: Path, **others: Any) -> list[str]:
    settings = SETTINGS[env_id] | {
        "optimizer": optimizer,
        "generations": GENERATIONS,
        "population-size": 4,
        "env-kwargs": '{"max_episode_steps": 50}',
        "seed": 3,
        "score-every": 7,
        "score-episodes": 2,
        "evaluation-episodes": 1,
        "checkpoint-every": 3,
        "run-dir": run_dir,
    }
    given = [part for name, value in (settings | others).items() for part in (f"--{name}", str(value))]
    return ["train", env_id, *given]


class Child:
    """A run in a separate process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.printed: list[str] = []

    def wait_for(self, generation: int) -> None:
        """Wait until that generation, and possibly a few more, are completed."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.printed.append(line)
            if line.startswith("done") and int(line.split()[1]) >= generation:
                return
        raise AssertionError(f"ended early: {self.printed} {self.rest()}")

    def rest(self) -> str:
        out, err = self.process.communicate(timeout=100)
        self.printed += out.splitlines(keepends=True)
        return err


@contextmanager
def child(*args: str, hold: int = HOLD) -> Iterator[Child]:
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(hold), *args],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    watchdog = threading.Timer(100, process.kill)
    watchdog.start()
    try:
        yield Child(process)
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()


def interrupt(run_dir: Path, how: signal.Signals, after: int, dice: random.Random, *args: str) -> None:
    """Start or continue a run, and interrupt it at a random time after the given generation."""
    with child(*args) as running:
        running.wait_for(min(dice.randint(after, after + 5), HOLD))
        time.sleep(dice.uniform(0, 0.05))
        running.process.send_signal(how)
        err = running.rest()
        code = running.process.returncode
    if how is signal.SIGKILL:
        assert code == -signal.SIGKILL
        return
    assert (code, err) == (0, ""), err
    *_, stopped, advice = running.printed
    assert advice == f"continue with: es-flipout resume {run_dir}\n"
    match = re.match(r"stopped after generation (\d+) \(([\d,]+) environment steps\)", stopped)
    assert match is not None, stopped
    _, progress = load_checkpoint(run_dir / "checkpoints")
    assert progress.generation == int(match[1]) >= after
    assert progress.env_steps == int(match[2].replace(",", ""))
    assert len(rows(run_dir)) == progress.generation


def assert_same_run(run_dir: Path, whole: Path) -> None:
    tensors, progress = load_checkpoint(run_dir / "checkpoints")
    expected, final = load_checkpoint(whole / "checkpoints")
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert tensors[name].dtype == value.dtype
        assert torch.equal(tensors[name], value), name
    kinds = {name.partition(".")[0] for name in expected}
    assert kinds - {"frontier"} == {"module", "optimizer", "observation_norm", "best"}, "the comparison is incomplete"
    assert dataclasses.replace(progress, wall_s=0.0) == dataclasses.replace(final, wall_s=0.0)
    assert progress.wall_s > 0
    for file in ("policy.safetensors", "best.safetensors"):
        policy, expected_policy = (load_tensors(path / file) for path in (run_dir, whole))
        assert policy.keys() == expected_policy.keys()
        assert all(torch.equal(policy[name], expected_policy[name]) for name in policy)
    assert rows(run_dir) == rows(whole)
    assert [row["generation"] for row in rows(run_dir)] == [str(n) for n in range(1, final.generation + 1)]


def train_whole(config: TrainConfig, run_dir: Path) -> None:
    trainer = make_trainer(config, run_dir)
    trainer.create()
    trainer.train()


@pytest.mark.parametrize(
    ("env_id", "optimizer", "interruptions"),
    [
        ("CartPole-v1", "adam", [signal.SIGINT, signal.SIGKILL]),
        pytest.param("CartPole-v1", "clipup", [signal.SIGKILL], marks=pytest.mark.slow),
        pytest.param("Hopper-v5", "adam", [signal.SIGKILL], marks=pytest.mark.slow),
        ("Hopper-v5", "clipup", [signal.SIGKILL, signal.SIGTERM]),
    ],
)
def test_interrupted_equals_uninterrupted(
    tmp_path: Path, env_id: str, optimizer: str, interruptions: list[signal.Signals]
) -> None:
    run_dir, dice = tmp_path / "run", random.Random(f"{env_id} {optimizer}")
    after = 4
    for k, how in enumerate(interruptions):
        args = arguments(env_id, optimizer, run_dir) if k == 0 else ["resume", str(run_dir)]
        interrupt(run_dir, how, after, dice, *args)
        _, progress = load_checkpoint(run_dir / "checkpoints")
        assert 0 < progress.generation < GENERATIONS, "not interrupted in the middle"
        after = progress.generation + 1
    assert cli.main(["resume", str(run_dir)]) == 0
    assert (run_dir / "evaluation.json").exists()
    train_whole(read_config(run_dir), tmp_path / "whole")
    assert_same_run(run_dir, tmp_path / "whole")


# The same in one process, in which every point of interruption can be tested.


class Killed(BaseException):
    """Simulates kill -9: nothing may catch it."""


class KilledAfter(Silent):
    """Kills the process as soon as a generation is completed."""

    def __init__(self, generation: int) -> None:
        self.generation = generation

    def show(self, metrics: Metrics, progress: float) -> None:
        if metrics.generation == self.generation:
            raise Killed


class InterruptedAfter(Silent):
    """Simulates Ctrl-C, or a machine that shuts down, when a generation is completed."""

    def __init__(self, generation: int, number: signal.Signals = signal.SIGINT) -> None:
        self.generation, self.number = generation, number

    def show(self, metrics: Metrics, progress: float) -> None:
        if metrics.generation == self.generation:
            signal.raise_signal(self.number)


SMALL = TrainConfig.of(
    "CartPole-v1",
    generations=6,
    population_size=4,
    hidden=(4,),
    sigma=0.3,
    sigma_final=0.1,
    learning_rate=0.1,
    learning_rate_final=0.01,
    weight_decay=0.1,
    score_every=4,
    score_episodes=2,
    checkpoint_every=2,
)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "sgd"},
        {"optimizer": "clipup", "perturbation": "low_rank", "rank": 2},
        {"perturbation": "dense", "antithetic": False, "population_size": 5},
        {"base": "gaussian", "bases": 2, "episodes": 2, "start_states": "generation"},
        {"generations": None, "env_steps": 1500},
        {"env_id": "Pendulum-v1", "episode_cap": 20, "episode_cap_until": 1.0, "squash": "tanh", "generations": 4},
        {"env_id": "InvertedPendulum-v5", "slots": 3, "policy": "linear", "threads": 1},
        {"env_id": "Pendulum-v1", "horizon": 30, "episodes": 2, "shaping": "differences"},
        {"env_id": "Hopper-v5", "horizon": 5, "shaping": "differences", "threads": 1, "sigma": 0.3},
    ],
    ids=str,
)
def test_every_setting_survives_a_resume(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = SMALL.replace(**changes)
    train_whole(config, tmp_path / "whole")
    trainer = make_trainer(config, tmp_path / "run", KilledAfter(3))
    trainer.create()
    with pytest.raises(Killed):
        trainer.train()
    resumed = resume_trainer(tmp_path / "run")
    assert resumed.progress.generation == 2
    resumed.train()
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("generation", [1, 3, 6])
def test_a_signal_saves_what_no_checkpoint_held(tmp_path: Path, generation: int, number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    train_whole(SMALL, tmp_path / "whole")
    trainer = make_trainer(SMALL, tmp_path / "run", InterruptedAfter(generation, number))
    trainer.create()
    trainer.train()
    assert trainer.interrupted
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    assert load_checkpoint(tmp_path / "run" / "checkpoints")[1].generation == generation
    resume_trainer(tmp_path / "run").train()
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def during_the_third(trainer: Trainer) -> Callable[[], Rollout]:
    """Return ``trainer.generation`` with a signal during the third generation, before its first step."""
    original, norm = trainer.generation, trainer.agent.norm
    calls = 0

    def pressed(obs: Tensor) -> Tensor:
        if not trainer.interrupted:
            signal.raise_signal(signal.SIGTERM)
        return norm(obs)

    def generation() -> Rollout:
        nonlocal calls
        calls += 1
        if calls < 3:
            return original()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer.agent, "norm", pressed)
            return original()

    return generation


@pytest.mark.parametrize("env_id", ["CartPole-v1", "InvertedPendulum-v5"])
def test_a_signal_does_not_wait_for_the_generation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, env_id: str
) -> None:
    config = SMALL.replace(env_id=env_id, threads=1)
    train_whole(config, tmp_path / "whole")
    trainer = make_trainer(config, tmp_path / "run")
    trainer.create()
    monkeypatch.setattr(trainer, "generation", during_the_third(trainer))
    trainer.train()
    assert trainer.interrupted
    assert trainer.progress.generation == 2
    assert [row["generation"] for row in rows(tmp_path / "run")] == ["1", "2"]
    resume_trainer(tmp_path / "run").train()
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_second_ctrl_c_is_not_waited_for(tmp_path: Path) -> None:
    class Impatient(InterruptedAfter):
        def show(self, metrics: Metrics, progress: float) -> None:
            super().show(metrics, progress)
            super().show(metrics, progress)

    trainer = make_trainer(SMALL, tmp_path / "run", Impatient(3))
    trainer.create()
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert load_checkpoint(tmp_path / "run" / "checkpoints")[1].generation == 2


def test_a_finished_run_stays_as_it_is(tmp_path: Path) -> None:
    train_whole(SMALL, tmp_path / "run")
    train_whole(SMALL, tmp_path / "whole")
    resumed = resume_trainer(tmp_path / "run")
    assert resumed.finished
    resumed.train()
    assert_same_run(tmp_path / "run", tmp_path / "whole")


class Countdown:
    """Simulates kill -9 at one of the operations that change files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int | None) -> None:
        self.at, self.count = at, 0
        for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "unlink"), (Path, "mkdir")):
            monkeypatch.setattr(owner, name, self._watched(getattr(owner, name)))

    def _watched(self, function: Any) -> Any:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self.count == self.at:
                raise Killed
            self.count += 1
            return function(*args, **kwargs)

        return watched


def test_killed_at_every_change_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SMALL.replace(
        track=(),  # TensorBoard writes in a thread
        generations=3,
        population_size=2,
        score_every=10,
        score_episodes=1,
        checkpoint_every=1,
        keep_checkpoints=2,
    )
    with monkeypatch.context() as patch:
        countdown = Countdown(patch, None)
        train_whole(config, tmp_path / "whole")
    changes = countdown.count
    assert changes > 30, "the operations are not watched any more"
    continued = 0
    for at in range(changes):
        run_dir = tmp_path / str(at)
        with monkeypatch.context() as patch:
            Countdown(patch, at)
            with pytest.raises(Killed):
                train_whole(config, run_dir)
        try:
            resumed = resume_trainer(run_dir)
        except UserError:
            assert not (run_dir / "metrics.csv").exists(), "training had begun, so there must be a checkpoint"
            continue
        resumed.train()
        continued += 1
        assert_same_run(run_dir, tmp_path / "whole")
        names = [path.stem for path in checkpoints(run_dir / "checkpoints")]
        assert names[-2:] == ["generation_000002", "generation_000003"]
    assert continued > changes / 2
