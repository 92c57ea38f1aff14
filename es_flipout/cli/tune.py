"""``es-flipout tune ENV_ID [options]``."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console

from es_flipout.cli.parsing import given_options, parse_with_preset
from es_flipout.config import TrainConfig
from es_flipout.errors import UserError
from es_flipout.tuning.space import NAMES

if TYPE_CHECKING:
    from es_flipout.tuning.search import Outcome


@dataclass(frozen=True)
class TuneOptions:
    """Search for the options of an environment with Optuna. The search starts from its preset.

    Options that are given are not searched. The same command continues a search that was stopped or killed.
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    trials: int = 50
    """Trials to finish, complete or pruned."""
    seeds: int = 3
    """Runs per trial, with the seeds --seed, --seed + 1, ..."""
    jobs: int | None = None
    """Trials in parallel, one process each; None for one per core."""
    search: tuple[str, ...] = ()
    """Names of the options to search, such as sigma horizon; by default those that make sense for the task."""
    pruner: Literal["median", "halving", "none"] = "median"
    """Stop a trial whose score is below the median of others at this point, or by successive halving."""
    confirm: int = 3
    """Train the best trials, and the start of the search, with fresh seeds; 0 for no confirmation."""
    confirm_seeds: int = 5
    """Fresh seeds of the confirmation."""
    output: Path | None = None
    """Directory of the study, the plots and the preset; None for runs/tune_ENV_ID."""
    preset: Path | None = None
    """Preset file from which to start, in place of the preset of the environment."""


def run(arguments: Sequence[str]) -> int:
    """Search, and print the preset."""
    options = parse_with_preset(TuneOptions, arguments, "tune")
    config = options.config
    for name in ("trials", "seeds", "confirm_seeds"):
        _at_least(name, getattr(options, name), 1)
    _at_least("confirm", options.confirm, 0)
    if options.jobs is not None:
        _at_least("jobs", options.jobs, 1)
    if config.compute.backend != "local":
        raise UserError("backend must be local: trials run in processes of this machine (--jobs)")
    if config.schedule.generations is None and config.schedule.env_steps is None:
        raise UserError("the length of a run is missing: set --env-steps")
    names = [name.replace("-", "_") for name in options.search]
    if unknown := [name for name in names if name not in NAMES]:
        raise UserError(f"{unknown[0]} cannot be searched; choose from {', '.join(NAMES)}")
    if importlib.util.find_spec("optuna") is None:
        raise UserError("es-flipout tune needs Optuna: pip install 'es-flipout[tune]'")

    from es_flipout.cli.session import find_modules_here
    from es_flipout.envs.mujoco_cpu import usable_cores
    from es_flipout.tuning.search import Search, search

    find_modules_here()
    env_id = config.task.env_id
    name = re.sub(r"[^\w.-]", "_", env_id)
    folder = options.output if options.output is not None else Path("runs") / f"tune_{name}"
    console = Console(stderr=True)
    outcome = search(
        Search(
            config,
            folder,
            trials=options.trials,
            seeds=options.seeds,
            jobs=options.jobs if options.jobs is not None else usable_cores(),
            names=names,
            fixed=given_options(arguments),
            pruner=options.pruner,
            confirm=options.confirm,
            confirm_seeds=options.confirm_seeds,
        ),
        console,
    )
    _print(outcome, config, folder, options.trials)
    return 0


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"{name.replace('_', '-')} must be at least {least}, got {value}")


def _print(outcome: Outcome, start: TrainConfig, folder: Path, trials: int) -> None:
    from es_flipout.training.checkpoint import atomic_write
    from es_flipout.tuning.result import preset_code, preset_json
    from es_flipout.tuning.show import table

    if outcome.best:
        Console().print(table(outcome.best))
    if outcome.chosen is None:
        print(f"stopped with {outcome.finished} of {trials} trials in {folder}; continue with the same command")
        return
    for each in outcome.confirmed:
        name, scores = each.candidate.name, ", ".join(f"{score:,.1f}" for score in sorted(each.scores))
        named = f"{name}, the start of the search" if each.candidate.config == start and name != "start" else name
        print(f"{named}: {each.mean:,.1f} in Gymnasium, seeds not used by the search ({scores})")
    config = outcome.chosen.config
    path = folder / "preset.json"
    atomic_write(path, preset_json(config))
    print(f"preset ({outcome.chosen.name}), ready to paste into es_flipout/presets.py:\n\n{preset_code(config)}\n")
    print(f"plots and preset file: {folder}")
    # A file is not trusted to import a module.
    env_id = "" if config.task.module is None else f"{shlex.quote(config.task.env_id)} "
    print(f"train with it: es-flipout train {env_id}--preset {shlex.quote(str(path))}")
