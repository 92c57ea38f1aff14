"""Perturbation families compared at equal environment steps: five seeds on Pendulum, Swimmer and HalfCheetah.

python scripts/families.py --out results/families_<hardware>_<yyyy-mm>
python scripts/families.py --out ... --render       # only table.md and figure.png again

Everything but the family comes from the environment's preset; the budgets are shorter than the presets'.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from _runs import Job, default_processes, one_thread, read_csv, run_all

from es_flipout.presets import preset

BUDGETS = {"Pendulum-v1": 1_500_000, "Swimmer-v5": 1_500_000, "HalfCheetah-v5": 3_000_000}
FAMILIES: dict[str, dict[str, object]] = {
    "flipout rademacher": {"perturbation": "flipout", "base": "rademacher", "bases": 1},
    "flipout gaussian M=1": {"perturbation": "flipout", "base": "gaussian", "bases": 1},
    "flipout gaussian M=8": {"perturbation": "flipout", "base": "gaussian", "bases": 8},
    "low rank 1": {"perturbation": "low_rank", "rank": 1},
    "dense": {"perturbation": "dense"},
}


def main() -> None:
    """Run the comparison and write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--envs", nargs="+", default=list(BUDGETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--processes", type=int, default=default_processes())
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    if not options.render:
        jobs = [
            Job(f"{env_id}: {family}", one_thread(preset(env_id), seed=seed, env_steps=BUDGETS[env_id], **changes))
            for seed in options.seeds
            for env_id in options.envs
            for family, changes in FAMILIES.items()
        ]
        run_all(jobs, options.out, options.processes)
    (options.out / "table.md").write_text(table(options.out))
    figure(options.out)


def table(out: Path) -> str:
    """Final scores in the real environment, in Markdown."""
    lines = [
        "| environment (env steps) | family | median seed | mean ± standard error | seeds, worst to best |",
        "|---|---|---|---|---|",
    ]
    rows = read_csv(out / "runs.csv")
    for env_id, budget in BUDGETS.items():
        for family in FAMILIES:
            scores = sorted(float(row["mean_return"]) for row in rows if row["name"] == f"{env_id}: {family}")
            if not scores:
                continue
            error = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else float("nan")
            seeds = ", ".join(f"{score:,.0f}" for score in scores)
            lines.append(
                f"| {env_id} ({budget / 1e6:g}M) | {family} | **{statistics.median(scores):,.1f}** | "
                f"{statistics.mean(scores):,.1f} ± {error:,.1f} | {seeds} |"
            )
    return "\n".join(lines) + "\n"


def figure(out: Path) -> None:
    """Median score of the mean policy over the seeds, with the range between the second worst and second best."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    curves = read_csv(out / "curves.csv")
    envs = [env_id for env_id in BUDGETS if any(row["env_id"] == env_id for row in curves)]
    fig, axes = plt.subplots(1, len(envs), figsize=(4.5 * len(envs), 3.6), squeeze=False)
    for axis, env_id in zip(axes.flat, envs, strict=True):
        for color, family in enumerate(FAMILIES):
            own = [row for row in curves if row["name"] == f"{env_id}: {family}"]
            lines = []
            for seed in sorted({row["seed"] for row in own}):
                points = [(float(r["env_steps"]) / 1e6, float(r["score"])) for r in own if r["seed"] == seed]
                lines.append(np.array(points).T)
            if not lines:
                continue
            grid = np.linspace(max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines), 200)
            scores = np.sort([np.interp(grid, x, y) for x, y in lines], axis=0)
            axis.plot(grid, np.median(scores, axis=0), color=f"C{color}", label=family)
            if len(lines) >= 4:
                axis.fill_between(grid, scores[1], scores[-2], color=f"C{color}", alpha=0.12, linewidth=0)
        axis.set_title(env_id, fontsize=10)
        axis.set_xlabel("million env steps")
    axes.flat[0].set_ylabel("score of the mean policy")
    axes.flat[-1].legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(out / "figure.png", dpi=110)


if __name__ == "__main__":
    main()
