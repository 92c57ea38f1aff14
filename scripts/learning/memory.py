"""Train policies with and without memory on tasks whose velocities are hidden.

python scripts/learning/memory.py --out results/memory_<hardware>_<yyyy-mm>
python scripts/learning/memory.py --out ... --render       # only table.md and figure.png

Everything but the policy and what it observes comes from the environment's preset. Scored in 100 episodes of the real Gymnasium
environment, whose velocities are hidden by ``es_flipout.envs.SelectObservation``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[2]))

from scripts import report
from scripts.learning._runs import Changes, compare, final_scores, listed, plot_comparison

TASKS: Changes = {"CartPole-v1": {"observed": (0, 2), "env_steps": 600_000}}  # observed are the positions
POLICIES: Changes = {
    "MLP": {},
    "GRU": {"policy": "recurrent", "cell": "gru", "hidden": (16,), "output_gain": 1.0},
    "LSTM": {"policy": "recurrent", "cell": "lstm", "hidden": (16,), "output_gain": 1.0},
}


def main() -> None:
    """Run the comparison, and write the table and the figure."""
    out = compare(__doc__, TASKS, POLICIES)
    report.write_table(out, table(out))
    plot_comparison(out, TASKS, POLICIES, title="{}, velocities hidden")


def table(out: Path) -> str:
    """Final scores in the real environment, in Markdown."""
    finished = final_scores(out)
    rows = [
        (env_id, name, f"**{median(scores):,.1f}**", listed(scores), f"{task['env_steps'] / 1e6:g}M")
        for env_id, task in TASKS.items()
        for name in POLICIES
        if (scores := finished.get(f"{env_id}: {name}"))
    ]
    header = "environment, positions only | policy | median seed | seeds, worst to best | env steps"
    return report.markdown(header, rows)


if __name__ == "__main__":
    report.run_script(main)
