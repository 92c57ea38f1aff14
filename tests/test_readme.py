"""The README is consistent with the results, and its examples run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
