"""Imports go one way (the contracts in pyproject.toml), and modules that must be fast to import load nothing heavy."""

import subprocess
import sys
from pathlib import Path

import pytest
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "gymnasium", "mujoco", "ray", "matplotlib", "optuna")
LIGHT = (
    *("", "errors", "config", "presets", "tuning.space"),
    *("cli", "cli.parsing", "cli.train", "cli.resume", "cli.evaluate", "cli.plan", "cli.tune"),
)


def test_imports_keep_the_contracts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    status = lint_imports(no_cache=True)
    assert status == EXIT_STATUS_SUCCESS, capsys.readouterr().out


@pytest.mark.parametrize("module", LIGHT)
def test_import_is_light(module: str, tmp_path: Path) -> None:
    name = f"es_flipout.{module}".rstrip(".")
    code = f"import sys, {name}; print(*sorted(set({HEAVY}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "", f"import {name} loads {done.stdout.strip()}"
