"""Damage to a run directory is named, and whatever is whole is used."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from es_flipout import cli
from es_flipout.training.checkpoint import load_tensors, save_tensors


@pytest.mark.parametrize("command", ["resume", "evaluate"])
def test_not_a_run_directory(refused: Any, tmp_path: Path, command: str) -> None:
    assert f"{tmp_path} is not a run directory: it has no config.json" in refused(command, tmp_path)
    file = tmp_path / "file"
    file.touch()
    assert str(file) in refused(command, file)


def damage_config(run_dir: Path, kind: str) -> None:
    path = run_dir / "config.json"
    whole = path.read_text(encoding="utf-8")
    if kind == "binary":
        path.write_bytes(b"\xff\xfe\x00")
    elif kind == "truncated":
        path.write_text(whole[: len(whole) // 2], encoding="utf-8")
    elif kind == "empty":
        path.write_text("", encoding="utf-8")
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    else:
        subject, change = {
            "unknown key": ("policy", {"dropout": 0.5}),
            "unknown choice": ("strategy", {"optimizer": "lion"}),
            "out of range": ("strategy", {"sigma": -1}),
            "other network": ("policy", {"hidden": [5]}),
            "no such environment": ("task", {"env_id": "Nowhere-v0"}),
        }[kind]
        values = json.loads(whole)
        path.write_text(json.dumps(values | {subject: values[subject] | change}), encoding="utf-8")


@pytest.mark.parametrize("command", ["resume", "evaluate"])
@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("binary", r"config\.json"),
        ("truncated", r"config\.json: not a configuration of es_flipout"),
        ("empty", r"config\.json: not a configuration of es_flipout"),
        ("folder", r"config\.json"),
        ("unknown key", r"config\.json: not a configuration of es_flipout.*dropout"),
        ("unknown choice", r"config\.json.*optimizer.*lion"),
        ("out of range", r"config\.json.*sigma must be greater than 0"),
        ("other network", r"does not fit"),
        ("no such environment", r"unknown environment 'Nowhere-v0'"),
    ],
)
def test_a_damaged_configuration(refused: Any, run_dir: Path, command: str, kind: str, line: str) -> None:
    damage_config(run_dir, kind)
    said = refused(command, run_dir)
    assert re.search(line, said), said


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("changed byte", r"generation_000003\.safetensors is damaged: its checksum is wrong"),
        ("truncated", r"generation_000003\.safetensors is damaged: its checksum is wrong"),
        ("truncated json", r"generation_000003\.json is damaged"),
        ("other version", r"generation_000003\.json was written by es_flipout 0\.0\.1"),
        ("no checkpoints", r"checkpoints contains no complete checkpoint"),
    ],
)
def test_a_damaged_checkpoint(refused: Any, run_dir: Path, kind: str, line: str) -> None:
    tensors = run_dir / "checkpoints" / "generation_000003.safetensors"
    meta = tensors.with_suffix(".json")
    raw = tensors.read_bytes()
    if kind == "changed byte":
        tensors.write_bytes(raw[:-5] + bytes([raw[-5] ^ 4]) + raw[-4:])
    elif kind == "truncated":
        tensors.write_bytes(raw[:-5])
    elif kind == "truncated json":
        meta.write_bytes(meta.read_bytes()[:50])
    elif kind == "other version":
        meta.write_text(json.dumps(json.loads(meta.read_text()) | {"version": "0.0.1"}), encoding="utf-8")
    else:
        shutil.rmtree(run_dir / "checkpoints")
    said = refused("resume", run_dir)
    assert re.search(line, said), said


def test_a_tensor_of_another_shape_with_a_valid_checksum(refused: Any, run_dir: Path) -> None:
    path = run_dir / "checkpoints" / "generation_000003.safetensors"
    steps = {name: torch.zeros(2) for name in load_tensors(path) if name.endswith(".step")}  # 2: size of the last layer
    digest = save_tensors(path, load_tensors(path) | steps)
    meta = path.with_suffix(".json")
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"sha256": digest}), encoding="utf-8")
    assert re.search(r"optimizer\.\d\.step is of shape \(2,\)", refused("resume", run_dir))


def test_the_checkpoint_before_a_damaged_one_goes_on(
    trained: tuple[Path, Any], run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (run_dir / "checkpoints").glob("generation_000003.*"):
        path.unlink()
    assert cli.main(["resume", str(run_dir)]) == 0
    again, whole = (json.loads((path / "evaluation.json").read_text()) for path in (run_dir, trained[0]))
    assert again == whole


@pytest.mark.parametrize("kind", ["missing", "truncated", "changed byte"])
def test_a_damaged_policy(refused: Any, run_dir: Path, kind: str) -> None:
    path = run_dir / "policy.safetensors"
    raw = path.read_bytes()
    if kind == "missing":
        path.unlink()
        (run_dir / "best.safetensors").unlink()
    elif kind == "truncated":
        path.write_bytes(raw[:-5])
    else:
        path.write_bytes(raw[:-5] + bytes([raw[-5] ^ 4]) + raw[-4:])
    said = refused("evaluate", run_dir, "--episodes", "1", "--which", "last")
    assert re.search(rf"policy\.safetensors is ({'missing' if kind == 'missing' else 'damaged'})", said), said
