"""The entry point of ``es-flipout``."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import re
import sys
import traceback
from collections.abc import Sequence

from es_flipout.errors import UserError, gpu_fault
from es_flipout.training.signals import Handler, Stopped, raise_stopped, stop_on_signals

# Each command is the function ``run`` of the module of the same name.
_COMMANDS = {
    "train": "train a policy: es-flipout train HalfCheetah-v5",
    "resume": "continue a run, bitwise identically: es-flipout resume RUN_DIR",
    "evaluate": "score a run in the single Gymnasium environment: es-flipout evaluate RUN_DIR",
    "render": "write a video of the policy: es-flipout render RUN_DIR --output clip.mp4",
    "play": "show the policy in a window: es-flipout play RUN_DIR",
    "export": "write the policy as ONNX or for torch: es-flipout export RUN_DIR --output policy.onnx",
    "plot": "plot learning curves: es-flipout plot RUN_DIR... --output curves.png",
    "runs": "list runs: es-flipout runs [DIR]",
    "push": "upload a policy to the Hugging Face Hub: es-flipout push RUN_DIR USER/NAME",
    "envs": "list what can be trained",
    "tune": "search for the options of an environment: es-flipout tune CartPole-v1",
    "presets": "show the preset of an environment: es-flipout presets HalfCheetah-v5",
    "bench": "measure speed on this machine: es-flipout bench forward|rollout|compare",
    "plan": "predict the memory of a run: es-flipout plan Humanoid-v5",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code: 2 for user errors, 128 plus the signal if one stopped it."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with_traceback = "--traceback" in arguments
    arguments = [argument for argument in arguments if argument != "--traceback"]
    code = 130
    # One more Ctrl-C can come when everything was saved and said, and the process is about to end.
    with (
        contextlib.suppress(KeyboardInterrupt),
        stop_on_signals(raise_stopped, at_the_end=argv is None) as signals,
    ):
        code = _answered(arguments, with_traceback, signals)
    return code


def _answered(arguments: list[str], with_traceback: bool, signals: Handler) -> int:
    """Run a command, say why it ended early if it did, and return the exit code."""
    try:
        return _run(arguments)
    except BrokenPipeError:  # the reader, such as head, closed the pipe
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 0
    except KeyboardInterrupt as stop:
        notes = "; ".join([str(stop) or "interrupted", *getattr(stop, "__notes__", ())])
        print(notes, file=sys.stderr)
        return 128 + stop.number if isinstance(stop, Stopped) else 130
    except Exception as error:
        line = _line(error)
        if line is None:
            raise
        if with_traceback:
            traceback.print_exception(error)
        print(f"error: {' '.join(line.split())}", file=sys.stderr)
        return 2 if signals.number is None else 128 + signals.number


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: es-flipout COMMAND [options]; every command has --help\n")
        for name, summary in _COMMANDS.items():
            print(f"  {name:10} {summary}")
        print("\n  --traceback, with any command, shows where an error was raised")
        return 0
    command, *rest = arguments
    if command == "--version":
        import es_flipout

        print(f"es-flipout {es_flipout.__version__}")
        return 0
    if command not in _COMMANDS:
        near = difflib.get_close_matches(command, _COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(_COMMANDS)}"
        raise UserError(f"unknown command {command!r}: {hint}")
    return importlib.import_module(f"es_flipout.cli.{command}").run(rest)


def _line(error: Exception) -> str | None:
    """Return the message of an error that the user can fix; None for any other error."""
    if isinstance(error, UserError | OSError):
        return str(error)
    # Environment errors are user errors too, but importing their classes up front would take seconds.
    base = sys.modules.get("es_flipout.envs.base")
    if base and isinstance(error, (base.UnsupportedEnvironmentError, base.EnvironmentFailureError)):
        return str(error)
    torch = sys.modules.get("torch")
    fault = gpu_fault(error)
    if (torch and isinstance(error, torch.OutOfMemoryError)) or (
        fault and re.search("allocate|out of memory", fault, re.IGNORECASE)
    ):
        return "the GPU has too little memory for this; es-flipout plan shows what a run needs"
    if fault is not None:
        notes = "; ".join(["use --device cpu if it happens again", *getattr(error, "__notes__", ())])
        return f"the GPU or its driver failed: {fault}; {notes}"
    # PyTorch has no class of its own for a failed allocation on the CPU.
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error)):
        return "this machine has too little memory for this; es-flipout plan shows what a run needs"
    return None
