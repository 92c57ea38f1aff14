"""What all scripts share: the command line, the files of a results folder, runs, tables in Markdown, and figures.

A results folder holds ``config.json``, ``environment.json``, ``runs.csv`` (one row per run or measurement), often ``curves.csv``,
and what is rendered from them: ``table.md`` and ``figure.png``. pandas and matplotlib are imported where they are needed, so
that ``checks/gpu.py`` runs with the package's own dependencies.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import mean, median, stdev
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from es_flipout.errors import UserError
from es_flipout.runinfo import environment

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = list[dict[str, object]]
Frame = Any  # a pandas DataFrame: pandas has no type hints, and what is inferred from its code is often wrong

# The command line


def run_script(main: Callable[[], object]) -> None:
    """Run a script; an error that the user can fix becomes one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


def script_parser(doc: str | None, quick: str | None = None) -> argparse.ArgumentParser:
    """A parser with ``--out``, ``--render`` and, where ``quick`` describes it, ``--quick``."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=quick is None, help="results folder")
    parser.add_argument("--render", action="store_true", help="only write the tables and figures again")
    if quick is not None:
        parser.add_argument("--quick", action="store_true", help=quick)
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line; ``--quick`` alone writes to ``runs/``.

    Raises:
        UserError: there is neither ``--out`` nor ``--quick``.
    """
    options = parser.parse_args()
    if options.out is None:
        if not options.quick:
            raise UserError("--out DIRECTORY is missing (only --quick works without it)")
        options.out = Path("runs") / f"{Path(sys.argv[0]).stem}_quick"
    return options


def config_of(options: argparse.Namespace, *without: str) -> dict[str, object]:
    """The options that determine what is measured, for ``config.json``."""
    return {name: value for name, value in vars(options).items() if name not in {"out", "render", *without}}


def usable_cores() -> int:
    """Cores that this process may use: the default number of processes."""
    return len(os.sched_getaffinity(0))


def processor(name: str) -> str:
    """The name of a processor, without signs and clock rate."""
    return re.sub(r"\(R\)|\(TM\)| @.*", "", name)


# Files of a results folder


def begin(out: Path, config: object, fresh: bool = False) -> None:
    """Create the folder with ``config.json`` and ``environment.json``.

    The rows of an interrupted run of the same configuration are kept, unless it is to start ``fresh``.

    Raises:
        UserError: the folder holds runs of another configuration.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "config.json"
    if fresh:
        (out / "runs.csv").unlink(missing_ok=True)
    elif path.exists() and path.read_text(encoding="utf-8") != _json_text(config):
        raise UserError(f"{path} is another configuration: choose another --out")
    write_json(path, config)
    write_environment(out)


def write_environment(out: Path | str) -> None:
    """Write hardware, versions and commit to ``environment.json``."""
    write_json(Path(out) / "environment.json", environment())


def write_json(path: Path, value: object) -> None:
    """Write a JSON file; what JSON does not know becomes text."""
    path.write_text(_json_text(value), encoding="utf-8")


def read_json(path: Path) -> Any:
    """The value in a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def _json_text(value: object) -> str:
    return json.dumps(value, indent=2, default=str) + "\n"


def write_table(out: Path, text: str) -> None:
    """Write ``table.md``, and print it."""
    print(text)
    (out / "table.md").write_text(text, encoding="utf-8")


