"""``es-flipout push RUN USER/NAME``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from es_flipout.cli.parsing import parse


@dataclass(frozen=True)
class PushOptions:
    """Upload the policy of a run to the Hugging Face Hub, with its configuration, score, card and videos."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run directory, zoo:ENV_ID or hub:USER/NAME."""
    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="USER/NAME")]
    """Repository on the Hub; it is created if it does not exist."""
    which: Literal["best", "last"] = "best"
    """The mean policy with the best score of training, or the last one."""
    private: bool = False
    """Create a private repository."""


def run(arguments: Sequence[str]) -> int:
    """Upload the policy and print its address."""
    options = parse(PushOptions, arguments, "push")

    from es_flipout.tools.hub import push
    from es_flipout.tools.source import find_run

    print(push(find_run(options.run), options.name, options.which, options.private))
    print(f"use it as hub:{options.name}")
    return 0
