"""Images and text for the scripts: what comes with installed packages, and the standard files of public data sets.

Nothing is downloaded and no pickle is opened. ``digits`` and ``docstrings`` need no files; the others are read from a directory
that the user fills.
"""

from __future__ import annotations

import ast
import gzip
import platform
import re
import sys
import sysconfig
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from es_flipout.errors import UserError

IMAGES = ("digits", "mnist", "cifar10")
TEXTS = ("docstrings", "ptb")
UNKNOWN, END = "<unk>", "<eos>"

_HOMES = {
    "mnist": "the MNIST database of Yann LeCun and colleagues (yann.lecun.com/exdb/mnist)",
    "cifar10": "the binary version of CIFAR-10 by Alex Krizhevsky (www.cs.toronto.edu/~kriz/cifar.html)",
    "ptb": "the Penn Treebank as prepared by Tomas Mikolov (simple-examples of the RNNLM toolkit, folder data)",
}
_FILES = {
    "mnist": tuple(f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")),
    "cifar10": (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"),
    "ptb": ("ptb.train.txt", "ptb.valid.txt", "ptb.test.txt"),
}
_CIFAR_IMAGES = 10_000  # in each file
_CIFAR_SHAPE = (3, 32, 32)
_VOCABULARY = {"character": 128, "word": 10_000}


@dataclass(frozen=True)
class Images:
    """Labeled images with a fixed split.

    Attributes:
        name: of the data set.
        train_x, test_x: ``(N, C, H, W)`` float32 in [0, 1], not standardized (see :meth:`standardized`).
        train_y, test_y: ``(N,)`` int64 labels from 0.
        source: what the data is, in words, for tables.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    source: str

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.train_y.max()) + 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of one image."""
        channels, height, width = self.train_x.shape[1:]
        return channels, height, width

    def standardized(self) -> Images:
        """The same with mean 0 and standard deviation 1 in every channel of the training images."""
        mean = self.train_x.mean((0, 2, 3), keepdim=True)
        std = self.train_x.std((0, 2, 3), keepdim=True)
        return replace(self, train_x=(self.train_x - mean) / std, test_x=(self.test_x - mean) / std)


@dataclass(frozen=True)
class Text:
    """A text as numbers, with a fixed split.

    Attributes:
        name: of the data set.
        level: ``character`` or ``word``.
        train, valid, test: ``(length,)`` int64, indices into the vocabulary.
        vocabulary: the symbols, the most frequent of the training split first; the last is ``<unk>`` if it was not among them.
        source: what the data is, in words, for tables.
    """

    name: str
    level: str
    train: Tensor
    valid: Tensor
    test: Tensor
    vocabulary: tuple[str, ...]
    source: str

    def decode(self, symbols: Tensor) -> str:
        """The text of ``(length,)`` indices."""
        return (" " if self.level == "word" else "").join(self.vocabulary[i] for i in symbols.tolist())


def load_images(name: str, data_dir: Path | str | None = None) -> Images:
    """The data set ``digits`` (comes with scikit-learn), ``mnist`` or ``cifar10`` (standard files in ``data_dir``).

    Raises:
        UserError: there is no such data set, or files are missing or damaged.
    """
    if name not in IMAGES:
        raise UserError(f"images must be one of {', '.join(IMAGES)}, got {name!r}")
    if name == "digits":
        return _digits()
    files = _files(name, data_dir)
    train_x, train_y, test_x, test_y = _mnist(files) if name == "mnist" else _cifar10(files)
    for labels, path in ((train_y, files[0]), (test_y, files[-1])):
        if labels.max() > 9:
            raise UserError(f"{path} or its labels are damaged: labels must be 0 to 9, got {labels.max()}")
    x = [torch.tensor(pixels, dtype=torch.float32) / 255 for pixels in (train_x, test_x)]
    y = [torch.tensor(labels, dtype=torch.int64) for labels in (train_y, test_y)]
    return Images(name, x[0], y[0], x[1], y[1], "MNIST" if name == "mnist" else "CIFAR-10")


def load_text(
    name: str,
    data_dir: Path | str | None = None,
    level: Literal["character", "word"] = "character",
    vocabulary_size: int | None = None,
) -> Text:
    """The text ``docstrings`` (of the running Python's standard library) or ``ptb`` (standard files in ``data_dir``).

    Words of ``docstrings`` are lower-case runs of letters and digits, or punctuation marks; ``<eos>`` ends a docstring.
    ``ptb`` is split at blanks, ``<eos>`` ends every line; its characters are those of the files (so its ``<unk>`` is five).

    Args:
        name: of the text.
        data_dir: where the files of ``ptb`` are.
        level: what a symbol is.
        vocabulary_size: symbols to keep, at most; rarer ones become ``<unk>``. By default 10,000 words or 128 characters.

    Raises:
        UserError: there is no such text or level, or files are missing or damaged.
    """
    if level not in _VOCABULARY:
        raise UserError(f"level must be one of {', '.join(_VOCABULARY)}, got {level!r}")
    if name not in TEXTS:
        raise UserError(f"text must be one of {', '.join(TEXTS)}, got {name!r}")
    size = _VOCABULARY[level] if vocabulary_size is None else vocabulary_size
    if size < 2:
        raise UserError(f"vocabulary size must be at least 2, got {size}")
    if name == "docstrings":
        splits = _docstring_splits(level)
        source = f"docstrings of the standard library of Python {platform.python_version()}"
    else:
        splits = [_ptb_symbols(path, level) for path in _files(name, data_dir)]
        source = "Penn Treebank (Mikolov's files)"
    # The most frequent symbols of the first split; equally frequent ones by the alphabet.
    counts = Counter(splits[0])
    kept = sorted(counts, key=lambda symbol: (-counts[symbol], symbol))[:size]
    if UNKNOWN not in kept and not set().union(*splits) <= set(kept):
        kept = [*kept[: size - 1], UNKNOWN]
    index = {symbol: i for i, symbol in enumerate(kept)}
    unknown = index.get(UNKNOWN, 0)
    train, valid, test = (torch.tensor([index.get(symbol, unknown) for symbol in split]) for split in splits)
    return Text(name, level, train, valid, test, tuple(kept), source)


# Images


def _digits() -> Images:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("the digits come with scikit-learn: install it, or es-flipout[dev]") from error
    bundled = load_digits()
    x = torch.tensor(bundled.images, dtype=torch.float32)[:, None] / 16  # type: ignore[attr-defined]
    y = torch.tensor(bundled.target, dtype=torch.int64)  # type: ignore[attr-defined]
    # Every fifth run of ten is for testing: the images come mostly in runs of ten different digits.
    test = torch.arange(len(x)) // 10 % 5 == 4
    return Images("digits", x[~test], y[~test], x[test], y[test], "scikit-learn's bundled 8x8 digits")


def _mnist(files: list[Path]) -> tuple[np.ndarray, ...]:
    train_x, train_y, test_x, test_y = map(_idx, files)
    for images, labels, path in ((train_x, train_y, files[0]), (test_x, test_y, files[2])):
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or not len(images):
            raise UserError(f"{path} and its labels do not match: shapes {images.shape} and {labels.shape}")
    return train_x[:, None], train_y, test_x[:, None], test_y


def _idx(path: Path) -> np.ndarray:
    """An IDX file of bytes (two zero bytes, type 8, number of dimensions, big-endian sizes, data), compressed or not."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path} is damaged: {error}") from error
    dims = content[3] if len(content) >= 4 else 0
    if len(content) < 4 + 4 * dims or content[:3] != b"\0\0\x08" or not dims:
        raise UserError(f"{path} is not an IDX file of bytes")
    shape = tuple(np.frombuffer(content, ">u4", dims, 4).tolist())
    expected = 4 + 4 * dims + int(np.prod(shape, dtype=object))
    if len(content) != expected:
        raise UserError(f"{path} is damaged: {len(content):,} bytes, expected {expected:,}")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape)


def _cifar10(files: list[Path]) -> tuple[np.ndarray, ...]:
    """Records of one label byte and 3,072 pixel bytes (red, green, blue planes)."""
    shape = (_CIFAR_IMAGES, 1 + int(np.prod(_CIFAR_SHAPE)))
    contents = [np.fromfile(path, np.uint8) for path in files]
    for path, content in zip(files, contents, strict=True):
        if content.size != np.prod(shape):
            raise UserError(f"{path} is damaged: {content.size:,} bytes, expected {np.prod(shape):,}")
    records = np.stack(contents).reshape(len(files), *shape)
    train, test = records[:-1].reshape(-1, shape[1]), records[-1]
    return (*_pixels_labels(train), *_pixels_labels(test))


def _pixels_labels(records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return records[:, 1:].reshape(-1, *_CIFAR_SHAPE), records[:, 0]


# Text


def _docstring_splits(level: str) -> list[list[str]]:
    """Of every twenty docstrings, eighteen are for training, one for validation and one for testing."""
    splits: list[list[str]] = [[], [], []]
    for i, docstring in enumerate(_docstrings()):
        symbols = splits[max(i % 20 - 17, 0)]
        if level == "word":
            symbols.extend(re.findall(r"\w+|[^\w\s]", docstring.lower()))
            symbols.append(END)
        else:
            symbols.extend(docstring + "\n\n")
    return splits


def _docstrings() -> Iterator[str]:
    """Every different docstring of the standard library's sources, files by name, without importing anything."""
    library = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    for path in sorted(library.rglob("*.py"), key=lambda path: path.relative_to(library).parts):
        inside = path.relative_to(library).with_suffix("").parts
        if inside[0] not in sys.stdlib_module_names or {"test", "tests"} & set(inside):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about invalid escapes in old sources
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # samples of broken code
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node)
                if docstring and docstring not in seen:
                    seen.add(docstring)
                    yield docstring


def _ptb_symbols(path: Path, level: str) -> list[str]:
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: not a text in UTF-8 ({error})") from error
    if not content.strip():
        raise UserError(f"{path} is damaged: it is empty")
    if level == "character":
        return list(content)
    return [symbol for line in content.splitlines() for symbol in (*line.split(), END)]


# Files


def _files(name: str, data_dir: Path | str | None) -> list[Path]:
    """The files of a data set; MNIST's may be compressed, as they are published."""
    needed = f"{', '.join(_FILES[name])} from {_HOMES[name]}"
    if data_dir is None:
        raise UserError(f"{name} needs a data directory (--data-dir) with {needed}")
    folder = Path(data_dir)
    if not folder.is_dir():
        raise UserError(f"there is no directory {folder}; {name} needs {needed}")
    found = [folder / file for file in _FILES[name]]
    if name == "mnist":
        found = [path if path.exists() else path.with_name(f"{path.name}.gz") for path in found]
    missing = [file for file, path in zip(_FILES[name], found, strict=True) if not path.is_file()]
    if missing:
        raise UserError(f"missing in {folder}: {', '.join(missing)}; they come from {_HOMES[name]}")
    return found
