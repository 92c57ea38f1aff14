"""``es-flipout plan ENV_ID [options of train] [--json]``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from es_flipout.cli.parsing import parse_with_preset
from es_flipout.config import TrainConfig


@dataclass(frozen=True)
class PlanOptions:
    """Predict the memory of a training run without running it."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    preset: Path | None = None
    """Preset file with the defaults, in place of the preset of the environment (es-flipout tune writes one)."""
    json: bool = False
    """Print the result as JSON."""


def run(arguments: Sequence[str]) -> int:
    """Predict the memory and print it."""
    options = parse_with_preset(PlanOptions, arguments, "plan")

    from es_flipout.cli.session import find_modules_here
    from es_flipout.rollout.memory import show_bytes
    from es_flipout.rollout.placement import planned
    from es_flipout.rollout.plan import make_plan

    find_modules_here()
    plan = make_plan(planned(options.config))
    if options.json:
        print(json.dumps(plan.to_dict(), indent=2))
        return 0
    where = "GPU" if plan.device == "cuda" else "CPU"
    print(f"{plan.env_id}: {plan.population_size:,} members, {plan.episodes} episodes each, on the {where}")
    print(f"{plan.slots:,} parallel environments, policies in blocks of {plan.row_block:,} rows ({plan.blocks})")
    for name, size in plan.parts.items():
        print(f"  {name:32} {show_bytes(size):>12}")
    free = "" if plan.free is None else f" of {show_bytes(plan.free)} free"
    print(f"  {'total':32} {show_bytes(plan.total):>12}{free}")
    return 0
