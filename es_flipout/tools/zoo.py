"""The policies that come along: ``results/policies/``, installed as ``es_flipout.zoo``."""

from __future__ import annotations

import difflib
from pathlib import Path

import es_flipout
from es_flipout.errors import UserError

_PACKAGE = Path(es_flipout.__file__).parent
_FOLDERS = (_PACKAGE / "zoo", _PACKAGE.parent / "results" / "policies")  # of an installation, and of a source tree


def policies() -> dict[str, Path]:
    """Return the directories of all policies by the name of the task."""
    found: dict[str, Path] = {}
    for folder in _FOLDERS:
        for path in sorted(folder.glob("*/policy.safetensors")):
            found.setdefault(path.parent.name, path.parent)
    return found


def folder_name(env_id: str) -> str:
    """Return the name of the directory of a task."""
    return env_id.replace("/", "_").replace(":", "_")


def find(env_id: str) -> Path:
    """Return the directory of the policy for a task.

    Raises:
        UserError: there is none.
    """
    found = policies()
    name = folder_name(env_id)
    if name not in found:
        near = difflib.get_close_matches(name, found, n=1, cutoff=0.5)
        known = f"did you mean zoo:{near[0]}?" if near else f"it has {', '.join(found) or 'none yet'}"
        raise UserError(f"the zoo has no policy for {env_id!r}: {known}")
    return found[name]
