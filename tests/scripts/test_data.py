"""The data loaders of the scripts, on small files of the standard formats."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from es_flipout.errors import UserError
from scripts.paper import _data
from scripts.paper._data import load_images, load_text

MNIST_FILES = {
    "train-images-idx3-ubyte": (6, 4, 5),
    "train-labels-idx1-ubyte": (6,),
    "t10k-images-idx3-ubyte": (3, 4, 5),
    "t10k-labels-idx1-ubyte": (3,),
}
PTB_FILES = {"ptb.train.txt": " a b a <unk> \n b a \n", "ptb.valid.txt": " a c \n", "ptb.test.txt": " b \n"}


def idx(shape: tuple[int, ...]) -> bytes:
    values = np.arange(np.prod(shape)) % 10 * (255 if len(shape) == 3 else 1)
    return (
        b"\0\0\x08" + bytes([len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + values.astype(np.uint8).tobytes()
    )


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    for name, shape in MNIST_FILES.items():
        (tmp_path / name).write_bytes(idx(shape))
    return tmp_path


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(_data, "_CIFAR_IMAGES", 2)
    for i, name in enumerate([f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]):
        records = np.zeros((2, 3073), np.uint8)
        records[:, 0] = i
        records[:, 1:1025] = 255
        (tmp_path / name).write_bytes(records.tobytes())
    return tmp_path


@pytest.fixture
def ptb(tmp_path: Path) -> Path:
    for name, content in PTB_FILES.items():
        (tmp_path / name).write_text(content)
    return tmp_path


def test_digits() -> None:
    data = load_images("digits")
    assert data.train_x.shape == (1440, 1, 8, 8)
    assert data.test_x.shape == (357, 1, 8, 8)
    assert (data.train_x.dtype, data.train_y.dtype) == (torch.float32, torch.int64)
    assert float(data.train_x.min()) == 0
    assert float(data.train_x.max()) == 1
    assert data.classes == 10
    assert data.test_y.bincount().min() > 25


def test_standardized() -> None:
    data = load_images("digits").standardized()
    assert float(data.train_x.mean()) == pytest.approx(0, abs=1e-5)
    assert float(data.train_x.std()) == pytest.approx(1, abs=1e-5)
    assert float(data.test_x.mean()) != 0


def test_mnist(mnist: Path) -> None:
    name = "train-images-idx3-ubyte"
    (mnist / f"{name}.gz").write_bytes(gzip.compress((mnist / name).read_bytes()))
    (mnist / name).unlink()
    data = load_images("mnist", mnist)
    assert data.train_x.shape == (6, 1, 4, 5)
    assert data.test_x.shape == (3, 1, 4, 5)
    assert data.test_y.tolist() == [0, 1, 2]
    # 1 * 255 fits a byte; 2 * 255 wraps around to 254.
    assert data.train_x[0, 0, 0].tolist() == pytest.approx([0, 1, 254 / 255, 253 / 255, 252 / 255])


def test_cifar10(cifar10: Path) -> None:
    data = load_images("cifar10", cifar10)
    assert data.train_x.shape == (10, 3, 32, 32)
    assert data.train_y.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert data.test_y.tolist() == [5, 5]
    assert data.test_x.mean((0, 2, 3)).tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train-images-idx3-ubyte", b"", "not an IDX file"),
        ("train-images-idx3-ubyte", b"PK\3\4 something else", "not an IDX file"),
        ("train-labels-idx1-ubyte", idx((6,))[:-1], "13 bytes, expected 14"),
        ("train-labels-idx1-ubyte", idx((5,)), "do not match"),
        ("t10k-labels-idx1-ubyte", idx((3,))[:-1] + b"\xff", "must be 0 to 9, got 255"),
    ],
)
def test_damaged_mnist(mnist: Path, name: str, damage: bytes, message: str) -> None:
    (mnist / name).write_bytes(damage)
    with pytest.raises(UserError, match=message):
        load_images("mnist", mnist)


def test_damaged_compressed_file(mnist: Path) -> None:
    name = "t10k-images-idx3-ubyte"
    (mnist / f"{name}.gz").write_bytes(gzip.compress((mnist / name).read_bytes())[:-9])
    (mnist / name).unlink()
    with pytest.raises(UserError, match=f"{name}.gz is damaged"):
        load_images("mnist", mnist)


def test_damaged_cifar10(cifar10: Path) -> None:
    path = cifar10 / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"data_batch_3.bin is damaged: 6,141 bytes, expected 6,146"):
        load_images("cifar10", cifar10)


@pytest.mark.parametrize(
    ("name", "home"), [("mnist", "Yann LeCun"), ("cifar10", "Alex Krizhevsky"), ("ptb", "Tomas Mikolov")]
)
def test_missing_files_are_named(tmp_path: Path, name: str, home: str) -> None:
    load = load_text if name == "ptb" else load_images
    with pytest.raises(UserError, match=rf"--data-dir.*{home}"):
        load(name)
    with pytest.raises(UserError, match=rf"no directory .*nowhere.*{home}"):
        load(name, tmp_path / "nowhere")
    with pytest.raises(UserError, match=rf"missing in {tmp_path}: .*{home}"):
        load(name, tmp_path)


def test_only_missing_files_are_named(ptb: Path) -> None:
    (ptb / "ptb.valid.txt").unlink()
    with pytest.raises(UserError, match=rf"missing in {ptb}: ptb.valid.txt; they come"):
        load_text("ptb", ptb)


@pytest.mark.parametrize("name", ["imagenet", ""])
def test_unknown_names(name: str) -> None:
    with pytest.raises(UserError, match="must be one of digits, mnist, cifar10"):
        load_images(name)
    with pytest.raises(UserError, match="must be one of docstrings, ptb"):
        load_text(name)
    with pytest.raises(UserError, match="level must be one of character, word"):
        load_text("docstrings", level=name)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="at least 2, got 1"):
        load_text("docstrings", vocabulary_size=1)


def test_ptb_words(ptb: Path) -> None:
    text = load_text("ptb", ptb, "word")
    assert text.vocabulary == ("a", "<eos>", "b", "<unk>")
    assert text.decode(text.train) == "a b a <unk> <eos> b a <eos>"
    assert text.decode(text.valid) == "a <unk> <eos>"
    assert text.decode(text.test) == "b <eos>"


def test_ptb_characters(ptb: Path) -> None:
    text = load_text("ptb", ptb, "character")
    assert text.decode(text.train) == PTB_FILES["ptb.train.txt"]
    assert text.decode(text.valid) == " a <unk> \n"  # c is not in the training split


def test_vocabulary_is_limited(ptb: Path) -> None:
    text = load_text("ptb", ptb, "word", vocabulary_size=3)
    assert text.vocabulary == ("a", "<eos>", "<unk>")
    assert text.decode(text.train) == "a <unk> a <unk> <eos> <unk> a <eos>"


@pytest.mark.parametrize(("content", "message"), [(b"\n", "it is empty"), (b"\xff\xfe", "not a text in UTF-8")])
def test_damaged_ptb(ptb: Path, content: bytes, message: str) -> None:
    (ptb / "ptb.test.txt").write_bytes(content)
    with pytest.raises(UserError, match=f"ptb.test.txt is damaged: {message}"):
        load_text("ptb", ptb)


def test_docstrings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "test").mkdir()
    (tmp_path / "stranger.py").write_text('"""Not of the library."""')
    (tmp_path / "json" / "test" / "__init__.py").write_text('"""A test."""')
    (tmp_path / "abc.py").write_text('"""Z9 z9."""\ndef f():\n    """Inner,\n    line."""\nraise SystemExit\n')
    (tmp_path / "json" / "tool.py").write_text('"""Z9 z9."""\nclass A:\n    "Last."\n')
    (tmp_path / "json" / "broken.py").write_text("def")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(_data, "_docstring_splits", lambda level, split=_data._docstring_splits: [split(level)[0]] * 3)
    assert list(_data._docstrings()) == ["Z9 z9.", "Inner,\nline.", "Last."]
    words = load_text("docstrings", level="word")
    assert words.decode(words.train) == "z9 z9 . <eos> inner , line . <eos> last . <eos>"
    characters = load_text("docstrings")
    assert characters.decode(characters.train) == "Z9 z9.\n\nInner,\nline.\n\nLast.\n\n"


@pytest.mark.slow
def test_docstrings_of_this_python() -> None:
    text = load_text("docstrings", level="word")
    again = load_text("docstrings", level="word")
    assert text.train.equal(again.train)
    assert len(text.vocabulary) == 10_000
    assert len(text.train) > 200_000
    assert 0.03 < len(text.valid) / len(text.train) < 0.1
    assert 0.03 < len(text.test) / len(text.train) < 0.1
