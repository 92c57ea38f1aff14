"""Output files of the tools: where they go, and that none is overwritten by accident."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from es_flipout.errors import UserError


def check_output(path: Path, endings: Sequence[str], force: bool) -> None:
    """Check that an output file can be written, before anything is computed.

    Args:
        path: the file.
        endings: allowed endings of its name, such as ``".png"``.
        force: whether an existing file may be overwritten.

    Raises:
        UserError: the ending is unknown, the file exists, or its directory does not.
    """
    if path.suffix.lower() not in endings:
        raise UserError(f"output must end with {' or '.join(endings)}, got {path.name}")
    if path.is_dir():
        raise UserError(f"{path} is a directory")
    if path.exists() and not force:
        raise UserError(f"{path} exists: choose another --output, or overwrite it with --force")
    if not path.parent.is_dir():
        raise UserError(f"directory {path.parent} does not exist")


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """Yield a temporary path with the same ending, which replaces ``path`` if the block succeeds."""
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
