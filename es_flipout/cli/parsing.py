"""Parsing of command-line options with tyro; a parse error becomes a one-line message."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import tyro

from es_flipout.config import PLACES, TrainConfig
from es_flipout.errors import UserError
from es_flipout.presets import preset, read_preset

Options = TypeVar("Options")

# What other tools call an option.
_ALIASES = {
    **dict.fromkeys(("lr", "step-size", "alpha"), "learning-rate"),
    **dict.fromkeys(("popsize", "pop-size", "pop", "population", "npop", "members"), "population-size"),
    **dict.fromkeys(("steps", "timesteps", "total-timesteps", "n-timesteps", "max-steps", "num-steps"), "env-steps"),
    **dict.fromkeys(("iterations", "num-iterations", "epochs", "n-generations", "gens"), "generations"),
    **dict.fromkeys(("num-envs", "n-envs", "envs"), "slots"),
    **dict.fromkeys(("std", "noise-std", "sigma-init"), "sigma"),
    **dict.fromkeys(("net-arch", "hidden-sizes", "layers"), "hidden"),
    **dict.fromkeys(("output", "out-dir", "log-dir", "logdir", "folder"), "run-dir"),
    **dict.fromkeys(("n-eval-episodes", "eval-episodes"), "evaluation-episodes"),
    **dict.fromkeys(("num-workers", "n-workers", "n-jobs"), "workers"),
}
_NUMBER = re.compile(r"((?:\d[\d_]*)?(?:\.\d+)?(?<=\d)(?:[eE]\+?\d{1,2})?)([kKmMbBgG]?)", re.ASCII)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}

_UNNAMED = ""  # the environment, if it is that of a file
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
            alias = _ALIASES.get(flag.removeprefix("--"))
            near = [f"--{alias}"] if f"--{alias}" in known else difflib.get_close_matches(flag, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f" (see es-flipout {command} --help)"
            raise UserError(f"unrecognized option {flag}{hint}")
    with _one_line_errors(command):
        return tyro.cli(
            options,
            args=_with_plain_numbers(arguments, known),
            prog=f"es-flipout {command}",
            default=default if default is not None else tyro.MISSING_NONPROP,
            config=(tyro.conf.OmitArgPrefixes,),
        )


def parse_with_preset(options: type[Options], arguments: Sequence[str], command: str) -> Options:
    """Parse options that have a field ``config``.

    The preset of its environment provides the defaults, or the file that ``--config`` or ``--preset`` names.

    Raises:
        UserError: an option is unknown, missing or malformed, or the file is not valid.
    """
    if not arguments:
        raise UserError(f"which environment? es-flipout {command} ENV_ID; `es-flipout envs` lists them")

    def parsed(env_id: str) -> Options:
        config = preset(env_id)
        task = dataclasses.replace(config.task, env_id=tyro.MISSING)
        make: Any = options
        return parse(options, arguments, command, make(config=dataclasses.replace(config, task=task)))

    files = {flag: Path(file) for flag in _READERS if (file := _value_of(flag, arguments)) is not None}
    if len(files) > 1:
        raise UserError(f"{' and '.join(files)} both provide the defaults; use one of them")
    for flag, path in files.items():
        return _with_given_limit(_from_file(options, arguments, command, flag, path), arguments)
    env_id = arguments[0]
    if env_id.startswith("-"):
        # The environment follows the options, or help was requested: parse everything once to find it.
        env_id = config_of(parsed(_PRESET_OF_HELP)).task.env_id
    return _with_given_limit(parsed(env_id), arguments)


def _with_given_limit(found: Options, arguments: Sequence[str]) -> Options:
    """Return options without the default's limit on the run if the other limit is given: it must not end the run before."""
    given = given_options(arguments)
    if ("generations" in given) == ("env_steps" in given):
        return found
    other = "env_steps" if "generations" in given else "generations"
    return dataclasses.replace(typing.cast(Any, found), config=config_of(found).replace(**{other: None}))


def given_options(arguments: Sequence[str]) -> set[str]:
    """Return the flat names of the configuration's options that are on a command line."""
    flags = (each.partition("=")[0].removeprefix("--").replace("-", "_") for each in arguments if each[:2] == "--")
    return {name for flag in flags for name in (flag, flag.removeprefix("no_")) if name in PLACES}


