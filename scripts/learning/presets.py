"""Train every tuned preset with several seeds, and score it in 100 episodes of the real Gymnasium environment.

python scripts/learning/presets.py --out results/learning_<hardware>_<yyyy-mm>
python scripts/learning/presets.py --out ... --envs HalfCheetah-v5 --seeds 0 1     # part of it; finished runs are kept
python scripts/learning/presets.py --out ... --envs Ant-v5 --env-steps 3000000     # shorter than the preset; the table says so
python scripts/learning/presets.py --out ... --render                              # only table.md and figure.png
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

from scripts import report
from scripts.learning._runs import final_scores, job, listed, read_curves, sweep, sweep_parser


class Target(NamedTuple):
    """What a preset shall reach: median and worst seed; and the mark of others that it is held against."""

    median: float | None
    worst: float | None
    mark: str = ""


TASKS = {
    "CartPole-v1": Target(500, 500, "rl-zoo ARS 500 @ 50k"),
    "Pendulum-v1": Target(-150, -170, "rl-zoo ARS -212 @ 2M"),
    "Acrobot-v1": Target(-75, -85, "rl-zoo ARS -83 @ 500k"),
    "MountainCar-v0": Target(None, None),
    "MountainCarContinuous-v0": Target(90, 90),
    "InvertedPendulum-v5": Target(1000, 1000, "OpenAI ES 1000 @ 0.46M"),
    "InvertedDoublePendulum-v5": Target(9350, 9300, "OpenAI ES 9104 @ 5.4M"),
    "Reacher-v5": Target(None, None),
    "Pusher-v5": Target(None, None),
    "Swimmer-v5": Target(360, 350, "rl-zoo ARS 355 @ 2M"),
    "Hopper-v5": Target(3600, 3200, "rl-zoo ARS 3344 @ 7M"),
    "HalfCheetah-v5": Target(7000, 6000, "PPO 6241 @ 10M, rl-zoo ARS 4815 @ 12M"),
    "Walker2d-v5": Target(6000, 5000, "PGPE 5232 @ 37M, PPO 4379 @ 10M, rl-zoo ARS 2994 @ 75M"),
    "Ant-v5": Target(4800, 3000, "an ARS agent 4763, PPO 2138 @ 10M"),
    "Humanoid-v5": Target(6000, 5000, "PGPE 10184 @ 150M, APPO 5439"),
    "HumanoidStandup-v5": Target(None, None),
    # rl-zoo's benchmark.md has no ARS for these two; ARS on LunarLanderContinuous-v2: 168 @ 2M.
    "LunarLander-v3": Target(None, None, "rl-zoo PPO 242 @ 1M (v2)"),
    "BipedalWalker-v3": Target(None, None, "rl-zoo PPO 213 @ 5M, TQC 330 @ 0.5M"),
}

FRONT = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Swimmer-v5")


def main() -> None:
    """Run the sweep, and write the table and the figure."""
    parser = sweep_parser(__doc__, TASKS)
    parser.add_argument("--env-steps", type=int, help="environment steps of a run (default: those of the preset)")
    options = report.parse(parser)
    if not options.render:
        changes = {} if options.env_steps is None else {"env_steps": options.env_steps}
        jobs = [job(env_id, env_id, seed, **changes) for env_id in options.envs for seed in options.seeds]
        sweep(jobs, options.out, options.processes)
    report.write_table(options.out, table(options.out))
    (options.out / "front.md").write_text(front(options.out), encoding="utf-8")
    plot(options.out)


def table(out: Path) -> str:
    """The learning table in Markdown."""
    runs, finished = report.read_csv(out / "runs.csv"), final_scores(out)
    middle = runs.groupby("name")[["env_steps", "last_return"]].median()
    fastest = runs.groupby("name")["train_s"].min()  # the others shared a core, or were paused
    rows = []
    for env_id, target in TASKS.items():
        if scores := finished.get(env_id):
            own = middle.loc[env_id]
            rows.append(
                (
                    env_id,
                    _against(median(scores), target.median),
                    listed(scores),
                    f"{own['last_return']:,.1f}",
                    f"{own['env_steps'] / 1e6:.2f}M",
                    f"{fastest[env_id] / 60:.1f} min",
                    _shown(target),
                    target.mark,
                )
            )
    header = (
        "environment | median seed | seeds, worst to best | median, last policy | env steps | wall time, fastest seed"
    )
    return report.markdown(f"{header} | target | others", rows)


def front(out: Path) -> str:
    """A few rows for the README."""
    finished, steps = final_scores(out), report.read_csv(out / "runs.csv").groupby("name")["env_steps"].median()
    rows = [
        (name, f"**{median(scores):,.0f}**", listed(scores), f"{steps[name] / 1e6:.1f}M", TASKS[name].mark)
        for name in FRONT
        if (scores := finished.get(name))
    ]
    return report.markdown("environment | median seed | seeds, worst to best | env steps | others", rows)


def _against(score: float, target: float | None) -> str:
    return f"**{score:,.1f}**" + ("" if target is None or score >= target else " (short)")


def _shown(target: Target) -> str:
    return "" if target.median is None else f"{target.median:,.0f} (worst {target.worst:,.0f})"


def plot(out: Path) -> None:
    """Score of the mean policy against environment steps, with the target dashed."""
    curves = read_curves(out)
    tasks = [env_id for env_id in TASKS if env_id in set(curves["name"])]
    figure, axes = report.panels(len(tasks), 3.2, 2.4, columns=4)
    for axis, env_id in zip(axes, tasks, strict=True):
        report.plot_seeds(axis, curves[curves["name"] == env_id], "million_steps", "score", "tab:blue")
        if (target := TASKS[env_id].median) is not None:
            axis.axhline(target, color="black", linestyle="--", linewidth=0.8)
        axis.set_title(env_id, fontsize=10)
        axis.set_xlabel("million env steps", fontsize=8)
        axis.tick_params(labelsize=8)
    report.save(figure, out)


if __name__ == "__main__":
    report.run_script(main)
