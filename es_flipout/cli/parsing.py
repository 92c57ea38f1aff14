"""Parsing of command-line options with tyro; a parse error becomes a one-line message."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import typing
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import tyro

from es_flipout.config import PLACES, TrainConfig
from es_flipout.errors import UserError
from es_flipout.presets import preset

Options = TypeVar("Options")

_PRESET_OF_HELP = "HalfCheetah-v5"  # help shows the values of this preset if no environment is given


def parse(options: type[Options], arguments: Sequence[str], command: str, default: Options | None = None) -> Options:
    """Parse the options of a command.

    Args:
        options: a dataclass; nested dataclasses become groups in the help, and their fields flags without a prefix.
        arguments: command-line arguments after the name of the command.
        command: name of the command.
        default: values of options that are not given.

    Raises:
        UserError: an option is unknown, missing or malformed.
    """
    known = _flags(options)
    for argument in arguments:
        flag = argument.partition("=")[0].replace("_", "-")
        if flag.startswith("--") and flag not in known:
            near = difflib.get_close_matches(flag, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f" (see es-flipout {command} --help)"
            raise UserError(f"unrecognized option {flag}{hint}")
    with _one_line_errors(command):
        return tyro.cli(
            options,
            args=list(arguments),
            prog=f"es-flipout {command}",
            default=default if default is not None else tyro.MISSING_NONPROP,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.PositionalRequiredArgs),
        )


def parse_with_preset(options: type[Options], arguments: Sequence[str], command: str) -> Options:
    """Parse options that have a field ``config``; the preset of its environment provides the defaults.

    Raises:
        UserError: an option is unknown, missing or malformed.
    """
    if not arguments:
        raise UserError(f"which environment? es-flipout {command} ENV_ID; `es-flipout envs` lists them")

    def parsed(env_id: str) -> Options:
        config = preset(env_id)
        task = dataclasses.replace(config.task, env_id=tyro.MISSING)
        make: Any = options
        return parse(options, arguments, command, make(config=dataclasses.replace(config, task=task)))

    env_id = arguments[0]
    if env_id.startswith("-"):
        # The environment follows the options, or help was requested: parse everything once to find it.
        env_id = config_of(parsed(_PRESET_OF_HELP)).task.env_id
    found = parsed(env_id)
    given = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
    if "--generations" in given and "--env-steps" not in given:
        # The preset's limit on environment steps must not end the run before the requested generations.
        return dataclasses.replace(typing.cast(Any, found), config=config_of(found).replace(env_steps=None))
    return found


def config_of(options: object) -> TrainConfig:
    """Return the field ``config`` of the options."""
    return typing.cast(TrainConfig, vars(options)["config"])


def _flags(options: type) -> list[str]:
    """Return all flags of an options dataclass."""
    names: list[str] = []
    for name, hint in typing.get_type_hints(options).items():
        names += PLACES if hint is TrainConfig else [name]
    return ["--help", *(f"--{prefix}{name}".replace("_", "-") for name in names for prefix in ("", "no_"))]


@contextlib.contextmanager
def _one_line_errors(command: str) -> Iterator[None]:
    """Turn tyro's parse errors into :class:`UserError`. The hook is not public API; without it, tyro prints a box."""
    try:
        from tyro import _errors as events
    except ImportError:
        yield
        return

    def reject(event: Any) -> None:
        raise UserError(f"{_message(event)} (see es-flipout {command} --help)")

    with events.on_parse_error(reject):
        yield


def _message(event: Any) -> str:
    """Return a one-line message for a parse error; the fields are those of tyro's events."""
    if missing := getattr(event, "missing_arguments", None):
        return f"{', '.join(_name(each.arg) for each in missing)} is required"
    if tokens := getattr(event, "tokens", None):
        return f"unrecognized argument {tokens[0]}"
    argument = getattr(event, "argument", None)
    name = "" if argument is None else _name(argument)
    if choices := getattr(event, "choices", None):
        return f"{name} must be one of {', '.join(choices)}, got {event.value}"
    if message := getattr(event, "message", None):
        return f"{name}: {message}" if name else message
    return f"{name} needs a value" if name else f"the options could not be read ({type(event).__name__})"


def _name(argument: Any) -> str:
    """Return the flag of an option, or the metavar of a positional argument."""
    return str(argument.lowered.metavar if argument.is_positional() else argument.lowered.name_or_flags[0])
