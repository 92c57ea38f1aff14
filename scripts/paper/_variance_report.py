"""Table and figure of ``variance.py``: what ``runs.csv`` says about Figure 1 and Theorem 2 of the Flipout paper."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scripts import report
from scripts.paper._paper import ESTIMATOR_COLORS, ESTIMATOR_NAMES

PAPER = {
    "shared": "flattens, N = 100 to 1000",
    "flipout": "1/N throughout",
    "local_reparameterization": "below flipout",
}
CONSTANTS = ("alpha", "beta+gamma", "gamma")


class Estimate(NamedTuple):
    """A mean and its standard error."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:.2e} ± {self.error:.0e}"


class Collected(NamedTuple):
    """What was measured: variances by layer, estimator and batch size; constants by layer and name; the layers in order."""

    curves: dict[tuple[str, str], dict[int, Estimate]]
    constants: dict[tuple[str, str], Estimate]
    layers: list[str]


def collected(out: Path) -> Collected:
    """The means of ``runs.csv``."""
    rows = report.read_csv(out / "runs.csv")
    found = Collected({}, {}, list(rows["layer"].unique()))
    for (layer, estimator, quantity, batch), own in report.groups(rows, "layer", "estimator", "quantity", "batch"):
        estimate = Estimate(*report.mean_and_error(own["value"]))
        if quantity == "variance":
            found.curves.setdefault((layer, estimator), {})[batch] = estimate
        else:
            found.constants[layer, quantity] = estimate
    return found


def slope(curve: Mapping[int, Estimate], smallest: float = 1, largest: float = math.inf) -> float:
    """Of log variance against log batch size, by least squares."""
    points = [(math.log(n), math.log(value.mean)) for n, value in curve.items() if smallest <= n <= largest]
    x, y = np.array(points).reshape(-1, 2).T
    return float(np.polyfit(x, y, 1)[0]) if len(points) > 1 else math.nan


def predicted(constants: Mapping[tuple[str, str], Estimate], layer: str, estimator: str, batch: float) -> float:
    """Equations 11 (shared) and 12 (flipout)."""
    floor = max(0.0, constants[layer, "gamma" if estimator == "flipout" else "beta+gamma"].mean)
    return constants[layer, "alpha"].mean / batch + (batch - 1) / batch * floor


def table(out: Path) -> str:
    """Slopes, constants, and prediction against measurement, in Markdown."""
    found, config = collected(out), report.read_json(out / "config.json")
    protocol = config["protocol"]
    known = [layer for layer in found.layers if all((layer, name) in found.constants for name in CONSTANTS)]
    return "\n".join(
        (
            f"Data: {config['images']}; {config['text']}.\n",
            *(f"- {name}: {size}" for name, size in config["nets"].items()),
            f"\nEach variance: {protocol['draws']} draws, repeated {protocol['repeats']} times (the paper: 200 and 50), "
            "± one standard error.\n",
            "**Figure 1: how the variance falls with the batch size N** (slope of log variance against log N; -1 is 1/N)\n",
            _slopes(found),
            "Local reparameterization lies below already at N = 1: its gradient of the mean weights passes through the\n"
            "standard deviation of an output, where the noises of all inputs are averaged. Where flipout bends, gamma shows\n"
            "(below); the paper's layers, in which it did not show up to N = 8192, are much larger. Conv1 has one input "
            "channel, so\nonly one input sign for the whole filter bank.\n",
            "**Theorem 2: the constants** (the paper: alpha ≫ beta ≫ gamma, without figures)\n",
            _constants(found, known),
            "**Theorem 2: prediction and measurement** (variance ÷ alpha, so that 1/N is the variance with independent "
            "weights)\n",
            _predictions(found, known),
        )
    )


def _slopes(found: Collected) -> str:
    largest = max(batch for curve in found.curves.values() for batch in curve)
    rows = []
    for layer in found.layers:
        for estimator, name in ESTIMATOR_NAMES.items():
            if curve := found.curves.get((layer, estimator)):
                slopes = [f"{value:.2f}" for value in (slope(curve, 1, 256), slope(curve, 256), slope(curve))]
                ratio = curve[largest].mean / found.curves[layer, "flipout"][largest].mean
                rows.append((layer, name, *slopes, curve[largest], f"{ratio:.1f}", PAPER[estimator]))
    header = "layer | estimator | slope, N ≤ 256 | slope, N ≥ 256 | slope, all | "
    return report.markdown(header + f"variance, N = {largest} | ÷ flipout | paper", rows)


def _constants(found: Collected, layers: list[str]) -> str:
    rows = []
    for layer in layers:
        alpha, both, gamma = (found.constants[layer, name] for name in CONSTANTS)
        bend = f"{alpha.mean / gamma.mean:,.0f}" if gamma.mean > 2 * gamma.error else "gamma not resolved"
        shared_bend = f"{alpha.mean / (both.mean - max(0.0, gamma.mean)):,.0f}"
        rows.append((layer, alpha, both, f"{gamma.mean:.1e} ± {gamma.error:.0e}", shared_bend, bend))
    header = (
        "layer | alpha | beta + gamma | gamma | shared bends at N ≈ alpha ÷ beta | flipout bends at N ≈ alpha ÷ gamma"
    )
    return report.markdown(header, rows)


def _predictions(found: Collected, layers: list[str]) -> str:
    rows = []
    for layer in layers:
        alpha = found.constants[layer, "alpha"].mean
        for batch in found.curves[layer, "flipout"]:
            cells = []
            for estimator in ("flipout", "shared"):
                value, error = found.curves[layer, estimator][batch]
                cells.append(f"{predicted(found.constants, layer, estimator, batch) / alpha:.2e}")
                cells.append(Estimate(value / alpha, error / alpha))
            rows.append((layer, batch, f"{1 / batch:.2e}", *cells))
    header = (
        "layer | N | 1/N (10) | flipout predicted (12) | flipout measured | shared predicted (11) | shared measured"
    )
    return report.markdown(header, rows)


def figure(out: Path) -> None:
    """One panel for each layer: measured points, predicted lines."""
    curves, constants, layers = collected(out)
    fig, axes = report.panels(len(layers), 3.5, 3.1, columns=4)
    for axis, layer in zip(axes, layers, strict=True):
        for estimator, name in ESTIMATOR_NAMES.items():
            if curve := curves.get((layer, estimator)):
                means, errors = np.array(list(curve.values())).T
                color = ESTIMATOR_COLORS[estimator]
                axis.errorbar(list(curve), means, 2 * errors, fmt="o", ms=4, color=color, label=name)
                if estimator == "local_reparameterization" or (layer, "gamma") not in constants:
                    axis.plot(list(curve), means, color=color, lw=1)
                else:
                    grid = np.geomspace(1, max(curve), 60)
                    axis.plot(grid, [predicted(constants, layer, estimator, n) for n in grid], color=color, lw=1)
        if (layer, "alpha") in constants:
            batches = np.array(list(curves[layer, "flipout"]))
            axis.plot(batches, constants[layer, "alpha"].mean / batches, "k:", lw=1, label="alpha / N")
        axis.set(xscale="log", yscale="log", title=layer)
        axis.set_xlabel("batch size N")
    axes[0].set_ylabel("variance of the gradient")
    axes[0].legend(fontsize=8)
    title = "Points: measured (± 2 standard errors). Lines: Theorem 2 (local reparameterization: only joined)"
    fig.suptitle(title, fontsize=10)
    report.save(fig, out)
