"""``es-flipout bench forward|rollout|compare [options]``."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from es_flipout.cli.parsing import parse
from es_flipout.errors import UserError

_KINDS = ("forward", "rollout", "compare")


def run(arguments: Sequence[str]) -> int:
    """Run a benchmark and print its result."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: es-flipout bench forward|rollout|compare [options]; each benchmark has --help")
        return 0
    kind, *rest = arguments
    if kind not in _KINDS:
        raise UserError(f"bench must be one of {', '.join(_KINDS)}, got {kind!r}")
    from es_flipout.bench import compare, forward, rollout

    console, command = Console(), f"bench {kind}"
    match kind:
        case "forward":
            forward.run(parse(forward.ForwardBench, rest, command), console)
        case "rollout":
            rollout.run(parse(rollout.RolloutBench, rest, command), console)
        case "compare":
            compare.run(parse(compare.CompareBench, rest, command), console)
    return 0
