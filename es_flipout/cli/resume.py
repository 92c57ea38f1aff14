"""``es-flipout resume RUN_DIR``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from es_flipout.cli.parsing import parse


@dataclass(frozen=True)
class ResumeOptions:
    """Continue a run; the result is bitwise identical to that of an uninterrupted run, except with MuJoCo on a GPU."""

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """Directory of the run."""
    backend: Literal["local", "ray"] | None = None
    """This machine, or a Ray cluster; None keeps the run's. This and the next two options do not change the result."""
    workers: int | None = None
    """Ray workers."""
    ray_address: str | None = None
    """Ray cluster to join."""
    trust: bool = False
    """Allow the run to import the Python module of its environment, and to join its Ray cluster."""


def run(arguments: Sequence[str]) -> int:
    """Continue training to the end and score the policy."""
    options = parse(ResumeOptions, arguments, "resume")

    from es_flipout.cli.session import build_for, find_modules_here, resume_command, starting_up, train_to_the_end
    from es_flipout.training.lock import locked
    from es_flipout.training.metrics import TerminalReporter
    from es_flipout.training.run_directory import read_config
    from es_flipout.training.setup import resume_trainer

    console = Console(stderr=True)
    moved = {name: getattr(options, name) for name in ("backend", "workers", "ray_address")}
    changes = {name: value for name, value in moved.items() if value is not None}
    config = read_config(options.run_dir, options.trust).replace(**changes)
    find_modules_here()
    reporter = TerminalReporter(console, config.task.env_id)
    with locked(options.run_dir):
        advice = f"continue with: {resume_command(config, options.run_dir)}"
        with starting_up(console, config.task.env_id, advice):
            trainer = resume_trainer(options.run_dir, reporter, changes, build_for(config), options.trust)
        with closing(trainer):
            return train_to_the_end(trainer, options.run_dir, console)
