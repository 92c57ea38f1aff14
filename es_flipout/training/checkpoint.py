"""Checkpoints: safetensors for tensors, JSON for everything else, written atomically and verified on reading."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

import es_flipout
from es_flipout import schema
from es_flipout.errors import UserError

_NUMBERED = re.compile(r"generation_[0-9]{1,18}")


@dataclass(frozen=True)
class Progress:
    """Progress of a run.

    Attributes:
        generation: generations done.
        env_steps: live environment steps of training.
        wall_s: seconds of training and scoring.
        score: the newest score of the mean policy.
        best_score, best_generation: the highest score so far, and the generation after which it was measured.
    """

    generation: int
    env_steps: int
    wall_s: float
    score: float | None
    best_score: float | None = None
    best_generation: int | None = None

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: a number is negative, or the best generation is later than the newest.
        """
        if not (self.generation >= 0 and self.env_steps >= 0 and 0 <= self.wall_s < math.inf):
            raise ValueError("generation, env_steps and wall_s must not be negative")
        if self.best_generation is not None and not 0 < self.best_generation <= self.generation:
            raise ValueError("best_generation must be in [1, generation]")


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write a file so that it is either the complete old or the complete new one, even after a crash."""
    raw = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.filename is None:  # of a write: the system does not say where
            error.filename = str(path)
        raise


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write tensors atomically, with a checksum of their contents, and return the SHA-256 of the file."""
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    data = safetensors.torch.save(plain, metadata={"sha256": _checksum(plain)})
    atomic_write(path, data)
    return hashlib.sha256(data).hexdigest()


def load_tensors(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """Read tensors.

    Raises:
        UserError: the file is missing, or is damaged (a checksum is wrong).
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{path} is damaged: its checksum is wrong; remove it to continue from the previous checkpoint")
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if header.get("__metadata__", {}).get("sha256") != _checksum(tensors):
        raise UserError(f"{path} is damaged: its checksum is wrong")
    return tensors


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def save_checkpoint(folder: Path, tensors: dict[str, Tensor], progress: Progress, keep: int) -> None:
    """Write the checkpoint of a generation, and remove all but the newest ``keep`` checkpoints.

    The JSON file is written last; a checkpoint without it is incomplete and ignored.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"generation_{progress.generation:06d}.safetensors"
    sha256 = save_tensors(path, tensors)
    meta = {"version": es_flipout.__version__, "sha256": sha256, **asdict(progress)}
    atomic_write(path.with_suffix(".json"), json.dumps(meta, indent=2) + "\n")
    for old in checkpoints(folder)[:-keep]:
        old.unlink()
        old.with_suffix(".safetensors").unlink(missing_ok=True)


def checkpoints(folder: Path) -> list[Path]:
    """Return the JSON files of the complete checkpoints, oldest first."""
    found = (path for path in folder.glob("generation_*.json") if path.with_suffix(".safetensors").exists())
    return sorted((path for path in found if _NUMBERED.fullmatch(path.stem)), key=lambda path: int(_number(path)))


def _number(path: Path) -> str:
    return path.stem.removeprefix("generation_")


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], Progress]:
    """Load the newest checkpoint.

    Raises:
        UserError: there is no checkpoint, or it is damaged or was written by another version of es_flipout.
    """
    found = checkpoints(folder)
    if not found:
        raise UserError(f"{folder} contains no complete checkpoint, so there is nothing to continue from")
    progress, sha256 = _read_meta(found[-1])
    return load_tensors(found[-1].with_suffix(".safetensors"), sha256), progress


def generations(folder: Path) -> list[int]:
    """Return the generations of the complete checkpoints, oldest first."""
    return [int(_number(path)) for path in checkpoints(folder)]


def load_generation(folder: Path, generation: int) -> dict[str, Tensor]:
    """Load the tensors of the checkpoint of a generation.

    Raises:
        UserError: there is no such checkpoint, or it is damaged or was written by another version of es_flipout.
    """
    for path in checkpoints(folder):
        if int(_number(path)) == generation:
            return load_tensors(path.with_suffix(".safetensors"), _read_meta(path)[1])
    kept = ", ".join(map(str, generations(folder))) or "none"
    raise UserError(f"{folder} has no checkpoint of generation {generation}; it has those of {kept}")


def load_progress(folder: Path) -> Progress | None:
    """Load the progress of the newest checkpoint; None if there is no checkpoint.

    Raises:
        UserError: the checkpoint is damaged or was written by another version of es_flipout.
    """
    found = checkpoints(folder)
    return _read_meta(found[-1])[0] if found else None


def _read_meta(path: Path) -> tuple[Progress, str]:
    """Read the JSON file of a checkpoint: the progress, and the SHA-256 of the tensors."""
    try:
        meta = schema.load_object(path.read_text(encoding="utf-8"))
        version, sha256 = meta.pop("version"), meta.pop("sha256")
        if not (isinstance(version, str) and isinstance(sha256, str)):
            raise TypeError("version and sha256 must be strings")
        if version != es_flipout.__version__:
            raise UserError(
                f"{path} was written by es_flipout {version}, but this is {es_flipout.__version__}: "
                f"install es-flipout=={version} to continue it bit for bit"
            )
        progress = schema.build(Progress, meta, "the checkpoint")
        if str(progress.generation) != _number(path).lstrip("0").rjust(1, "0"):
            raise ValueError(f"it is of generation {progress.generation}")
        return progress, sha256
    except UserError:
        raise
    except (KeyError, *schema.NOT_AS_EXPECTED) as error:
        raise UserError(f"{path} is damaged ({error}); remove it to continue from the previous checkpoint") from None
