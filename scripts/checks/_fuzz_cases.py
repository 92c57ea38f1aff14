"""Malformed input for the command line: options, and files of a run that were changed.

Rule: a case ends with exit code 0, or with one line ``error: ...`` and exit code 2. A case that is certainly wrong (a value
of another type, a file whose checksum is wrong, tensors of another shape) must end with the line.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from es_flipout import cli
from es_flipout.config import LATER_FIELDS, PLACES
from es_flipout.training.checkpoint import load_tensors, save_tensors
from es_flipout.training.run_directory import read_config
from es_flipout.tuning.result import preset_json

SECONDS = 60.0  # a case that takes longer hangs
TINY = [
    *("--env-kwargs", '{"max_episode_steps": 4}', "--population-size", "4", "--generations", "2", "--hidden", "4"),
    *("--score-episodes", "1", "--evaluation-episodes", "1", "--checkpoint-every", "1", "--score-every", "1"),
]


@dataclass(frozen=True)
class Case:
    """One call of the command line.

    Attributes:
        kind: what is malformed.
        arguments: of the command line; ``RUN`` stands for the copy of the run, ``RUN/...`` for a file of it, ``NEW`` for a path
            that does not exist.
        change: changes the copy of the run; returns whether the case must be refused.
    """

    kind: str
    arguments: tuple[str, ...]
    change: Callable[[Path], bool]


class _Hangs(BaseException):
    pass


# Values.

_EDGES = st.sampled_from([0, 1, -1, 2, 3, 7, 2**31, 2**63 - 1, 2**63, -(2**63), 10**20, 10**400])
_TEXTS = st.one_of(
    st.sampled_from(
        ["", " ", "nan", "inf", "-inf", "1e400", "1e6", "None", "true", "[]", "{}", "--", "\x00", "é", "64,64"]
    ),
    st.text(max_size=6),
)
_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), _EDGES, st.floats(), _TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=4,
)
# These run for as long as they say, so they stay small.
_LONG = {
    "generations",
    "episodes",
    "env_steps",
    "evaluation_episodes",
    "score_episodes",
    "workers",
    "ray_address",
    "backend",
    "env_id",
}
_OPTIONS = [name for name in PLACES if name not in _LONG]


@st.composite
def options(draw: st.DrawFn) -> Case:
    """Draw options of ``train`` with edge values."""
    given: list[str] = []
    for name in draw(st.lists(st.sampled_from(_OPTIONS), min_size=1, max_size=3, unique=True)):
        value = draw(st.one_of(_EDGES.map(str), st.floats().map(str), _TEXTS))
        given += [f"--{name.replace('_', '-')}={value}"]
    if draw(st.integers(0, 9)) == 0:
        given.append(draw(_TEXTS))
    return Case("options", ("train", "CartPole-v1", *TINY, "--run-dir", "NEW", *given), lambda run: False)


def _paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*at, key)
            yield from _paths(inner, (*at, key))


def _other_type(old: Any, new: Any) -> bool:
    """Return whether a value has certainly another type than the one it replaces."""
    if old is None or new is None:
        return False  # may be optional
    if isinstance(old, float):
        return isinstance(new, bool) or not isinstance(new, int | float)
    return type(old) is not type(new)


def _change_json(path: Path, way: str, chosen: int, value: Any) -> bool:
    """Change a JSON file; return whether it must be refused. Of a preset, every value is optional."""
    preset = path.name == _PRESET
    text = path.read_text(encoding="utf-8")
    values = json.loads(text)
    if way == "text":
        at = chosen % (len(text) + 1)
        changed = text[:at] + str(value) + text[at + chosen % 3 :]
        path.write_text(changed, encoding="utf-8", errors="surrogatepass")
        return False
    if way == "truncated":
        path.write_text(text[: chosen % len(text.rstrip())], encoding="utf-8")
        return True
    if way == "whole":
        path.write_text(json.dumps(value), encoding="utf-8", errors="surrogatepass")
        return not (preset and value == {})
    places = list(_paths(values))
    *before, last = places[chosen % len(places)]
    inner = values
    for key in before:
        inner = inner[key]
    optional = last == "version" or any(last in fields for fields in LATER_FIELDS.values())
    if way == "deleted":
        del inner[last]
        must = not (optional or preset)
    elif way == "added":
        inner["unknown" + str(last)] = value
        must = True
    else:
        must = _other_type(inner[last], value) and not (optional and not isinstance(value, str))
        inner[last] = value
    path.write_text(json.dumps(values), encoding="utf-8", errors="surrogatepass")
    return must


def _commands(*names: str) -> st.SearchStrategy[tuple[str, ...]]:
    short = ("--run-dir", "NEW", "--generations", "2", "--evaluation-episodes", "1")
    given = {
        "evaluate": ("evaluate", "RUN", "--episodes", "1"),
        "last": ("evaluate", "RUN", "--episodes", "1", "--which", "last"),
        "resume": ("resume", "RUN"),
        "config": ("train", "--config", "RUN", "--run-dir", "NEW"),
        "config file": ("train", "CartPole-v1", "--config", "RUN/config.json", *short),
        "preset": ("train", "--preset", f"RUN/{_PRESET}", *short),
        "preset of": ("train", "CartPole-v1", "--preset", f"RUN/{_PRESET}", *short),
    }
    return st.sampled_from([given[name] for name in names])


@st.composite
def json_files(draw: st.DrawFn, name: str, commands: st.SearchStrategy[tuple[str, ...]]) -> Case:
    """Draw changes of a JSON file of a run."""
    way = draw(st.sampled_from(["value", "value", "value", "deleted", "added", "text", "truncated", "whole"]))
    chosen, value = draw(st.integers(0, 10**6)), draw(_JSON)
    return Case(name, draw(commands), lambda run: _change_json(_file(run, name), way, chosen, value))


def _file(run: Path, name: str) -> Path:
    return sorted(run.glob(name))[-1]


def _change_bytes(path: Path, way: str, at: int, more: bytes) -> bool:
    raw = path.read_bytes()
    at %= len(raw)
    changed = {
        "flipped": raw[:at] + bytes([raw[at] ^ (1 + at % 255)]) + raw[at + 1 :],
        "truncated": raw[:at],
        "inserted": raw[:at] + more + raw[at:],
        "replaced": more,
    }[way]
    path.write_bytes(changed)
    return changed != raw


@st.composite
def binary_files(
    draw: st.DrawFn, name: str, commands: st.SearchStrategy[tuple[str, ...]], checked: bool = True
) -> Case:
    """Draw changes of the bytes of a file; ``checked`` if it has a checksum, so that every change must be noticed."""
    way = draw(st.sampled_from(["flipped", "truncated", "inserted", "replaced"]))
    at, more = draw(st.integers(0, 10**6)), draw(st.binary(max_size=20))
    return Case(name, draw(commands), lambda run: _change_bytes(_file(run, name), way, at, more) and checked)


def _change_tensors(path: Path, way: str, chosen: int) -> bool:
    """Change tensors and write them with valid checksums, as someone who knows the format."""
    tensors = load_tensors(path)
    names = sorted(tensors)
    name = names[chosen % len(names)]
    value = tensors[name]
    match way:
        case "shape":
            tensors[name] = torch.zeros(*value.shape, 2, dtype=value.dtype)
        case "type":
            tensors[name] = value.to(torch.int8)
        case "missing":
            del tensors[name]
        case "renamed":
            tensors[name + "x"] = tensors.pop(name)
        case "not finite":
            tensors[name] = torch.full_like(value, torch.nan) if value.is_floating_point() else value
    sha256 = save_tensors(path, tensors)
    meta = path.with_suffix(".json")
    if meta.exists():
        meta.write_text(json.dumps(json.loads(meta.read_text(encoding="utf-8")) | {"sha256": sha256}), encoding="utf-8")
    return way != "not finite"


@st.composite
def tensor_files(draw: st.DrawFn, name: str, commands: st.SearchStrategy[tuple[str, ...]]) -> Case:
    """Draw changes of tensors with valid checksums."""
    way = draw(st.sampled_from(["shape", "type", "missing", "renamed", "not finite"]))
    chosen = draw(st.integers(0, 1000))
    return Case(f"{name} (valid)", draw(commands), lambda run: _change_tensors(_file(run, name), way, chosen))


_PRESET = "preset.json"
_META, _TENSORS = "checkpoints/generation_*.json", "checkpoints/generation_*.safetensors"


def cases() -> st.SearchStrategy[Case]:
    """Return all kinds of cases."""
    anything = _commands("evaluate", "last", "resume")
    return st.one_of(
        options(),
        options(),
        options(),
        json_files("config.json", _commands("evaluate", "resume", "config", "config file")),
        json_files(_PRESET, _commands("preset", "preset of")),
        json_files(_META, _commands("resume", "evaluate")),
        json_files("evaluation.json", anything).map(_may_be_ignored),
        binary_files("config.json", _commands("evaluate", "resume", "config", "config file"), checked=False),
        binary_files(_PRESET, _commands("preset", "preset of"), checked=False),
        binary_files(_META, _commands("resume"), checked=False),
        binary_files(_TENSORS, _commands("resume")),
        binary_files("metrics.csv", _commands("resume"), checked=False),
        binary_files("policy.safetensors", _commands("last")),
        tensor_files(_TENSORS, _commands("resume")),
        tensor_files("policy.safetensors", _commands("last")),
    )


def _may_be_ignored(case: Case) -> Case:
    """Return the case of a file that is written and not read."""

    def change(run: Path) -> bool:
        case.change(run)
        return False

    return Case(case.kind, case.arguments, change)


# Carrying a case out.


@dataclass(frozen=True)
class Outcome:
    """How a case ended: ``ran``, ``refused``, ``traceback``, ``hang``, ``accepted`` (wrongly) or ``unclear`` (no one line)."""

    end: str
    said: str
    seconds: float

    @property
    def good(self) -> bool:
        """Whether the case ended as it should."""
        return self.end in ("ran", "refused")


def make_run(folder: Path) -> Path:
    """Train the run whose files are changed, and write a preset file beside them."""
    run = folder / "whole"
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = cli.main(["train", "CartPole-v1", *TINY, "--run-dir", str(run)])
    if code:
        raise RuntimeError(said.getvalue())
    shutil.rmtree(run / "tensorboard")
    (run / _PRESET).write_text(preset_json(read_config(run)), encoding="utf-8")
    return run


def carry_out(case: Case, run: Path, seconds: float = SECONDS) -> Outcome:
    """Carry a case out on a copy of the run, in this process."""
    copy, new = run.with_name("copy"), run.with_name("new")
    for path in (copy, new):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(run, copy)
    must_refuse = case.change(copy)
    paths = {"NEW": str(new), "RUN": str(copy), **{f"RUN/{each.name}": str(each) for each in copy.iterdir()}}
    arguments = [paths.get(part, part) for part in case.arguments]
    out, err, began = io.StringIO(), io.StringIO(), time.monotonic()

    def hangs(*_: object) -> None:
        raise _Hangs

    previous = signal.signal(signal.SIGALRM, hangs)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code: Any = cli.main(arguments)
    except _Hangs:
        return Outcome("hang", " ".join(arguments), time.monotonic() - began)
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        return Outcome("traceback", traceback.format_exc(), time.monotonic() - began)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    said, took = err.getvalue(), time.monotonic() - began
    lines = [line for line in said.splitlines() if not line.startswith(("warning: ", " ", "100%"))]
    if code == 0:
        return Outcome("accepted" if must_refuse else "ran", said or "nothing was said", took)
    clear = code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 2000
    return Outcome("refused" if clear else "unclear", f"exit code {code}: {said}", took)
