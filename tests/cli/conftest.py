import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from command_line import ODDITIES, SMALL, run, the_line

from es_flipout import cli


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that runs the command line in this process and returns its one-line message."""

    def call(*args: str | Path) -> str:
        code = cli.main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return the_line(code, captured.out, captured.err)

    return call


@pytest.fixture
def oddities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Create a folder with the module ``oddities``, importable here and by :func:`run` with ``cwd`` set to it."""
    (tmp_path / "oddities.py").write_text(ODDITIES, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    before = set(gymnasium.registry)
    yield tmp_path
    sys.modules.pop("oddities", None)
    for name in set(gymnasium.registry) - before:
        gymnasium.registry.pop(name)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Run from start to end in a real process."""
    folder = tmp_path_factory.mktemp("trained")
    return folder / "run", run("train", "CartPole-v1", *SMALL, "--seed", "5", "--run-dir", "run", cwd=folder)


@pytest.fixture
def run_dir(trained: tuple[Path, Any], tmp_path: Path) -> Path:
    """Return a copy of the trained run that a test may damage."""
    return Path(shutil.copytree(trained[0], tmp_path / "copy"))
