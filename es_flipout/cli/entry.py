"""The entry point of ``es-flipout``."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from es_flipout.errors import UserError

# Each command is the function ``run`` of the module of the same name.
_COMMANDS = {
    "train": "train a policy: es-flipout train HalfCheetah-v5",
    "resume": "continue a run, bitwise identically: es-flipout resume RUN_DIR",
    "evaluate": "score a run in the single Gymnasium environment: es-flipout evaluate RUN_DIR",
    "envs": "list what can be trained",
    "bench": "measure speed on this machine: es-flipout bench forward|rollout|compare",
    "plan": "predict the memory of a run: es-flipout plan Humanoid-v5",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code (2 for user errors)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: es-flipout COMMAND [options]; every command has --help\n")
        for name, summary in _COMMANDS.items():
            print(f"  {name:10} {summary}")
        return 0
    command, *rest = arguments
    if command == "--version":
        import es_flipout

        print(f"es-flipout {es_flipout.__version__}")
        return 0
    try:
        if command not in _COMMANDS:
            near = difflib.get_close_matches(command, _COMMANDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(_COMMANDS)}"
            raise UserError(f"unknown command {command!r}: {hint}")
        return importlib.import_module(f"es_flipout.cli.{command}").run(rest)
    except BrokenPipeError:  # the reader, such as head, closed the pipe
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 0
    except (UserError, OSError) as error:
        return _fail(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        # Environment errors are user errors too, but importing their classes up front would take seconds.
        base = sys.modules.get("es_flipout.envs.base")
        if base and isinstance(error, (base.UnsupportedEnvironmentError, base.EnvironmentFailureError)):
            return _fail(error)
        torch = sys.modules.get("torch")
        if torch and isinstance(error, torch.OutOfMemoryError):
            return _fail(UserError("the GPU has too little memory for this; es-flipout plan shows what a run needs"))
        raise


def _fail(error: Exception) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
