"""``es-flipout resume RUN_DIR``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from es_flipout.cli.parsing import parse
from es_flipout.config import TrainConfig
from es_flipout.errors import UserError


@dataclass(frozen=True)
class ResumeOptions:
    """Continue a run; the result is bitwise identical to that of an uninterrupted run, except with MuJoCo on a GPU."""

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """Directory of the run."""
    generations: int | None = None
    """Train on to this generation; sigma, learning rate and episode cap change as planned before, and then stay."""
    env_steps: int | None = None
    """Train on to this many environment steps."""
    device: Literal["auto", "cpu", "cuda"] | None = None
    """Device of the policies from now on; None keeps the run's. Another device rounds differently."""
    backend: Literal["local", "ray"] | None = None
    """This machine, or a Ray cluster; None keeps the run's. This and the next two options do not change the result."""
    workers: int | None = None
    """Ray workers."""
    ray_address: str | None = None
    """Ray cluster to join."""
    trust: bool = False
    """Allow the run to import Python modules that it names, and to join its Ray cluster."""
    track: tuple[str, ...] | None = None
    """Trackers; None for those of the run."""


def run(arguments: Sequence[str]) -> int:
    """Continue training to the end and score the policy."""
    options = parse(ResumeOptions, arguments, "resume")

    from es_flipout.cli.session import (
        build_for,
        find_modules_here,
        going_on,
        resume_command,
        starting_up,
        train_to_the_end,
    )
    from es_flipout.training.lock import locked
    from es_flipout.training.metrics import TerminalReporter
    from es_flipout.training.run_directory import read_config, write_config
    from es_flipout.training.setup import resume_trainer

    console = Console(stderr=True)
    saved = read_config(options.run_dir, options.trust)
    moved = {name: getattr(options, name) for name in ("backend", "workers", "ray_address", "device", "track")}
    changes: dict[str, Any] = {name: value for name, value in moved.items() if value is not None}
    if options.device is not None:
        # Where physics runs, and how many environments fit there, was decided for the device before.
        changes |= {"physics": "auto"} | ({"slots": None} if saved.compute.physics == "gpu" else {})
        if options.device != saved.compute.device:
            changes |= {"compile": "auto"}
    goes_on = options.generations is not None or options.env_steps is not None
    if goes_on:
        changes |= dataclasses.asdict(saved.schedule.extended(options.generations, options.env_steps))
    config = saved.replace(**changes)
    find_modules_here()
    reporter = TerminalReporter(console, config.task.env_id)
    with locked(options.run_dir):
        advice = f"continue with: {resume_command(config, options.run_dir)}"
        with starting_up(console, config, advice):
            trainer = resume_trainer(options.run_dir, reporter, changes, build_for(config), options.trust)
        with going_on(config, options.run_dir), closing(trainer):
            if goes_on and trainer.finished:
                done = trainer.progress
                raise UserError(
                    f"{options.run_dir} has already done {done.generation:,} generations and {done.env_steps:,} environment "
                    "steps: train on to more"
                )
            if goes_on or options.device is not None:
                there = trainer.config.compute
                places = (
                    {name: getattr(there, name) for name in ("device", "physics", "slots", "compile")}
                    if options.device
                    else {}
                )
                lasting = saved.replace(**places, **dataclasses.asdict(config.schedule))
                write_config(options.run_dir, lasting)
            if goes_on and (line := schedule_line(config)) is not None:
                reporter.say(line)
            return train_to_the_end(trainer, options.run_dir, console)


def schedule_line(config: TrainConfig) -> str | None:
    """Say where the changes of sigma, learning rate and episode cap end; None if nothing changes or the run ends there."""
    strategy, schedule = config.strategy, config.schedule
    finals = {"sigma": strategy.sigma_final, "learning rate": strategy.learning_rate_final}
    changing = [f"{name} ({value:g})" for name, value in finals.items() if value is not None]
    ends = [(schedule.anneal_generations, "generations"), (schedule.anneal_env_steps, "environment steps")]
    where = " or ".join(f"{count:,} {unit}" for count, unit in ends if count is not None)
    return f"from {where} on, these keep their final values: {', '.join(changing)}" if changing and where else None
