"""Files are complete or absent whenever writing is interrupted, and damaged files are rejected."""

import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

import es_flipout
from es_flipout.errors import UserError
from es_flipout.training.checkpoint import (
    Progress,
    atomic_write,
    checkpoints,
    load_checkpoint,
    load_tensors,
    save_checkpoint,
    save_tensors,
)

TENSORS = {
    "module.weight": torch.arange(12.0).view(3, 4),
    "optimizer.0.step": torch.tensor(7.0),
    "observation_norm.mean": torch.tensor([0.1, 1e300, -0.0], dtype=torch.float64),
    "empty": torch.zeros(0),
    "view": torch.arange(12).view(3, 4).T,
}


def at(generation: int) -> Progress:
    return Progress(
        generation, env_steps=generation * 1000, wall_s=generation / 3, score=None if generation < 2 else 0.1
    )


def save(folder: Path, *generations: int, keep: int = 10) -> None:
    for generation in generations:
        save_checkpoint(folder, {"x": torch.tensor([float(generation)])}, at(generation), keep)


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def fail(*args: Any, **kwargs: Any) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("data", [b"\x00\xff", "grün\n", ""])
def test_atomic_write_writes_what_it_is_given(tmp_path: Path, data: bytes | str) -> None:
    path = tmp_path / "file"
    atomic_write(path, "something longer that was there before")
    atomic_write(path, data)
    assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace", "pathlib.Path.open"])
@pytest.mark.parametrize("old", ["the old one", None])
def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, old: str | None
) -> None:
    path = tmp_path / "file"
    if old is not None:
        atomic_write(path, old)
    with monkeypatch.context() as full:
        full.setattr(step, fail)
        with pytest.raises(OSError, match="No space left on device"):
            atomic_write(path, "the new one")
    assert names(tmp_path) == ([] if old is None else ["file"])
    assert old is None or path.read_text(encoding="utf-8") == old


def test_the_data_is_on_disk_before_the_name_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []
    fsync, replace = os.fsync, Path.replace

    def watched_fsync(descriptor: int) -> None:
        calls.append(("fsync", os.fstat(descriptor).st_size))
        fsync(descriptor)

    def watched_replace(self: Path, target: Path) -> Path:
        calls.append(("replace", self.stat().st_size))
        return replace(self, target)

    monkeypatch.setattr("os.fsync", watched_fsync)
    monkeypatch.setattr("pathlib.Path.replace", watched_replace)
    atomic_write(tmp_path / "file", b"12345")
    assert calls[:2] == [("fsync", 5), ("replace", 5)]


def test_tensors_come_back_to_the_bit(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, TENSORS, at(3), keep=1)
    tensors, progress = load_checkpoint(tmp_path)
    assert same(tensors, TENSORS)
    assert torch.signbit(tensors["observation_norm.mean"][2])
    assert progress == at(3)


def test_progress_comes_back_to_the_bit(tmp_path: Path) -> None:
    progress = Progress(generation=1, env_steps=2**60 + 1, wall_s=0.1 + 0.2, score=float("nan"))
    save_checkpoint(tmp_path, {}, progress, keep=1)
    _, loaded = load_checkpoint(tmp_path)
    assert dataclasses.astuple(loaded)[:3] == dataclasses.astuple(progress)[:3]
    assert loaded.score != loaded.score


def test_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = tmp_path / "generation_000001.safetensors"
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(UserError, match="checksum") as refused:
            load_checkpoint(tmp_path)
        assert str(path) in str(refused.value)
    path.write_bytes(whole)
    assert load_checkpoint(tmp_path)[1] == at(1)


@pytest.mark.parametrize("size", [0, 4, 40])
def test_a_truncated_file_is_refused(tmp_path: Path, size: int) -> None:
    save(tmp_path, 1)
    path = tmp_path / "generation_000001.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"damaged.*previous checkpoint"):
        load_checkpoint(tmp_path)
    with pytest.raises(UserError, match="is damaged"):
        load_tensors(path)


