"""Where a run is taken from: the one place that turns what a user names into a run directory."""

from __future__ import annotations

from pathlib import Path

from es_flipout.tools import hub, zoo


def find_run(run: str | Path) -> Path:
    """Return the directory of a run.

    Args:
        run: a run directory; ``zoo:ENV_ID`` for a policy that comes along; or ``hub:USER/NAME`` for one on the Hugging
            Face Hub, which is downloaded.

    Raises:
        UserError: there is no such policy.
    """
    kind, _, name = str(run).partition(":")
    match kind:
        case "zoo":
            return zoo.find(name)
        case "hub":
            return hub.find(name)
    return Path(run)
