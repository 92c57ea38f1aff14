"""Built and installed packages contain the files of the tree, and no generic names end up in site-packages."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    """Run a command outside the tree and return its output."""
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel from a copy of the sources: builds leave folders behind, and pick up those of earlier ones."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("es_flipout", "envs"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "results" / "policies", tree / "results" / "policies")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, tree, cwd=out)
    (built,) = out.glob("es_flipout-*.whl")
    return built


def test_wheel_holds_every_source_once(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    expected = {"es_flipout/py.typed"}
    expected |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "es_flipout").rglob("*.py")}
    expected |= {f"es_flipout/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "envs").rglob("*.py")}
    policies = ROOT / "results" / "policies"
    files = (path for path in policies.rglob("*") if path.is_file())
    expected |= {f"es_flipout/zoo/{path.relative_to(policies).as_posix()}" for path in files}
    assert len(names) == len(set(names))
    assert {name for name in names if ".dist-info/" not in name} == expected, "a package missing in pyproject.toml?"
    assert {name.split("/")[0].split("-")[0] for name in names} == {"es_flipout"}


def test_wheel_works_outside_the_tree(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    run(*pip, "install", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    code = """
import importlib.metadata, importlib.util, pathlib, sys
import es_flipout, es_flipout.envs
site = pathlib.Path(sys.argv[1])
for module in (es_flipout, es_flipout.envs):  # not the copy that the editable install would serve
    assert site in pathlib.Path(str(module.__file__)).parents, module.__file__
assert (site / "es_flipout" / "py.typed").exists()
assert importlib.util.find_spec("envs") is None
(distribution,) = importlib.metadata.distributions(name="es-flipout", path=[str(site)])
(script,) = distribution.entry_points.select(group="console_scripts")
assert (script.name, script.value) == ("es-flipout", "es_flipout.cli:main"), script
assert callable(script.load())
"""
    run(sys.executable, "-c", code, site, cwd=tmp_path, PYTHONPATH=str(site))
    assert (site / "bin" / "es-flipout").exists()


def test_editable_install_exposes_no_top_level_envs(tmp_path: Path) -> None:
    code = "from importlib.util import find_spec; print(find_spec('envs'), find_spec('es_flipout.envs') is None)"
    assert run(sys.executable, "-c", code, cwd=tmp_path).split() == ["None", "False"]
