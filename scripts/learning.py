"""Learning table: every tuned preset, five seeds, scored in 100 episodes of the real Gymnasium environment.

python scripts/learning.py --out results/learning_<hardware>_<yyyy-mm>
python scripts/learning.py --out ... --envs HalfCheetah-v5 --seeds 0 1     # part of it; what is there is kept
python scripts/learning.py --out ... --adopt results/families_...          # equal runs are taken from there
python scripts/learning.py --out ... --render                              # only table.md and figure.png again
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from _runs import Job, adopt, default_processes, one_thread, read_csv, run_all

from es_flipout.presets import preset

# Target (median seed), and the best published ARS table: rl-baselines3-zoo, benchmark.md.
TASKS: dict[str, tuple[float, str]] = {
    "CartPole-v1": (500, "500 @ 50k"),
    "Pendulum-v1": (-180, "-212 @ 2M"),
    "Acrobot-v1": (-85, "-83 @ 500k"),
    "MountainCarContinuous-v0": (90, ""),
    "InvertedPendulum-v5": (1000, "OpenAI ES: 1000 @ 0.46M"),
    "InvertedDoublePendulum-v5": (9000, "OpenAI ES: 9104 @ 5.4M"),
    "Swimmer-v5": (340, "355 @ 2M"),
    "HalfCheetah-v5": (4900, "4815 (sd 1341) @ 12M"),
    "Hopper-v5": (3000, "3344 @ 7M"),
}


def main() -> None:
    """Run the sweep and write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--envs", nargs="+", default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--processes", type=int, default=default_processes())
    parser.add_argument("--adopt", type=Path, help="folder of another sweep, whose equal runs need no repetition")
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    if not options.render:
        jobs = [Job(e, one_thread(preset(e), seed=seed)) for e in options.envs for seed in options.seeds]
        if options.adopt:
            adopt(jobs, options.adopt, options.out)
        run_all(jobs, options.out, options.processes)
    (options.out / "table.md").write_text(table(options.out))
    figure(options.out)


def table(out: Path) -> str:
    """The learning table in Markdown."""
    lines = [
        "| environment | target | median seed | seeds, worst to best | env steps | best published ARS (rl-zoo) |",
        "|---|---|---|---|---|---|",
    ]
    rows = read_csv(out / "runs.csv")
    for env_id, (target, published) in TASKS.items():
        own = [row for row in rows if row["name"] == env_id]
        if not own:
            continue
        scores = sorted(float(row["mean_return"]) for row in own)
        median = statistics.median(scores)
        reached = "" if median >= target else " (short)"
        steps = statistics.median(float(row["env_steps"]) for row in own) / 1e6
        seeds = ", ".join(f"{score:,.0f}" for score in scores)
        lines.append(
            f"| {env_id} | {target:,.0f} | **{median:,.1f}**{reached} | {seeds} | {steps:.2f}M | {published} |"
        )
    return "\n".join(lines) + "\n"


def figure(out: Path) -> None:
    """Score of the mean policy against environment steps: every seed thin, the median thick, the target dashed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    curves = read_csv(out / "curves.csv")
    tasks = [env_id for env_id in TASKS if any(row["name"] == env_id for row in curves)]
    columns = 3
    fig, axes = plt.subplots(
        -(-len(tasks) // columns), columns, figsize=(12, 3 * -(-len(tasks) // columns)), squeeze=False
    )
    for axis in axes.flat[len(tasks) :]:
        axis.remove()
    for axis, env_id in zip(axes.flat, tasks, strict=False):
        seeds = sorted({row["seed"] for row in curves if row["name"] == env_id})
        lines = []
        for seed in seeds:
            own = [row for row in curves if row["name"] == env_id and row["seed"] == seed]
            x = np.array([float(row["env_steps"]) / 1e6 for row in own])
            y = np.array([float(row["score"]) for row in own])
            axis.plot(x, y, color="tab:blue", alpha=0.3, linewidth=0.8)
            lines.append((x, y))
        grid = np.linspace(max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines), 200)
        axis.plot(grid, np.median([np.interp(grid, x, y) for x, y in lines], axis=0), color="tab:blue", linewidth=1.8)
        axis.axhline(TASKS[env_id][0], color="black", linestyle="--", linewidth=0.8)
        axis.set_title(env_id, fontsize=10)
        axis.set_xlabel("million env steps", fontsize=8)
        axis.tick_params(labelsize=8)
    fig.tight_layout()
    fig.savefig(out / "figure.png", dpi=110)


if __name__ == "__main__":
    main()