def append_csv(path: Path, rows: Rows) -> None:
    """Append rows to a CSV file; the first row ever written names the columns."""
    if not rows:
        return
    new = not path.exists()
    with path.open("a+", newline="", encoding="utf-8") as file:
        file.seek(0)
        writer = csv.DictWriter(file, list(rows[0]) if new else next(csv.reader(file)), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> Frame:
    """The rows of a CSV file.

    Raises:
        UserError: there is no such file.
    """
    import pandas as pd

    if not path.exists():
        raise UserError(f"{path} does not exist: run the script without --render")
    return pd.read_csv(path)


def groups(frame: Frame, column: str, *more: str) -> Iterator[tuple[Any, Frame]]:
    """The values of one column (tuples, of several), each with its rows, in order of first appearance."""
    yield from frame.groupby([column, *more] if more else column, sort=False)


# Runs


class Job:
    """A run that can be sent to another process; subclasses are dataclasses.

    Attributes:
        KEY: names of the fields that identify the run in ``runs.csv``.
    """

    KEY: ClassVar[tuple[str, ...]]

    @property
    def key(self) -> dict[str, object]:
        """The values of these fields, by name."""
        return {name: getattr(self, name) for name in self.KEY}


JobT = TypeVar("JobT", bound=Job)


def done(out: Path, columns: Sequence[str]) -> set[tuple[str, ...]]:
    """These columns of ``runs.csv``, as text: what need not be run again."""
    path = out / "runs.csv"
    if not path.exists():
        return set()
    with path.open(newline="", encoding="utf-8") as file:
        return {tuple(row[column] for column in columns) for row in csv.DictReader(file)}


def run_missing(jobs: Iterable[JobT], run: Callable[[JobT], Mapping[str, Rows]], out: Path, processes: int = 1) -> None:
    """Run the jobs that ``runs.csv`` does not hold yet, and append the rows that ``run`` returns by the names of CSV files.

    One job at a time runs in this process; several run side by side in processes of their own.
    """
    jobs = list(jobs)
    before = done(out, jobs[0].KEY) if jobs else set()
    todo = [job for job in jobs if tuple(map(str, job.key.values())) not in before]
    if processes == 1:
        for job in todo:
            _keep(out, run(job))
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(run, job) for job in todo]):
            _keep(out, future.result())


def _keep(out: Path, files: Mapping[str, Rows]) -> None:
    for name in sorted(files, key=lambda name: name == "runs"):  # last: its row says that the run is complete
        append_csv(out / f"{name}.csv", files[name])
    for row in files["runs"]:
        values = (
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
        )
        print(", ".join(values), flush=True)


# Tables


def markdown(header: str, rows: Iterable[Iterable[object]]) -> str:
    """A table in Markdown; the header is its first line, ``a | b | c``."""
    lines = [f"| {header} |", "|---" * (header.count("|") + 1) + "|"]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def spread(values: Iterable[float] | Mapping[str, float] | None, show: str | Callable[[float], str]) -> str:
    """Median (smallest to largest) of values, or of a benchmark's ``min``, ``median`` and ``max``; nothing for None."""
    if values is None:
        return ""
    numbers = list(values.values()) if isinstance(values, Mapping) else list(values)
    shown = [show(v) if callable(show) else format(v, show) for v in (median(numbers), min(numbers), max(numbers))]
    return "{} ({} to {})".format(*shown)


def mean_and_error(values: Iterable[float]) -> tuple[float, float]:
    """Mean and its standard error (nan for a single value)."""
    values = list(values)
    return mean(values), stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


# Figures


def panels(count: int, width: float, height: float, columns: int | None = None) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` panels of a size in inches, in one row or in rows of ``columns``."""
    from matplotlib.figure import Figure

    columns = columns or count
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows))
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def save(figure: Figure, out: Path) -> None:
    """Write ``figure.png``."""
    figure.tight_layout()
    figure.savefig(out / "figure.png", dpi=110)


def plot_seeds(
    axis: Axes,
    curves: Frame,
    x: str,
    y: str,
    color: str,
    label: str | None = None,
    band: int | None = None,
    style: str = "-",
) -> None:
    """Plot the median of column ``y`` over the seeds thick, and every seed thin, against column ``x``.

    With ``band`` the range of the seeds is shaded instead, without so many of them at either end; 0 is all of it.
    """
    import numpy as np

    from es_flipout.tools.curves import sorted_values

    lines = [(own[x].to_numpy(), own[y].to_numpy()) for _, own in groups(curves, "seed")]
    grid, values = sorted_values(lines)
    axis.plot(grid, np.median(values, axis=0), style, color=color, linewidth=1.8, label=label)
    if band is None:
        for xs, ys in lines:
            axis.plot(xs, ys, color=color, alpha=0.3, linewidth=0.8)
    elif len(lines) > 2 * band + 1:
        axis.fill_between(grid, values[band], values[-1 - band], color=color, alpha=0.12, linewidth=0)
