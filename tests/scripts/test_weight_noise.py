"""The scripts on training with weight noise run from end to end in a tiny version and write what results/ promises."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from es_flipout.nn import Estimator, flipout
from scripts.paper import bayes_by_backprop, language_models, variance
from scripts.paper._variance_report import Estimate, predicted, slope

FILES = {"config.json", "environment.json", "runs.csv", "table.md", "figure.png"}


def run(module: ModuleType, out: Path, monkeypatch: pytest.MonkeyPatch, quick: Any) -> str:
    """``main`` with ``--quick`` and still less; the table."""
    pytest.importorskip("sklearn")
    monkeypatch.setattr(module, "QUICK", quick)
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
    quick = variance.Protocol((1, 8), 3, 2, 4, 10, 8, 4, 0.15, 1)
    table = run(variance, tmp_path, monkeypatch, quick)
    assert "| FC1 | flipout |" in table
    assert "| LSTM Wo | shared |" in table


@pytest.mark.slow
def test_bayes_by_backprop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = dataclasses.replace(bayes_by_backprop.QUICK, batch=64, iterations=(("FC", 4), ("Conv", 4)))
    table = run(bayes_by_backprop, tmp_path, monkeypatch, quick)
    assert "| FC | local reparam. |" in table


@pytest.mark.slow
def test_language_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    less = {"train_symbols": 1000, "test_symbols": 500, "epochs": 2}
    quick = tuple(dataclasses.replace(model, **less) for model in language_models.QUICK)
    table = run(language_models, tmp_path, monkeypatch, quick)
    assert "| noise, flipout |" in table
    assert "Penn Treebank" in table


def test_slope_and_prediction() -> None:
    assert slope({n: Estimate(3.0 / n, 0.0) for n in (1, 4, 16, 64)}) == pytest.approx(-1)
    assert slope({n: Estimate(3.0, 0.0) for n in (1, 4)}) == pytest.approx(0)
    known = {"alpha": 6.0, "beta+gamma": 2.0, "gamma": 1.0}
    constants = {("a", name): Estimate(value, 0.0) for name, value in known.items()}
    assert predicted(constants, "a", "shared", 3) == pytest.approx(6 / 3 + 2 / 3 * 2)
    assert predicted(constants, "a", "flipout", 3) == pytest.approx(6 / 3 + 2 / 3 * 1)


def test_theorem_two_holds_for_a_small_network() -> None:
    x, target = 1 + torch.randn(50, 4), torch.randn(50, 2)
    layer = flipout(torch.nn.Linear(4, 2), variance.NOISE)
    net = variance.Net(
        "small",
        "",
        layer,
        lambda m, i: (m(x[i]) - target[i]).square().sum(1),
        50,
        [layer.weight],
        lambda grads: {"all": grads[0]},
    )
    constants: dict[tuple[str, str], Estimate] = {}
    variance.use(layer, "independent")
    constants["all", "alpha"] = Estimate(16 * variance.variances(net, 16, 600)["all"], 0.0)
    in_common: tuple[tuple[Estimator, str], ...] = (("flipout", "gamma"), ("shared", "beta+gamma"))
    for estimator, what in in_common:
        variance.use(layer, estimator)
        groups = variance.half_covariance(net, 32, 600)["all"]
        constants["all", what] = Estimate(sum(groups) / len(groups), 0.0)
        measured = variance.variances(net, 64, 600)["all"]
        assert measured == pytest.approx(predicted(constants, "all", estimator, 64), rel=0.2)
    assert constants["all", "alpha"].mean > constants["all", "beta+gamma"].mean > constants["all", "gamma"].mean
