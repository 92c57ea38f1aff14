"""Data for the scripts: images and text that come with what is installed, and the standard files of public data sets.

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
from collections.abc import Iterable, Iterator
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

_MNIST = "the MNIST database of Yann LeCun and colleagues (yann.lecun.com/exdb/mnist)"
_CIFAR10 = "the binary version of CIFAR-10 by Alex Krizhevsky (www.cs.toronto.edu/~kriz/cifar.html)"
_PTB = "the Penn Treebank as prepared by Tomas Mikolov (simple-examples of the RNNLM toolkit, folder data)"
_MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_CIFAR_FILES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
_CIFAR_IMAGES = 10_000  # in each file
_CIFAR_SHAPE = (3, 32, 32)
_PTB_FILES = ("ptb.train.txt", "ptb.valid.txt", "ptb.test.txt")
_VOCABULARY = {"character": 128, "word": 10_000}


@dataclass(frozen=True)
class Images:
    """Labelled images with a fixed split.

    Attributes:
        name: of the data set.
        train_x, test_x: ``(N, C, H, W)`` float32 in [0, 1], not standardised (see :meth:`standardised`).
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

    def standardised(self) -> Images:
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
    if name == "digits":
        return _digits()
    if name == "mnist":
        return _mnist(_directory(name, data_dir, _MNIST_FILES, _MNIST))
    if name == "cifar10":
        return _cifar10(_directory(name, data_dir, _CIFAR_FILES, _CIFAR10))
    raise UserError(f"images must be one of {', '.join(IMAGES)}, got {name!r}")


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
    size = _VOCABULARY[level] if vocabulary_size is None else vocabulary_size
    if size < 2:
        raise UserError(f"vocabulary size must be at least 2, got {size}")
    if name == "docstrings":
        splits = _docstring_splits(level)
        source = f"docstrings of the standard library of Python {platform.python_version()}"
    elif name == "ptb":
        folder = _directory(name, data_dir, _PTB_FILES, _PTB)
        splits = [_ptb_symbols(folder / file, level) for file in _PTB_FILES]
        source = "Penn Treebank (Mikolov's files)"
    else:
        raise UserError(f"text must be one of {', '.join(TEXTS)}, got {name!r}")
    return _numbered(name, level, splits, size, source)


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


def _mnist(folder: Path) -> Images:
    train_x, train_y, test_x, test_y = (_idx(_existing(folder, file)) for file in _MNIST_FILES)
    for images, labels, which in ((train_x, train_y, "training"), (test_x, test_y, "test")):
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or not len(images):
            shapes = f"{images.shape} and {labels.shape}"
            raise UserError(f"{folder}: {which} images and labels of MNIST do not belong together: shapes {shapes}")
        if labels.max() > 9:
            raise UserError(f"{folder}: {which} labels of MNIST must be 0 to 9, got {labels.max()}")
    return Images(
        "mnist", _scaled(train_x[:, None]), _labels(train_y), _scaled(test_x[:, None]), _labels(test_y), "MNIST"
    )


def _idx(path: Path) -> np.ndarray:
    """An IDX file of bytes (two zero bytes, type 8, number of dimensions, big-endian sizes, data), compressed or not."""
    content = _bytes(path)
    dims = content[3] if len(content) >= 4 else 0
    if len(content) < 4 + 4 * dims or content[:3] != b"\0\0\x08" or not dims:
        raise UserError(f"{path} is not an IDX file of bytes")
    shape = tuple(np.frombuffer(content, ">u4", dims, 4).tolist())
    expected = 4 + 4 * dims + int(np.prod(shape, dtype=object))
    if len(content) != expected:
        raise UserError(f"{path} is damaged: {len(content):,} bytes where its header promises {expected:,}")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape)


def _cifar10(folder: Path) -> Images:
    """Records of one label byte and 3,072 pixel bytes (red, green, blue planes)."""
    record = 1 + int(np.prod(_CIFAR_SHAPE))
    x, y = [], []
    for file in _CIFAR_FILES:
        content = _bytes(folder / file)
        if len(content) != _CIFAR_IMAGES * record:
            raise UserError(
                f"{folder / file} is damaged: {len(content):,} bytes, expected {_CIFAR_IMAGES * record:,} "
                f"({_CIFAR_IMAGES:,} records of {record:,})"
            )
        records = np.frombuffer(content, np.uint8).reshape(-1, record)
        if records[:, 0].max() > 9:
            raise UserError(f"{folder / file} is damaged: labels must be 0 to 9, got {records[:, 0].max()}")
        x.append(records[:, 1:].reshape(-1, *_CIFAR_SHAPE))
        y.append(records[:, 0])
    return Images(
        "cifar10",
        _scaled(np.concatenate(x[:-1])),
        _labels(np.concatenate(y[:-1])),
        _scaled(x[-1]),
        _labels(y[-1]),
        "CIFAR-10",
    )


def _scaled(pixels: np.ndarray) -> Tensor:
    return torch.tensor(pixels, dtype=torch.float32) / 255


def _labels(labels: np.ndarray) -> Tensor:
    return torch.tensor(labels, dtype=torch.int64)


# Text


def _docstring_splits(level: str) -> list[list[str]]:
    """Of twenty docstrings in a row, eighteen are for training, one for validation and one for testing."""
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
                warnings.simplefilter("ignore")  # of invalid escapes in old sources
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


def _numbered(name: str, level: str, splits: Iterable[list[str]], size: int, source: str) -> Text:
    """Symbols as indices into the ``size`` most frequent of the first split (equally frequent ones by the alphabet)."""
    splits = list(splits)
    counts = Counter(splits[0])
    kept = [symbol for symbol, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:size]]
    if UNKNOWN not in kept and any(symbol not in kept for symbol in set().union(*splits)):
        kept = [*kept[: size - 1], UNKNOWN]
    index = {symbol: i for i, symbol in enumerate(kept)}
    unknown = index.get(UNKNOWN, 0)
    train, valid, test = (
        torch.tensor([index.get(symbol, unknown) for symbol in split], dtype=torch.int64) for split in splits
    )
    return Text(name, level, train, valid, test, tuple(kept), source)


# Files


def _directory(name: str, data_dir: Path | str | None, files: tuple[str, ...], home: str) -> Path:
    """The directory when it holds all the files (compressed files count)."""
    if data_dir is None:
        raise UserError(f"{name} needs a data directory (--data-dir) with {', '.join(files)} from {home}")
    folder = Path(data_dir)
    if not folder.is_dir():
        raise UserError(f"there is no directory {folder}; {name} needs {', '.join(files)} from {home}")
    missing = [file for file in files if not _existing(folder, file).is_file()]
    if missing:
        raise UserError(f"missing in {folder}: {', '.join(missing)}; they come from {home}")
    return folder


def _existing(folder: Path, file: str) -> Path:
    """The file, or the compressed one in its place (MNIST is published compressed)."""
    compressed = folder / f"{file}.gz"
    return compressed if file in _MNIST_FILES and not (folder / file).exists() else folder / file


def _bytes(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged: {error}") from error
