"""``es-flipout plot RUN... --output curves.png``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from es_flipout.cli.parsing import parse
from es_flipout.errors import UserError


@dataclass(frozen=True)
class PlotOptions:
    """Plot learning curves of runs: the median over seeds, with their spread."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR...")]
    """Directories of runs, or directories with runs in them."""
    output: Path
    """File to write: .png, .svg or .pdf."""
    x: Literal["env_steps", "wall_s", "generation"] = "env_steps"
    """What to plot against."""
    y: str = "score"
    """Column of metrics.csv to plot, such as score or mean_return."""
    group_by: str | None = None
    """Option whose values make the curves; None for one curve per configuration, over its seeds."""
    force: bool = False
    """Overwrite the output."""


def run(arguments: Sequence[str]) -> int:
    """Plot the runs."""
    options = parse(PlotOptions, arguments, "plot")
    if not options.runs:
        raise UserError("which runs? es-flipout plot RUN_DIR... --output curves.png")

    from matplotlib.figure import Figure

    from es_flipout.tools.curves import ENDINGS, plot_groups, read_groups
    from es_flipout.tools.output import check_output, written
    from es_flipout.tools.runs import run_dirs
    from es_flipout.tools.source import find_run

    check_output(options.output, ENDINGS, options.force)
    named = [find_run(each) for each in options.runs]
    found = [run_dir for each in named for run_dir in ((list(run_dirs(each)) if each.is_dir() else []) or [each])]
    group_by = None if options.group_by is None else options.group_by.replace("-", "_")
    groups = read_groups(found, options.x, options.y.replace("-", "_"), group_by)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    plot_groups(figure.subplots(), groups, options.x, options.y.replace("-", "_"))
    with written(options.output) as temporary:
        figure.savefig(temporary, dpi=120)
    print(f"{options.output}: {len(found)} runs in {len(groups)} curve{'s' if len(groups) > 1 else ''}")
    return 0