def _read_config(path: Path) -> TrainConfig:
    """Read the configuration of a run."""
    path = path / "config.json" if path.is_dir() else path
    try:
        return TrainConfig.from_json(path.read_text(encoding="utf-8"))
    except (UserError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}") from None


_READERS = {"--config": _read_config, "--preset": read_preset}


def _from_file(options: type[Options], arguments: Sequence[str], command: str, flag: str, path: Path) -> Options:
    """Parse options whose defaults are those of a file."""
    config = _READERS[flag](path)
    make: Any = options
    task = dataclasses.replace(config.task, env_id=_UNNAMED)
    found = parse(options, arguments, command, make(config=dataclasses.replace(config, task=task)))
    parsed = config_of(found)
    if parsed.task.env_id == _UNNAMED:
        if config.task.env_id == _UNNAMED:
            raise UserError(f"{path} names no environment: es-flipout {command} ENV_ID {flag} {path}")
        if config.task.module is not None:
            raise UserError(
                f"{path} is of {config.task.env_id}, which imports, and so executes, the Python module {config.task.module}; "
                f"if you trust it, name the environment: es-flipout {command} {config.task.env_id} {flag} {path}"
            )
        parsed = parsed.replace(env_id=config.task.env_id)
    if parsed.compute.backend == "ray" and config.compute.ray_address and "ray_address" not in given_options(arguments):
        raise UserError(
            f"{path} is of a run on the Ray cluster at {config.compute.ray_address}: name yours with --ray-address"
        )
    return dataclasses.replace(typing.cast(Any, found), config=parsed)


def _value_of(flag: str, arguments: Sequence[str]) -> str | None:
    """Return the value of a flag, before anything is parsed; None if it is not given or has no value."""
    value = None
    for argument, after in zip(arguments, [*arguments[1:], None], strict=True):
        name, equals, own = argument.partition("=")
        if name == flag:
            value = own if equals else after
    return value


def config_of(options: object) -> TrainConfig:
    """Return the field ``config`` of the options."""
    return typing.cast(TrainConfig, vars(options)["config"])


def _flags(options: type) -> dict[str, Any]:
    """Return all flags of an options dataclass, each with the type of its value."""
    hints: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(options).items():
        if hint is TrainConfig:
            for flat, (subject, field) in PLACES.items():
                hints[flat] = typing.get_type_hints(TrainConfig.SUBJECTS[subject])[field]
        else:
            hints["config" if name == "config_file" else name] = hint
    flags = {f"--{prefix}{name}".replace("_", "-"): hint for name, hint in hints.items() for prefix in ("", "no_")}
    return {"--help": bool, **flags}


def _with_plain_numbers(arguments: Sequence[str], flags: Mapping[str, Any]) -> list[str]:
    """Write whole numbers in digits (``1e6``, ``2.5M``, ``10k``) and lists with spaces (``64,64``), for tyro."""
    plain: list[str] = []
    flag, hint = "", None
    for argument in arguments:
        if argument.startswith("--"):
            flag, equals, value = argument.partition("=")
            hint = flags.get(flag.replace("_", "-"))
            if not equals:
                plain.append(argument)
                continue
            first, *more = _plain(flag, value, hint)
            plain += [f"{flag}={first}", *more]
        else:
            plain += _plain(flag, argument, hint)
        if not _takes(hint, tuple):
            hint = None  # what follows is a positional argument
    return plain


def _takes(hint: Any, kind: type) -> bool:
    """Return whether an option takes whole numbers: one (int), or several (tuple)."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return any(option is int if kind is int else typing.get_args(option)[:1] == (int,) for option in options)


def _plain(flag: str, value: str, hint: Any) -> list[str]:
    if not (_takes(hint, int) or _takes(hint, tuple)) or value == "None":
        return [value]
    found = [_digits(part.strip()) for part in (value.split(",") if _takes(hint, tuple) else [value]) if part.strip()]
    if not found or any(re.fullmatch("-?[0-9]+", number, re.ASCII) is None for number in found):
        raise UserError(f"{flag} must be a whole number such as 1000, 1e6 or 10k, got {value}")
    return found


def _digits(value: str) -> str:
    """Return a whole number in digits; anything else unchanged."""
    match = _NUMBER.fullmatch(value)
    if match is None or len(value) > 30:
        return value
    number = Decimal(match[1]) * _UNITS[match[2].lower()]
    small_and_whole = number < 10**30 and number == number.to_integral_value()
    return str(int(number)) if small_and_whole else value


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
