"""What ``train`` and ``resume`` have in common: a training run in a terminal."""

from __future__ import annotations

import dataclasses
import errno
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from es_flipout.cluster.pool import WorkersLostError
from es_flipout.config import TrainConfig
from es_flipout.errors import UserError, gpu_fault
from es_flipout.training.evaluate import evaluate
from es_flipout.training.metrics import EpisodeBar
from es_flipout.training.run_directory import Which, write_evaluation
from es_flipout.training.setup import Build, build_engine
from es_flipout.training.trainer import Trainer

_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SCORES = ("mean_return", "std_return", "median_return")
# Waits for a line, and prints its argument if there is none because the other end of the pipe is gone.
_WITNESS = 'read -r _ || printf "%s\\n" "$1" >&2'


def build_for(config: TrainConfig) -> Build:
    """Return the function that builds the parts of a run: the engine's, or that of the classic baseline."""
    if config.compute.worker_kind == "classic":
        from es_flipout.bench.classic.player import build_classic

        return build_classic
    return build_engine


def find_modules_here() -> None:
    """Let the environment of a user's own module be imported from the current folder, after all installed modules."""
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


@contextmanager
def starting_up(console: Console, config: TrainConfig, advice: str) -> Iterator[None]:
    """Show on a terminal that the run is starting; add advice to the message of a signal that stops it before training."""
    try:
        shown = console.status(f"starting {config.task.env_id}: environments, policy and workers")
        with _last_words(config, f"training had not begun; {advice}"), shown:
            yield
    except KeyboardInterrupt as stop:
        stop.add_note(f"training had not begun; {advice}")
        raise


@contextmanager
def _last_words(config: TrainConfig, advice: str) -> Iterator[None]:
    """Let another process print an error with advice if this one ends within the context, with ``--backend ray``.

    Ray's threads end the process, and no Python code runs any more, some time after a raylet, an agent or the GCS has died.
    """
    if config.compute.backend != "ray" or os.name != "posix":
        yield
        return
    line = f"error: killed, or ended by Ray because a process of Ray (raylet, agent, GCS) died; {advice}"
    witness = subprocess.Popen(
        ["sh", "-c", _WITNESS, "sh", line],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # Ctrl-C in a terminal is not for this process
    )
    try:
        yield
    finally:
        witness.communicate("ended in Python\n")


def resume_command(config: TrainConfig, run_dir: Path) -> str:
    """Return the command that continues a run of one's own."""
    trust = " --trust" if config.task.module is not None or config.logging.own_trackers else ""
    return f"es-flipout resume {shlex.quote(str(run_dir))}{trust}"


@contextmanager
def going_on(config: TrainConfig, run_dir: Path) -> Iterator[None]:
    """Add to the message of a full disk, of a GPU's fault, or of Ray's failure, how to continue the run.

    Raises:
        UserError: the disk is full, or Ray failed.
    """
    go_on = f"continue with: {resume_command(config, run_dir)}"
    try:
        with _last_words(config, go_on):
            yield
    except WorkersLostError as error:
        raise UserError(f"{error}; {go_on}") from error
    except RuntimeError as error:
        if gpu_fault(error) is not None and (run_dir / "config.json").exists():
            error.add_note(go_on)
        raise
    except OSError as error:
        if error.errno not in _DISK_IS_FULL:
            raise
        what = go_on if (run_dir / "config.json").exists() else "start the run again"
        raise UserError(f"{error}; free some space, then {what}") from error


def check_video(config: TrainConfig) -> None:
    """Check that the video at the end of a run can be rendered, if there is to be one.

    Raises:
        UserError: the environment has no pictures, or a package is missing.
    """
    if config.logging.video == "off":
        return
    from es_flipout.tools.episode import require_render_mode
    from es_flipout.tools.video import require_ffmpeg

    require_render_mode(config, "rgb_array")
    if config.logging.video == "mp4":
        require_ffmpeg()


def train_to_the_end(trainer: Trainer, run_dir: Path, console: Console) -> int:
    """Train, score in the single Gymnasium environment, and print the run directory; return the exit code."""
    trainer.train(lambda: _score(trainer, run_dir, console))
    if trainer.interrupted:
        at = trainer.progress
        print(f"stopped after generation {at.generation} ({at.env_steps:,} environment steps)")
        print(f"continue with: {resume_command(trainer.config, run_dir)}")
    return 0


def _score(trainer: Trainer, run_dir: Path, console: Console) -> dict[str, float]:
    """Score the best and the last policy, write and print the evaluations, and return what the trackers get."""
    scores: dict[str, float] = {}
    env_id, progress = trainer.config.task.env_id, trainer.progress
    generations: dict[Which, int | None] = {"best": progress.best_generation, "last": progress.generation}
    if progress.best_generation == progress.generation:
        del generations["last"]
    for which, generation in generations.items():
        episodes = trainer.config.logging.evaluation_episodes
        try:
            with EpisodeBar(console, f"scoring the {which} policy", episodes) as bar:
                played = evaluate(trainer.trained_agent(which), trainer.config, episodes, on_episode=bar.show)
        except KeyboardInterrupt:
            print(f"stopped while scoring; score with: {resume_command(trainer.config, run_dir)}")
            return scores
        write_evaluation(run_dir, dataclasses.replace(played, which=which, generation=generation))
        name = "evaluation" if which == "best" else "evaluation_last"
        scores |= {f"{name}/{key}": getattr(played, key) for key in _SCORES}
        print(
            f"{which} policy (generation {generation}): score {played.mean_return:,.1f} (sd {played.std_return:,.1f}, "
            f"median {played.median_return:,.1f}) over {played.episodes} episodes of {env_id} in Gymnasium "
            f"{played.versions['gymnasium']}"
        )
    if trainer.config.logging.video != "off":
        _render(trainer.config, run_dir, console)
    print(f"trained on {progress.env_steps:,} environment steps in {progress.wall_s:,.0f} s")
    print(f"run directory: {run_dir}")
    return scores


def _render(config: TrainConfig, run_dir: Path, console: Console) -> None:
    """Render the video of the run; if that fails, print a warning: the run itself is complete.

    In a process of its own: OpenGL is chosen when it is first loaded, and a driver that crashes must not end this one.
    """
    path = run_dir / f"video.{config.logging.video}"
    command = [sys.executable, "-m", "es_flipout", "render", str(run_dir), "--output", str(path), "--force"]
    command += ["--trust"] if config.task.module is not None else []
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        with console.status(f"rendering {path}"):
            _, errors = process.communicate()
    except KeyboardInterrupt:
        process.terminate()
        process.communicate()
        print(
            f"stopped while rendering; render with: es-flipout render {shlex.quote(str(run_dir))} --output {path.name}"
        )
        return
    if process.returncode == 0:
        print(f"video: {path}")
        return
    reason = errors.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
    print(f"warning: no video: {reason[0].removeprefix('error: ')}", file=sys.stderr)
