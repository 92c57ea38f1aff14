"""``es-flipout runs [DIR]``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from es_flipout.cli.parsing import parse


@dataclass(frozen=True)
class RunsOptions:
    """List the runs in a directory."""

    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")] = Path("runs")
    """Where to look, at any depth."""
    json: bool = False
    """Print the list as JSON."""


def run(arguments: Sequence[str]) -> int:
    """Print the list."""
    options = parse(RunsOptions, arguments, "runs")

    from es_flipout.tools.runs import list_runs

    runs = list_runs(options.directory)
    if options.json:
        print(json.dumps([asdict(each) for each in runs], indent=2))
        return 0
    if not runs:
        print(f"no runs in {options.directory}")
        return 0
    header = ("task", "seed", "generation", "steps", "score", "state", "changed", "run")
    rows = [
        (
            each.env_id or "?",
            _shown(each.seed),
            _shown(each.generation),
            _shown(each.env_steps),
            "-" if each.score is None else f"{each.score:,.1f}",
            each.state,
            each.updated,
            each.run_dir,
        )
        for each in runs
    ]
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, *rows):
        cells = (
            cell.rjust(width) if header[i] in ("seed", "generation", "steps", "score") else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join(cells).rstrip())
    return 0


def _shown(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
