"""Compare perturbation families at equal environment steps: five seeds on Pendulum, Swimmer and HalfCheetah.

python scripts/learning/families.py --out results/families_<hardware>_<yyyy-mm>
python scripts/learning/families.py --out ... --render       # only table.md and figure.png

Everything but the family comes from the environment's preset; the budgets are shorter than those of the presets. The figure shows
the median score over the seeds, with the range from the second worst to the second best.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[2]))

from scripts import report
from scripts.learning._runs import Changes, compare, final_scores, listed, plot_comparison

TASKS: Changes = {
    "Pendulum-v1": {"env_steps": 1_500_000},
    "Swimmer-v5": {"env_steps": 1_500_000},
    "HalfCheetah-v5": {"env_steps": 3_000_000},
}
FAMILIES: Changes = {
    "flipout rademacher": {"perturbation": "flipout", "base": "rademacher", "bases": 1},
    "flipout gaussian M=1": {"perturbation": "flipout", "base": "gaussian", "bases": 1},
    "flipout gaussian M=8": {"perturbation": "flipout", "base": "gaussian", "bases": 8},
    "low rank 1": {"perturbation": "low_rank", "rank": 1},
    "dense": {"perturbation": "dense"},
}


def main() -> None:
    """Run the comparison, and write the table and the figure."""
    out = compare(__doc__, TASKS, FAMILIES)
    report.write_table(out, table(out))
    plot_comparison(out, TASKS, FAMILIES, band=1)


def table(out: Path) -> str:
    """Final scores in the real environment, in Markdown."""
    rows = []
    finished = final_scores(out)
    for env_id, task in TASKS.items():
        for family in FAMILIES:
            if scores := finished.get(f"{env_id}: {family}"):
                mean, error = report.mean_and_error(scores)
                environment, middle = f"{env_id} ({task['env_steps'] / 1e6:g}M)", f"**{median(scores):,.1f}**"
                rows.append((environment, family, middle, f"{mean:,.1f} ± {error:,.1f}", listed(scores)))
    header = "environment (env steps) | family | median seed | mean ± standard error | seeds, worst to best"
    return report.markdown(header, rows)


if __name__ == "__main__":
    report.run_script(main)
