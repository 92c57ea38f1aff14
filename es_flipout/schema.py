"""Dataclasses from parsed JSON, with a check of every name and type. Files of a run are read with it."""

from __future__ import annotations

import json
import reprlib
import types
import typing
from collections.abc import Mapping
from typing import Any

NOT_AS_EXPECTED = (TypeError, ValueError, OverflowError, RecursionError)
"""What the functions of this module raise, whatever the text is; the message says what is wrong."""


def load_object(text: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ValueError: the text is not JSON.
        TypeError: it is no object.
        RecursionError: it is nested too deeply.
    """
    values = json.loads(text)
    if not isinstance(values, dict):
        raise TypeError("it is not a JSON object")
    return values


def expect(values: Mapping[str, object], wanted: Mapping[str, object], where: str = "") -> None:
    """Raise TypeError unless the names are exactly those of ``wanted``."""
    if missing := [name for name in wanted if name not in values]:
        raise TypeError(f"{where}it has no {', '.join(missing)}")
    if unknown := [name for name in values if name not in wanted]:
        raise TypeError(f"{where}it has an unknown {', '.join(unknown)}")


def build(kind: type, values: object, subject: str) -> Any:
    """Create a dataclass from a JSON object that has all its fields, each of the declared type.

    Args:
        kind: the dataclass.
        values: the parsed object.
        subject: how messages call it.

    Raises:
        TypeError: a field is missing, unknown or of another type.
        OverflowError: a number does not fit into 64 bits.
    """
    if not isinstance(values, dict):
        raise TypeError(f"{subject} is not a JSON object")
    hints = typing.get_type_hints(kind)
    expect(values, hints, f"in {subject} ")
    return kind(**{name: typed(value, hints[name], f"{subject}.{name}") for name, value in values.items()})


def typed(value: Any, hint: Any, name: str) -> Any:
    """Convert a JSON value to the type of its field: JSON has no tuples, and may write whole floats as integers.

    Raises:
        TypeError: the value has another type.
        OverflowError: a number does not fit into 64 bits.
    """
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        match typing.get_origin(option) or option:
            case types.NoneType if value is None:
                return None
            case typing.Literal if isinstance(value, str):
                return value  # checked by the dataclass, whose message names the choices
            case builtin if builtin is tuple and isinstance(value, list):
                return tuple(typed(item, typing.get_args(option)[0], name) for item in value)
            case builtin if builtin is float and isinstance(value, int | float) and not isinstance(value, bool):
                return float(value)
            case builtin if builtin is int and type(value) is int:
                if abs(value) >= 2**63:
                    raise OverflowError(f"{name} does not fit into 64 bits")
                return value
            case builtin if builtin in (bool, str) and type(value) is builtin:
                return value
    wanted = " or ".join(_described(option) for option in options)
    raise TypeError(f"{name} must be {wanted}, got {reprlib.repr(value)}")


def _described(hint: Any) -> str:
    """Return what JSON values of a type are, in words."""
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(typing.get_args(hint))}"
    if typing.get_origin(hint) is tuple:
        return "a list of whole numbers"
    names = {types.NoneType: "null", bool: "true or false", float: "a number", int: "a whole number", str: "a string"}
    return names.get(hint, str(hint))
