"""Train every tuned preset with five seeds, and score it in 100 episodes of the real Gymnasium environment.

python scripts/learning/presets.py --out results/learning_<hardware>_<yyyy-mm>
python scripts/learning/presets.py --out ... --envs HalfCheetah-v5 --seeds 0 1     # part of it; finished runs are kept
python scripts/learning/presets.py --out ... --adopt results/families_...          # take equal runs from there
python scripts/learning/presets.py --out ... --render                              # only table.md and figure.png
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[2]))

from scripts import report
from scripts.learning._runs import adopt, final_scores, job, listed, read_curves, sweep, sweep_parser

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
    """Run the sweep, and write the table and the figure."""
    parser = sweep_parser(__doc__, TASKS)
    parser.add_argument("--adopt", type=Path, help="folder of another sweep, whose equal runs need no repetition")
    options = report.parse(parser)
    if not options.render:
        jobs = [job(env_id, env_id, seed) for env_id in options.envs for seed in options.seeds]
        if options.adopt:
            options.out.mkdir(parents=True, exist_ok=True)
            adopt(jobs, options.adopt, options.out)
        sweep(jobs, options.out, options.processes)
    report.write_table(options.out, table(options.out))
    plot(options.out)


def table(out: Path) -> str:
    """The learning table in Markdown."""
    finished, steps = final_scores(out), report.read_csv(out / "runs.csv").groupby("name")["env_steps"].median()
    rows = []
    for env_id, (target, published) in TASKS.items():
        if scores := finished.get(env_id):
            middle = f"**{median(scores):,.1f}**" + ("" if median(scores) >= target else " (short)")
            rows.append((env_id, f"{target:,.0f}", middle, listed(scores), f"{steps[env_id] / 1e6:.2f}M", published))
    header = "environment | target | median seed | seeds, worst to best | env steps | best published ARS (rl-zoo)"
    return report.markdown(header, rows)


def plot(out: Path) -> None:
    """Score of the mean policy against environment steps, with the target dashed."""
    curves = read_curves(out)
    tasks = [env_id for env_id in TASKS if env_id in set(curves["name"])]
    figure, axes = report.panels(len(tasks), 4, 3, columns=3)
    for axis, env_id in zip(axes, tasks, strict=True):
        report.plot_seeds(axis, curves[curves["name"] == env_id], "million_steps", "score", "tab:blue")
        axis.axhline(TASKS[env_id][0], color="black", linestyle="--", linewidth=0.8)
        axis.set_title(env_id, fontsize=10)
        axis.set_xlabel("million env steps", fontsize=8)
        axis.tick_params(labelsize=8)
    report.save(figure, out)


if __name__ == "__main__":
    report.run_script(main)
