"""Curves of several runs: the median over seeds with the spread of the seeds."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from es_flipout.config import PLACES, Compute
from es_flipout.errors import UserError
from es_flipout.training.metrics import COLUMNS
from es_flipout.training.run_directory import read_config

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Values of x, ascending, and of y, without missing ones."""

ENDINGS = (".png", ".svg", ".pdf")
_NAMES = {
    "env_steps": "environment steps",
    "wall_s": "seconds of training",
    "score": "score of the mean policy",
    "mean_return": "mean return of the members",
    "best_return": "return of the best member",
}
# Differences in these options do not make another experiment.
_SAME = {"seed", "generations", "env_steps", *(field.name for field in dataclasses.fields(Compute))}


@dataclass(frozen=True)
class Group:
    """The runs of one curve: those that differ in their seeds only, or agree in a chosen option.

    Attributes:
        label: what distinguishes them from the other groups.
        curves: one for every run.
    """

    label: str
    curves: Sequence[Curve]


def read_groups(run_dirs: Sequence[Path], x: str, y: str, group_by: str | None = None) -> list[Group]:
    """Read the metrics of runs, grouped.

    Args:
        run_dirs: directories of the runs.
        x: column of ``metrics.csv`` to plot against.
        y: column to plot.
        group_by: option, by its flat name, whose values make the groups; by default runs that differ only in their seed,
            their length and where they were computed are a group.

    Raises:
        UserError: a column or an option does not exist, or a run is missing or has no value of ``y``.
    """
    for name in (x, y):
        if name not in COLUMNS:
            raise UserError(f"unknown column {name}; metrics.csv has {', '.join(COLUMNS)}")
    if group_by is not None and group_by not in PLACES:
        raise UserError(f"unknown option {group_by}; the options are {', '.join(PLACES)}")
    configs = [read_config(run_dir, trust=True).flat() for run_dir in run_dirs]  # nothing is imported here
    names = [group_by] if group_by is not None else _differences(configs)
    found: dict[tuple[Any, ...], list[int]] = {}
    for run, config in enumerate(configs):
        found.setdefault(tuple(config[name] for name in names), []).append(run)
    groups: list[Group] = []
    for runs in found.values():
        config = configs[runs[0]]
        # Presets differ in many options from task to task: only runs of the same task are compared.
        same_task = [other for other in configs if other["env_id"] == config["env_id"]]
        shown = (
            names if group_by is not None else [name for name in names if name in ("env_id", *_differences(same_task))]
        )
        label = ", ".join(_label(name, config[name]) for name in shown) or str(config["env_id"])
        groups.append(Group(label, [read_curve(run_dirs[run], x, y) for run in runs]))
    return groups


def read_curve(run_dir: Path, x: str, y: str) -> Curve:
    """Read two columns of a run's ``metrics.csv``, without the rows in which one is empty or not finite.

    Raises:
        UserError: there is no such file, or no such row.
    """
    path = run_dir / "metrics.csv"
    if not path.exists():
        raise UserError(f"{run_dir} has no metrics.csv: the run has not completed a generation")
    points: list[tuple[float, float]] = []
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        for row in csv.DictReader(file):
            try:
                point = float(row[x]), float(row[y])
            except (KeyError, TypeError, ValueError):  # not scored in this generation, or an incomplete last row
                continue
            if all(map(math.isfinite, point)):
                points.append(point)
    if not points:
        raise UserError(f"{run_dir} has no {y} yet")
    xs, ys = np.array(points).T
    return xs, ys


def plot_groups(axis: Axes, groups: Sequence[Group], x: str, y: str) -> None:
    """Draw groups on an axis, with labels."""
    for index, group in enumerate(groups):
        seeds = f" ({len(group.curves)} seeds)" if len(group.curves) > 1 else ""
        plot_curves(axis, group.curves, f"C{index % 10}", f"{group.label}{seeds}", band=True)
    axis.set_xlabel(_NAMES.get(x, x))
    axis.set_ylabel(_NAMES.get(y, y))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def plot_curves(axis: Axes, curves: Sequence[Curve], color: str, label: str | None = None, band: bool = False) -> None:
    """Draw the median of several curves thick where all have values, and their spread.

    Args:
        axis: where to draw.
        curves: one for every seed.
        color: a color of matplotlib.
        label: for the legend.
        band: shade the range of the seeds (of four or more, from the second smallest to the second largest value)
            instead of drawing a thin line for each.
    """
    if len(curves) == 1:
        marker = "." if len(curves[0][0]) == 1 else None
        axis.plot(*curves[0], color=color, linewidth=1.8, marker=marker, label=label)
        return
    grid, values = sorted_values(curves)
    axis.plot(grid, np.median(values, axis=0), color=color, linewidth=1.8, label=label)
    if not band:
        for xs, ys in curves:
            axis.plot(xs, ys, color=color, alpha=0.3, linewidth=0.8)
        return
    low, high = (values[1], values[-2]) if len(curves) >= 4 else (values[0], values[-1])
    axis.fill_between(grid, low, high, color=color, alpha=0.12, linewidth=0)


def sorted_values(curves: Sequence[Curve], points: int = 200) -> Curve:
    """Interpolate curves where all have values: x ``(points,)``, and y ``(curves, points)``, sorted at every x."""
    first, last = max(xs[0] for xs, _ in curves), min(xs[-1] for xs, _ in curves)
    grid = np.linspace(first, max(first, last), points)
    return grid, np.sort([np.interp(grid, xs, ys) for xs, ys in curves], axis=0)


def _differences(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the options that differ between the runs, and make another experiment."""
    return [name for name in PLACES if name not in _SAME and len({repr(config[name]) for config in configs}) > 1]


def _label(name: str, value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text if name in ("env_id", "policy") else f"{name} {text}"
