"""Compare methods that change how an update is made, with paired seeds and equal environment steps.

python scripts/learning/methods.py --out results/methods_<hardware>_<yyyy-mm>
python scripts/learning/methods.py --out ... --envs HalfCheetah-v5 --seeds 0 1 2   # part of it; finished runs are kept
python scripts/learning/methods.py --out ... --render                              # only table.md and figure.png

All methods share a task's policy and population, and all but ClipUp (with pgpelib's step and sigma) its sigma and learning
rate; the last column is the mean over the seeds of the difference to the first method, with its standard error. The budgets
are shorter than those of the presets.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[2]))

from scripts import report
from scripts.learning._runs import Changes, compare, listed, plot_comparison

_SHARED = {"policy": "linear", "squash": "tanh", "shaping": "ranks", "horizon": None, "starts": 1, "weight_decay": 0.0}
TASKS: Changes = {
    "HalfCheetah-v5": {**_SHARED, "env_steps": 1_000_000, "sigma_final": None, "score_every": 5},
    "Hopper-v5": {**_SHARED, "env_steps": 500_000, "optimizer": "adam", "learning_rate": 0.02, "sigma": 0.03},
    "Swimmer-v5": {**_SHARED, "env_steps": 300_000, "observation_norm": False},
}
_BOTH = {"horizon": 100, "shaping": "differences", "score_every": 50}
METHODS: Changes = {
    "whole episodes, ranks": {},
    "differences": {"shaping": "differences"},
    "growing cap": {"episode_cap": 200, "episode_cap_until": 1.0},
    "ClipUp": {
        **{"optimizer": "clipup", "learning_rate": 0.0075, "learning_rate_final": None, "momentum": 0.9},
        **{"sigma": 0.02, "sigma_final": None, "squash": "clip"},
    },
    "horizon 100": {"horizon": 100, "score_every": 50},
    "horizon 100, differences": _BOTH,
    "horizon 100, differences, weight decay 0.1": {**_BOTH, "weight_decay": 0.1},
    "horizon 100, differences, 3 starts": {**_BOTH, "starts": 3, "start_fraction": 0.1},
}


def main() -> None:
    """Run the comparison, and write the table and the figure."""
    out = compare(__doc__, TASKS, METHODS)
    report.write_table(out, table(out))
    plot_comparison(out, TASKS, METHODS)


def table(out: Path) -> str:
    """Final scores in the real environment, and their paired differences to the first method, in Markdown."""
    scores = {name: own.set_index("seed")["mean_return"] for name, own in report.groups(_runs(out), "name")}
    rows = []
    for env_id, task in TASKS.items():
        plain = scores.get(f"{env_id}: {next(iter(METHODS))}")
        for method in METHODS:
            own = scores.get(f"{env_id}: {method}")
            if own is None or plain is None:
                continue
            mean, error = report.mean_and_error((own - plain).dropna())
            rows.append(
                (
                    f"{env_id} ({task['env_steps'] / 1e6:g}M)",
                    method,
                    f"**{median(own):,.0f}**",
                    listed(sorted(own)),
                    "" if own is plain else f"{mean:+,.0f} ± {error:,.0f}",
                )
            )
    return report.markdown(
        "environment (env steps) | method | median seed | seeds, worst to best | paired difference", rows
    )


def _runs(out: Path) -> report.Frame:
    return report.read_csv(out / "runs.csv")


if __name__ == "__main__":
    report.run_script(main)
