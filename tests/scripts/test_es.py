"""``scripts/paper/es.py`` on a small scale."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from es_flipout import EvolutionStrategy
from es_flipout.perturbations import Dense, Family, Flipout, LowRank
from scripts.paper import es
from scripts.paper._es_report import predicted_cosine
from scripts.paper._es_runs import FAMILIES, Job, Setting, run
from scripts.paper._paper import ConvLe

TINY = Setting(width=4, filters=1, conv_hidden=4, batch=8, updates=10, conv_updates=10, score_every=2, draws=1)


@pytest.mark.parametrize("family", [Dense(), Flipout("gaussian", 10), Flipout("gaussian", 1), Flipout("rademacher", 1)])
def test_predicted_cosine_is_that_of_a_linear_fitness(family: Family) -> None:
    samples, gradient = 400, torch.randn(12, 20)
    module = torch.nn.Linear(20, 12, bias=False)
    strategy = EvolutionStrategy(module, samples, 0.1, family, antithetic=False)
    total = torch.zeros(2)
    for strategy.generation in range(60):
        population = strategy.ask()
        # A member's answers to the unit vectors are the columns of its weight: the fitness is linear in the weight.
        x = torch.eye(20).expand(samples, 20, 20)
        fitness = ((population(x) - module(torch.eye(20))).transpose(1, 2) * gradient).sum((1, 2))
        estimate = population.weighted_sum(fitness)["weight"] / (samples * 0.1)
        total += torch.stack([(estimate - gradient).square().sum(), gradient.square().sum()])
    error = (total[0] / total[1]).item()
    predicted = predicted_cosine(240, samples, family)
    assert predicted is not None
    assert 1 / math.sqrt(1 + error) == pytest.approx(predicted, rel=0.1)


def test_there_is_no_prediction_for_low_rank() -> None:
    assert predicted_cosine(240, 400, LowRank()) is None


def test_families_have_forty_flips_or_one_base() -> None:
    bases = [f.bases for f in (make(1600) for make in FAMILIES.values()) if isinstance(f, Flipout)]
    assert bases == [40, 40, 1, 1]


def test_paper_sizes() -> None:
    conv = ConvLe((1, 28, 28), 32, 1024, 10)
    kernels = 25 * 32 + 25 * 32 * 64
    assert sum(p.numel() for p in conv.parameters() if p.ndim > 1) == kernels + 64 * 7 * 7 * 1024 + 1024 * 10
    assert conv(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize("network", ["fc", "conv"])
def test_runs_of_a_seed_start_alike(network: str) -> None:
    files = run(Job(network, 40, "flipout, 40 flips a base", 0, TINY))
    again = run(Job(network, 40, "flipout, 40 flips a base", 0, TINY))
    (row,) = files["runs"]
    assert row["train_loss"] == again["runs"][0]["train_loss"]
    assert [r["update"] for r in files["curves"]] == [2, 4, 6, 8, 10]
    assert [r["sigma"] for r in files["draws"]] == [0.01, 0.1]
    backprop = run(Job(network, 0, "backprop", 0, TINY))
    assert backprop["runs"][0]["train_loss"] != row["train_loss"]
    assert backprop["draws"] == []


def test_what_is_missing_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, es.__file__, "--quick", "--images", "mnist", "--data-dir", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("es.py: missing in")
    assert ended.stderr.count("\n") == 1


@pytest.mark.slow
def test_quick(tmp_path: Path) -> None:
    subprocess.run([sys.executable, es.__file__, "--quick", "--out", str(tmp_path)], check=True)
    assert {p.name for p in tmp_path.iterdir()} == {
        "config.json",
        "curves.csv",
        "draws.csv",
        "environment.json",
        "figure.png",
        "runs.csv",
        "table.md",
    }
    assert "no loss in performance" in (tmp_path / "table.md").read_text(encoding="utf-8")
