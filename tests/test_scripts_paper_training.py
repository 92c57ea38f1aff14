"""The scripts on training with weight noise run from end to end in a tiny version and write what results/ promises."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SCRIPTS = Path(__file__).parents[1] / "scripts"
FILES = {"config.json", "environment.json", "runs.csv", "table.md", "figure.png"}


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return __import__(name)


def run(module: ModuleType, out: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> str:
    """``main`` with ``--quick`` and still less; the table."""
    pytest.importorskip("sklearn")
    monkeypatch.setattr(module, "QUICK", changes["quick"])
    monkeypatch.setattr(sys, "argv", ["script", "--out", str(out), "--quick"])
    module.main()
    assert {path.name for path in out.iterdir()} >= FILES
    before = (out / "table.md").read_text()
    monkeypatch.setattr(sys, "argv", ["script", "--out", str(out), "--render"])
    module.main()
    assert (out / "table.md").read_text() == before
    return before


@pytest.mark.slow
def test_variance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("paper_variance", monkeypatch)
    quick = module.Protocol((1, 8), 3, 2, 4, 10, 8, 4, 0.15, 1)
    table = run(module, tmp_path, monkeypatch, quick=quick)
    assert "| FC1 | flipout |" in table
    assert "| LSTM Wo | shared |" in table


@pytest.mark.slow
def test_bayes_by_backprop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("paper_bayes_by_backprop", monkeypatch)
    quick = dataclasses.replace(module.QUICK, batch=64, iterations=(("FC", 4), ("Conv", 4)))
    table = run(module, tmp_path, monkeypatch, quick=quick)
    assert "| FC | local reparam. |" in table


@pytest.mark.slow
def test_language_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("paper_language_models", monkeypatch)
    quick = tuple(dataclasses.replace(model, train_symbols=1000, test_symbols=500, epochs=2) for model in module.QUICK)
    table = run(module, tmp_path, monkeypatch, quick=quick)
    assert "| noise, flipout |" in table
    assert "Penn Treebank" in table


def test_slope_and_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("paper_variance", monkeypatch)
    assert module.slope({n: (3.0 / n, 0.0) for n in (1, 4, 16, 64)}) == pytest.approx(-1)
    assert module.slope({n: (3.0, 0.0) for n in (1, 4)}) == pytest.approx(0)
    constants = {("a", "alpha"): (6.0, 0.0), ("a", "beta+gamma"): (2.0, 0.0), ("a", "gamma"): (1.0, 0.0)}
    assert module.predicted(constants, "a", "shared", 3) == pytest.approx(6 / 3 + 2 / 3 * 2)
    assert module.predicted(constants, "a", "flipout", 3) == pytest.approx(6 / 3 + 2 / 3 * 1)


def test_theorem_two_holds_for_a_small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("paper_variance", monkeypatch)
    x, target = 1 + torch.randn(50, 4), torch.randn(50, 2)
    layer = module.flipout(torch.nn.Linear(4, 2), module.NOISE)
    net = module.Net(
        "small",
        "",
        layer,
        lambda m, i: (m(x[i]) - target[i]).square().sum(1),
        50,
        [layer.weight],
        lambda grads: {"all": grads[0]},
        ("shared", "flipout"),
    )
    constants: dict[tuple[str, str], tuple[float, float]] = {}
    module.use(layer, "independent")
    constants["all", "alpha"] = (16 * module.variances(net, 16, 600)["all"], 0.0)
    for estimator, what in (("flipout", "gamma"), ("shared", "beta+gamma")):
        module.use(layer, estimator)
        groups = module.half_covariance(net, 32, 600)["all"]
        constants["all", what] = (sum(groups) / len(groups), 0.0)
        measured = module.variances(net, 64, 600)["all"]
        assert measured == pytest.approx(module.predicted(constants, "all", estimator, 64), rel=0.2)
    assert constants["all", "alpha"][0] > constants["all", "beta+gamma"][0] > constants["all", "gamma"][0]