def test_every_truncation_of_the_json_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = tmp_path / "generation_000001.json"
    whole = path.read_bytes()
    for size in range(len(whole.rstrip())):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="is damaged") as refused:
            load_checkpoint(tmp_path)
        assert str(path) in str(refused.value)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["[]", "3", "null", '{"version": "0"}', "\udcff"])
def test_json_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    save(tmp_path, 1)
    path = tmp_path / "generation_000001.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match="is damaged"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("change", [{"extra": 1}, {"generation": None}])
def test_json_with_other_fields_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    save(tmp_path, 1)
    path = tmp_path / "generation_000001.json"
    meta = json.loads(path.read_text(encoding="utf-8"))
    for name, value in change.items():
        if value is None:
            del meta[name]
        else:
            meta[name] = value
    path.write_text(json.dumps(meta), encoding="utf-8")
    with pytest.raises(UserError, match="is damaged"):
        load_checkpoint(tmp_path)


def test_another_version_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as past:
        past.setattr(es_flipout, "__version__", "0.0.7")
        save(tmp_path, 1)
    with pytest.raises(UserError, match=rf"es_flipout 0\.0\.7.*this is {es_flipout.__version__}") as refused:
        load_checkpoint(tmp_path)
    assert "\n" not in str(refused.value)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    save(tmp_path, *range(8, 13), keep=3)
    assert [path.stem for path in checkpoints(tmp_path)] == [f"generation_{n:06d}" for n in (10, 11, 12)]
    assert names(tmp_path) == sorted(
        f"generation_{n:06d}.{suffix}" for n in (10, 11, 12) for suffix in ("json", "safetensors")
    )
    assert load_checkpoint(tmp_path)[1] == at(12)


def test_the_newest_is_the_newest_by_number(tmp_path: Path) -> None:
    save(tmp_path, 1_000_000, keep=2)
    save(tmp_path, 999_999, keep=2)
    tensors, progress = load_checkpoint(tmp_path)
    assert progress.generation == 1_000_000
    assert tensors["x"].item() == 1_000_000


def test_the_one_before_takes_over_when_the_newest_is_removed(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    (tmp_path / "generation_000002.json").unlink()
    tensors, progress = load_checkpoint(tmp_path)
    assert progress == at(1)
    assert tensors["x"].item() == 1.0


@pytest.mark.parametrize("missing", ["json", "safetensors"])
def test_half_a_checkpoint_does_not_exist(tmp_path: Path, missing: str) -> None:
    save(tmp_path, 1, 2)
    (tmp_path / f"generation_000002.{missing}").unlink()
    assert [path.stem for path in checkpoints(tmp_path)] == ["generation_000001"]
    assert load_checkpoint(tmp_path)[1] == at(1)


@pytest.mark.parametrize("failing", [1, 2])
def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    save(tmp_path, 1, keep=1)
    fsync, calls = os.fsync, []

    def sometimes(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == failing:
            fail()
        fsync(descriptor)

    with monkeypatch.context() as full:
        full.setattr("os.fsync", sometimes)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, 2, keep=1)
    assert load_checkpoint(tmp_path)[1] == at(1)
    save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["generation_000002.json", "generation_000002.safetensors"]


@pytest.mark.parametrize("exists", [True, False])
def test_no_checkpoint_at_all(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path if exists else tmp_path / "nowhere"
    with pytest.raises(UserError, match=f"{folder} contains no complete checkpoint"):
        load_checkpoint(folder)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path / 'policy.safetensors'} is missing"):
        load_tensors(tmp_path / "policy.safetensors")


def test_the_checksum_is_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "tensors.safetensors"
    sha256 = save_tensors(path, TENSORS)
    assert same(load_tensors(path, sha256), TENSORS)
    with pytest.raises(UserError, match="checksum"):
        load_tensors(path, sha256[::-1])
