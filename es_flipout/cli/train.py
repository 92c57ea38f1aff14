"""``es-flipout train ENV_ID [options]``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from es_flipout.cli.parsing import parse_with_preset
from es_flipout.config import TrainConfig


@dataclass(frozen=True)
class TrainOptions:
    """Train a policy. Defaults come from the preset of the environment."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    config_file: Annotated[Path | None, tyro.conf.arg(name="config")] = None
    """Start from the configuration of another run: its directory or config.json. The environment may then be omitted."""
    preset: Path | None = None
    """Preset file with the defaults, in place of the preset of the environment (es-flipout tune writes one)."""
    run_dir: Path | None = None
    """Directory of the run, which must not exist yet; None creates one under runs/."""


def run(arguments: Sequence[str]) -> int:
    """Train to the end and score the policy."""
    options = parse_with_preset(TrainOptions, arguments, "train")
    config = options.config

    from es_flipout.cli.session import (
        build_for,
        check_video,
        find_modules_here,
        going_on,
        starting_up,
        train_to_the_end,
    )
    from es_flipout.training.lock import locked
    from es_flipout.training.metrics import TerminalReporter
    from es_flipout.training.run_directory import require_unused
    from es_flipout.training.setup import make_trainer

    run_dir = options.run_dir if options.run_dir is not None else _new_run_dir(config)
    require_unused(run_dir)
    find_modules_here()
    check_video(config)
    console = Console(stderr=True)
    with starting_up(console, config, "nothing was written"):
        trainer = make_trainer(config, run_dir, TerminalReporter(console, config.task.env_id), build_for(config))
    with going_on(config, run_dir), closing(trainer):
        run_dir.mkdir(parents=True, exist_ok=True)
        with locked(run_dir):
            trainer.create()
            return train_to_the_end(trainer, run_dir, console)


def _new_run_dir(config: TrainConfig) -> Path:
    """Return an unused path under runs/."""
    name, now = config.task.env_id.replace("/", "_"), datetime.now()
    path = Path("runs") / f"{name}_seed{config.schedule.seed}_{now.strftime('%Y-%m-%d_%H-%M-%S')}"
    return path if not path.exists() else path.with_name(f"{path.name}_{now.microsecond}")
