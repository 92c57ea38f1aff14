"""Imports go one way: a module imports only from its left, and ``es_flipout.envs`` nothing of the engine."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = (
    "errors",
    "config",
    "presets",
    "randomness",
    "nn",
    "kernels",
    "perturbations.operations",
    "perturbations.base",
    "perturbations.independent",
    "perturbations.dense",
    "perturbations.flipout",
    "perturbations.low_rank",
    "perturbations",  # the factory in __init__.py
    "layers",
    "memory",
    "policies",
    "observation_norm",
    "fused",
    "agent",
    "shaping",
    "optimizers",
    "population",
    "estimator",
    "strategy",
    "rollout",
    "device_rollout",
    "player",
    "device_player",
    "plan",
    "arrangement",
    "runinfo",
    "evaluate",
    "checkpoint",
    "metrics",
    "cluster",
    "trainer",
    "bench",  # with its sub-modules, which may import one another
    "cli",
)
WHOLE_PACKAGES = ("nn", "kernels", "layers", "cluster", "bench")
TORCH_FREE = ("", "errors", "config", "presets", "cli")
GYMNASIUM_FREE = ("", "errors", "config", "presets")


def module_name(path: Path) -> str:
    """``es_flipout/perturbations/__init__.py`` -> ``perturbations``; the face ``es_flipout/__init__.py`` -> ``""``."""
    parts = path.relative_to(ROOT / "es_flipout").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def place(module: str) -> str:
    """The entry of ORDER that a module belongs to."""
    package = module.split(".")[0]
    return package if package in WHOLE_PACKAGES else module


def imported(source: str, package: str) -> set[str]:
    """Absolute dotted names of all that a source imports, anywhere in it; ``package`` resolves relative imports."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            above = parts[: len(parts) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def engine_place(name: str) -> str | None:
    """The place of an imported name: an entry of ORDER, ``"envs"``, ``""`` for the face, None for other packages."""
    package, _, rest = name.partition(".")
    if package != "es_flipout":
        return None
    while rest and rest not in (*ORDER, "envs"):
        rest = rest.rpartition(".")[0]
    return rest


def violations(module: str, source: str, package: str) -> list[str]:
    """What ``module`` imports although the order forbids it."""
    allowed = {"", "envs", *ORDER[: ORDER.index(place(module)) + 1]}
    if module in GYMNASIUM_FREE:
        allowed.remove("envs")
    places = {name: engine_place(name) for name in imported(source, package)}
    return sorted(name for name, to in places.items() if to is not None and to not in allowed)


ENGINE = {
    module_name(path): path
    for path in sorted((ROOT / "es_flipout").rglob("*.py"))
    if (ROOT / "es_flipout" / "envs") not in path.parents
}
ENVS = sorted((ROOT / "envs").rglob("*.py"))


def test_every_module_has_a_place() -> None:
    unknown = [module for module in ENGINE if module and place(module) not in ORDER]
    assert not unknown, f"add to ORDER in tests/test_layering.py, at the right place: {', '.join(unknown)}"


@pytest.mark.parametrize("module", [module for module in ENGINE if place(module) in ORDER])
def test_imports_only_from_the_left(module: str) -> None:
    path = ENGINE[module]
    package = ".".join(("es_flipout", *path.relative_to(ROOT / "es_flipout").parts[:-1]))
    wrong = violations(module, path.read_text(encoding="utf-8"), package)
    assert not wrong, f"es_flipout.{module} stands left of what it imports: {', '.join(wrong)}"


@pytest.mark.parametrize("path", ENVS, ids=lambda path: path.stem)
def test_envs_import_nothing_of_the_engine(path: Path) -> None:
    package = ".".join(("es_flipout", *path.relative_to(ROOT).parts[:-1]))
    names = imported(path.read_text(encoding="utf-8"), package)
    wrong = sorted(name for name in names if engine_place(name) not in (None, "envs") or name.split(".")[0] == "envs")
    assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(wrong)}"


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("shaping", "import es_flipout.randomness", []),
        ("shaping", "def f():\n    from es_flipout.trainer import Trainer", ["es_flipout.trainer.Trainer"]),
        ("policies", "from es_flipout import config, strategy", ["es_flipout.strategy"]),
        ("policies", "from .perturbations import base", []),
        ("perturbations.dense", "from . import base, flipout", ["es_flipout.perturbations.flipout"]),
        ("perturbations.dense", "from .. import cli", ["es_flipout.cli"]),
        ("bench.forward", "from es_flipout.bench.rollout import f\nimport es_flipout.cli", ["es_flipout.cli"]),
        ("presets", "import es_flipout.envs.base", ["es_flipout.envs.base"]),
        ("rollout", "from es_flipout.envs import make", []),
    ],
)
def test_the_rule_itself(module: str, source: str, wrong: list[str]) -> None:
    package = "es_flipout.perturbations" if module.startswith("perturbations.") else "es_flipout"
    assert violations(module, source, package) == wrong


@pytest.mark.parametrize("module", [module for module in TORCH_FREE if module in ENGINE])
def test_import_is_light(module: str, tmp_path: Path) -> None:
    name = f"es_flipout.{module}".rstrip(".")
    heavy = ["torch", "gymnasium"] if module in GYMNASIUM_FREE else ["torch"]
    code = f"import sys, {name}; print(*sorted(set({heavy}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "", f"import {name} loads {done.stdout.strip()}"
