"""An environment of their own for other packages: what they need never meets what this package is tested with."""

from __future__ import annotations

import json
import subprocess
import venv
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from es_flipout.errors import UserError


def same(package: str, name: str | None = None) -> str:
    """A requirement: the version of a package that runs here, written as ``name`` (with extras) or as it is."""
    return f"{name or package}=={version(package).partition('+')[0]}"


def installed(folder: Path, torch: str, others: Sequence[str]) -> Path:
    """The Python of an environment with these packages; it is created when it does not exist.

    Raises:
        UserError: pip could not install them.
    """
    python, marker, wanted = folder / "bin" / "python", folder / "peers.json", [torch, *others]
    if marker.exists() and json.loads(marker.read_text()) == wanted:
        return python
    print(f"installing {', '.join(others)} in {folder}", flush=True)
    if not python.exists():
        venv.create(folder, with_pip=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    for some in ([torch], wanted):  # torch first and alone, so that nothing brings another build of it
        if subprocess.run([*pip, *some], check=False).returncode:
            raise UserError(f"could not install {', '.join(some)}; see pip's messages above")
    marker.write_text(json.dumps(wanted))
    return python
