"""Hidden velocities: the same tasks with positions only, for a policy without memory and for one with it.

python scripts/memory.py --out results/memory_<hardware>_<yyyy-mm>
python scripts/memory.py --out ... --render       # only table.md and figure.png again

Everything but the policy and what it sees comes from the environment's preset. Scored in 100 episodes of the real Gymnasium
environment, whose velocities are hidden by ``es_flipout.envs.SelectObservation``.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from _runs import Job, default_processes, one_thread, read_csv, run_all

from es_flipout.presets import preset

# Environment, the entries that are positions, and the environment steps.
TASKS: dict[str, tuple[tuple[int, ...], int]] = {
    "CartPole-v1": ((0, 2), 600_000),
}
POLICIES: dict[str, dict[str, object]] = {
    "MLP": {},
    "GRU": {"policy": "recurrent", "cell": "gru", "hidden": (16,), "output_gain": 1.0},
    "LSTM": {"policy": "recurrent", "cell": "lstm", "hidden": (16,), "output_gain": 1.0},
}


def main() -> None:
    """Run the comparison and write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--processes", type=int, default=default_processes())
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    if not options.render:
        jobs = [
            Job(
                f"{env_id}: {name}",
                one_thread(preset(env_id), seed=seed, observed=observed, env_steps=steps, **changes),
            )
            for seed in options.seeds
            for env_id, (observed, steps) in TASKS.items()
            for name, changes in POLICIES.items()
        ]
        run_all(jobs, options.out, options.processes)
    (options.out / "table.md").write_text(table(options.out))
    figure(options.out)


def table(out: Path) -> str:
    """Final scores in the real environment, in Markdown."""
    lines = [
        "| environment, positions only | policy | median seed | seeds, worst to best | env steps |",
        "|---|---|---|---|---|",
    ]
    rows = read_csv(out / "runs.csv")
    for env_id, (_, steps) in TASKS.items():
        for name in POLICIES:
            scores = sorted(float(row["mean_return"]) for row in rows if row["name"] == f"{env_id}: {name}")
            if scores:
                seeds = ", ".join(f"{score:,.0f}" for score in scores)
                lines.append(
                    f"| {env_id} | {name} | **{statistics.median(scores):,.1f}** | {seeds} | {steps / 1e6:g}M |"
                )
    return "\n".join(lines) + "\n"


def figure(out: Path) -> None:
    """Score of the mean policy against environment steps, every seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = read_csv(out / "curves.csv")
    fig, axes = plt.subplots(1, len(TASKS), figsize=(4.5 * len(TASKS), 3.4), squeeze=False)
    for axis, env_id in zip(axes.flat, TASKS, strict=True):
        for color, name in enumerate(POLICIES):
            own = [row for row in curves if row["name"] == f"{env_id}: {name}"]
            for number, seed in enumerate(sorted({row["seed"] for row in own})):
                points = [(float(r["env_steps"]) / 1e6, float(r["score"])) for r in own if r["seed"] == seed]
                axis.plot(*zip(*points, strict=True), color=f"C{color}", alpha=0.6, label=None if number else name)
        axis.set_title(f"{env_id}, velocities hidden", fontsize=10)
        axis.set_xlabel("million env steps")
    axes.flat[0].set_ylabel("score of the mean policy")
    axes.flat[0].legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(out / "figure.png", dpi=110)


if __name__ == "__main__":
    main()
