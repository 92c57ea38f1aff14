"""Every table in results/ is what its script renders from the files beside it."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = sorted(path.parent for path in (ROOT / "results").glob("*/table.md"))
SCRIPTS = {
    "against_rl": "learning.against_rl",
    "cartpole": "speed.cartpole",
    "compare": "speed.compare",
    "exported": "learning.exported",
    "families": "learning.families",
    "kernels": "checks.kernel_resources",
    "language_model": "speed.language_model",
    "learning": "learning.presets",
    "memory": "learning.memory",
    "methods": "learning.methods",
    "occupancy": "speed.occupancy",
    "paper_bayes_by_backprop": "paper.bayes_by_backprop",
    "paper_es": "paper.es",
    "paper_language_models": "paper.language_models",
    "paper_update_time": "paper.update_time",
    "paper_variance": "paper.variance",
    "peers": "speed.peers",
    "reliability": "checks.reliability",
    "scaling": "speed.scaling",
    "sharding": "speed.sharding",
    "speed": "speed.rollout_and_forward",
}


@pytest.mark.parametrize("folder", FOLDERS, ids=[folder.name for folder in FOLDERS])
def test_rendered_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if folder.name.startswith("paper_es"):
        pytest.importorskip("sklearn")
    out = tmp_path / folder.name
    shutil.copytree(folder, out)
    (out / "table.md").unlink()
    script = importlib.import_module(f"scripts.{SCRIPTS[re.split('_epyc|_xeon|_sm90', folder.name)[0]]}")
    monkeypatch.setattr(sys, "argv", ["script.py", "--out", str(out), "--render"])
    script.main()
    for path in (*folder.glob("*.md"), *folder.glob("*.csv"), *folder.glob("*.json")):
        assert (out / path.name).read_text(encoding="utf-8") == path.read_text(encoding="utf-8"), path.name
    assert (folder / "figure.png").exists() == (out / "figure.png").exists()


def test_reproduce_makes_every_folder_with_its_script() -> None:
    environment = {**os.environ, "PYTHON": "echo", "WHERE": "here"}
    command = [str(ROOT / "scripts" / "reproduce.sh")]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    made = dict(re.findall(r"^scripts/(\S+)\.py --out results/(\w+)_here", shown, re.MULTILINE))
    assert {folder: script.replace("/", ".") for script, folder in made.items()} == SCRIPTS
    one = subprocess.run([*command, "memory"], env=environment, capture_output=True, text=True, check=True).stdout
    assert one.count("--out") == 1
    assert subprocess.run([*command, "nothing"], env=environment, capture_output=True, check=False).returncode == 2


def test_the_kernels_in_the_table_are_those_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # the interpreter has one configuration
    kernels = importlib.import_module("scripts.checks.kernel_resources")
    runs = kernels.report.read_csv(ROOT / "results" / "kernels_sm90_2026-11" / "runs.csv")
    found = [tuple(str(run[name]) for name in kernels.Case.KEY) for _, run in runs.iterrows()]
    assert found == [tuple(str(case.key[name]) for name in kernels.Case.KEY) for case in kernels.cases()]
    assert runs["shared"].max() <= kernels.MOST_SHARED
    assert runs["spill_stores"].max() < 100
