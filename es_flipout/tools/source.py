"""Where a run is taken from: the one place that turns what a user names into a run directory."""

from __future__ import annotations

from pathlib import Path


def find_run(run: str | Path) -> Path:
    """Return the directory of a run.

    Args:
        run: a run directory.
    """
    return Path(run)
