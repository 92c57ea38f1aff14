"""The documentation site: links that leave docs/, formulas, and the pictures. ``make docs`` builds all of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scripts.site import hooks, pictures

ROOT = Path(__file__).parents[2]


def page(path: str) -> Any:
    return SimpleNamespace(file=SimpleNamespace(src_uri=hooks.uri(ROOT / path), abs_src_path=str(ROOT / path)))


@pytest.mark.parametrize(
    ("source", "link", "in_the_site"),
    [
        ("docs/cluster.md", "docker.md#requirements", "docker.md#requirements"),
        ("docs/cluster.md", "../README.md", "index.md"),
        ("docs/cluster.md", "../scripts/speed/scaling.py", "scripts/speed/scaling.py"),
        ("docs/cluster.md", "cloud", "cloud/README.md"),
        ("docs/cloud/README.md", "../../results/README.md", "../results/README.md"),
        ("results/README.md", "../docs/design.md", "../design.md"),
        ("docs/cluster.md", "https://docs.ray.io", "https://docs.ray.io"),
        ("docs/cluster.md", "#gpus", "#gpus"),
    ],
)
def test_links_lead_to_the_same_file_in_the_site(source: str, link: str, in_the_site: str) -> None:
    assert hooks.on_page_markdown(f"see [it]({link}) and `[it]({link})`", page(source)) == (
        f"see [it]({in_the_site}) and `[it]({link})`"
    )


def test_tables_of_results_get_a_title_and_their_figure() -> None:
    folder = next(path.parent for path in sorted((ROOT / "results").glob("families_*/figure.png")))
    shown = hooks.on_page_markdown("| a |", page(f"results/{folder.name}/table.md"))
    assert shown.startswith(f"# {folder.name}\n\n![figure](figure.png)\n\n| a |")


def test_formulas_become_mathml_and_roles_links() -> None:
    shown = hooks.on_page_content(r'<span class="arithmatex">\(a &lt; b_n\)</span> :class:<code>m.C</code>')
    assert '<math xmlns="http://www.w3.org/1998/Math/MathML" display="inline">' in shown
    assert "arithmatex" not in shown
    assert '<autoref optional identifier="m.C"><code>m.C</code></autoref>' in shown


@pytest.mark.parametrize("loads", ['<script src="https://x/y.js">', '<link rel="stylesheet" href="//x/y.css">'])
def test_a_page_that_loads_from_elsewhere_ends_the_build(loads: str) -> None:
    from mkdocs.exceptions import PluginError

    harmless = '<script src="y.js"></script><a href="https://x">'
    assert hooks.on_post_page(harmless, page("docs/faq.md")) == harmless
    with pytest.raises(PluginError, match="loads something from elsewhere"):
        hooks.on_post_page(harmless + loads, page("docs/faq.md"))


def test_error_of_the_estimate_is_that_of_the_page() -> None:
    """The table of docs/flipout.md, with antithetic pairs: ``N`` pairs per base."""
    pairs, weights = 1024, pictures.OUT * pictures.IN
    expected = {
        "flipout, Rademacher base": (weights - 1) / pairs,
        "flipout, one Gaussian base": (weights + 1) / pairs + 2 * (pairs - 1) / pairs,
        "dense": (weights + 1) / pairs,
    }
    for name, error in expected.items():
        measured = pictures.cosine(pictures.FAMILIES[name], 2 * pairs)
        assert measured == pytest.approx((1 + error) ** -0.5, abs=0.04), name


@pytest.mark.slow
def test_pictures_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["pictures.py", "--out", str(tmp_path)])
    pictures.main()
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in (ROOT / "docs" / "images").iterdir()}
