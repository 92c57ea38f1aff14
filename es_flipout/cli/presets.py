"""``es-flipout presets ENV_ID [--json]``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from es_flipout.cli.parsing import parse
from es_flipout.config import TrainConfig
from es_flipout.presets import TUNED, preset


@dataclass(frozen=True)
class PresetsOptions:
    """Show the preset of an environment: the values that training uses for options that are not given."""

    env_id: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ENV_ID")]
    """Gymnasium id of the environment."""
    json: bool = False
    """Print it as JSON, which train --config reads."""


def run(arguments: Sequence[str]) -> int:
    """Print the preset; values that differ from the defaults of all environments are marked."""
    options = parse(PresetsOptions, arguments, "presets")
    config = preset(options.env_id)
    if options.json:
        print(config.to_json(), end="")
        return 0
    tuned = "tuned" if options.env_id.removeprefix("es_flipout/") in TUNED else "not tuned: a starting point"
    print(f"{options.env_id} ({tuned}); * differs from the default\n")
    flat, usual = config.flat(), TrainConfig.of(options.env_id).flat()
    for subject, kind in TrainConfig.SUBJECTS.items():
        print(f"{subject}:")
        for field in dataclasses.fields(kind):
            name = "policy" if (subject, field.name) == ("policy", "kind") else field.name
            if name != "env_id":
                mark = "*" if flat[name] != usual[name] else " "
                print(f"{mark} --{name.replace('_', '-'):22} {_shown(flat[name])}")
    return 0


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
