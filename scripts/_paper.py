"""Shared by the scripts that reproduce figures and tables of the Flipout paper: options, the results folder, and bounds."""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from _runs import read_csv, write_environment


def options_of(doc: str | None, images: bool = False, texts: bool = False) -> argparse.ArgumentParser:
    """The options that all these scripts have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="a much smaller version that takes less than a minute")
    parser.add_argument("--render", action="store_true", help="only table.md and figure.png again")
    parser.add_argument("--data-dir", type=Path, help="where the standard files of a public data set are")
    if images:
        parser.add_argument("--images", default="digits", help="digits (default), mnist or cifar10")
    if texts:
        parser.add_argument("--text", default="docstrings", help="docstrings (default) or ptb")
    return parser


def begin(out: Path, config: Mapping[str, object]) -> None:
    """Make the results folder with ``config.json`` and ``environment.json``.

    Rows of an earlier run stay where its configuration was the same, so that an interrupted run goes on; else they are removed.
    """
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, default=str) + "\n"
    if not (out / "config.json").exists() or (out / "config.json").read_text() != text:
        for name in ("runs.csv", "curves.csv"):
            (out / name).unlink(missing_ok=True)
    (out / "config.json").write_text(text)
    write_environment(out)


def done(out: Path, columns: Sequence[str]) -> set[tuple[str, ...]]:
    """These columns of all rows of ``runs.csv``: what need not be run again."""
    return {tuple(row[column] for column in columns) for row in read_csv(out / "runs.csv")}


def read_config(out: Path) -> dict[str, object]:
    """What ``begin`` wrote."""
    return json.loads((out / "config.json").read_text())


def append(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Add rows to a CSV file; the first row names the columns."""
    rows = list(rows)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (nan for one value)."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.mean(values), error
