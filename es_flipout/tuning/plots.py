"""Plots of a study, by Optuna's matplotlib functions."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import optuna
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from optuna.trial import TrialState
from optuna.visualization import matplotlib as plots

from es_flipout.training.checkpoint import atomic_write

HISTORY, IMPORTANCE = "history.png", "importance.png"


def write_plots(study: optuna.Study, folder: Path) -> None:
    """Write the history of a study, and the importance of its parameters once it has two different values to compare."""
    values = {trial.value for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))}
    if values:
        _write(folder / HISTORY, lambda: plots.plot_optimization_history(study, target_name="score"))
    if len(values) > 1:
        _write(folder / IMPORTANCE, lambda: plots.plot_param_importances(study, target_name="score"))


def _write(path: Path, plot: Callable[[], Axes]) -> None:
    import matplotlib.pyplot as plt

    mpl.use("Agg")
    # Optuna sets a style of its own, and calls these functions experimental.
    with warnings.catch_warnings(), plt.style.context("default"):
        warnings.simplefilter("ignore")
        figure = plot().figure
        assert isinstance(figure, Figure)
        figure.set_size_inches(9, 5)
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=120, bbox_inches="tight")
        plt.close(figure)
    atomic_write(path, data.getvalue())
