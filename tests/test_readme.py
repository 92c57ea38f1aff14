"""The README is consistent with the results, and its examples run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts import report
from scripts.site import commands

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_are_those_of_the_results() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "readme.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0, "run python scripts/readme.py"


@pytest.mark.parametrize("link", re.findall(r"\]\((?!https?:)([^)#]+)\)", README))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


def test_the_first_example_learns() -> None:
    names: dict[str, object] = {}
    first = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    exec(first.replace("range(100)", "range(30)"), names)
    trained, x, y = names["trained"], names["x"], names["y"]
    with torch.no_grad():
        error = float((trained(x) - y).square().mean())  # type: ignore[operator]
    assert error < float(y.square().mean())  # type: ignore[attr-defined]


def test_what_the_commands_print_is_that_of_a_run() -> None:
    folders = list((ROOT / "results").glob("make_train_*"))
    for folder in folders:
        text = commands.rendered(
            report.read_json(folder / "commands.json"), report.read_json(folder / "environment.json")
        )
        assert (folder / "output.md").read_text(encoding="utf-8") == text
        score = report.read_json(folder / "evaluation.json")["mean_return"]
        assert f"score {score:,.1f} " in text
    assert any(f"begin results/{folder.name}/output.md" in README for folder in folders)


def test_the_first_forty_lines_show_what_it_is() -> None:
    front = "\n".join(README.splitlines()[:40])
    for shown in ("policies.gif", "make train", "front.md", "figure.png", "strategy.tell(", "documentation", "GPU"):
        assert shown in front
    assert front.count("```") % 2 == 0, "a block goes beyond line 40"
