"""``bench compare`` on several environments: the classic strategy on Ray against this engine.

python scripts/speed/compare.py --out results/compare_<hardware>_<yyyy-mm>
python scripts/speed/compare.py --out ... --run-dirs runs/A runs/B       # also around the mean policies of these runs
python scripts/speed/compare.py --out ... --render                       # only runs.csv and table.md

Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from rich.console import Console

from es_flipout.bench import compare
from es_flipout.bench.contenders import STAGES
from es_flipout.training.run_directory import read_config
from scripts import report


def main() -> None:
    """Measure; write a JSON and a PNG file for each comparison, and the files of every results folder."""
    parser = report.script_parser(__doc__)
    parser.add_argument("--env-ids", nargs="+", default=["HalfCheetah-v5", "Hopper-v5", "Humanoid-v5", "CartPole-v1"])
    parser.add_argument("--episode-steps", type=int, help="truncate episodes (those of HalfCheetah never end early)")
    parser.add_argument("--run-dirs", nargs="+", type=Path, default=[])
    parser.add_argument("--workers", help="numbers of classic workers, for instance 1,2")
    parser.add_argument("--devices", help="cpu,cuda")
    parser.add_argument("--population-size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="of one measurement, at least")
    parser.add_argument("--price-core-hour", type=float)
    parser.add_argument("--price-gpu-hour", type=float)
    options = report.parse(parser)
    out: Path = options.out
    if not options.render:
        measure(options)
    written = report.read_json(out / "config.json")["written"]
    results = [report.read_json(out / name)["results"]["compare"] for name in written]
    (out / "runs.csv").unlink(missing_ok=True)
    report.append_csv(out / "runs.csv", [row for each in results for row in rows(each)])
    report.write_table(out, table(results))


def measure(options: argparse.Namespace) -> None:
    """Run all comparisons."""
    names = ("workers", "devices", "population_size", "rounds", "seconds", "price_core_hour", "price_gpu_hour")
    common = {name: getattr(options, name) for name in names}
    kwargs = json.dumps({} if options.episode_steps is None else {"max_episode_steps": options.episode_steps})
    shared: dict[str, Any] = common | {"out": options.out}
    plans = [compare.CompareBench(env_id=env_id, env_kwargs=kwargs, **shared) for env_id in options.env_ids]
    plans += [
        compare.CompareBench(env_id=read_config(run_dir).task.env_id, run_dir=run_dir, **shared)
        for run_dir in options.run_dirs
    ]
    written = [plan.file_name() for plan in plans]
    report.begin(options.out, common | {"episode_steps": options.episode_steps, "written": written}, fresh=True)
    for plan in plans:
        compare.run(plan, Console())


def rows(results: dict[str, Any]) -> report.Rows:
    """One row for every measurement."""
    return [
        {
            "env_id": results["env_id"],
            "mean_policy": results["mean_policy"],
            "contender": name,
            "cores": point["cores"],
            "round": number,
            "steps_per_s": round(rate, 1),
        }
        for name, point in results["contenders"].items()
        for number, rate in enumerate(point["steps_per_s_by_round"])
    ]


def table(results: list[dict[str, Any]]) -> str:
    """Everything in Markdown."""
    cells, notes = [], []
    for each in results:
        largest = f"classic_{max(each['scaling']['workers'])}"
        for name, point in each["contenders"].items():
            who = (each["env_id"], f"{each['mean_policy']}, {point['mean_length']:.0f}", name, point["cores"])
            equal = each["equivalent_cores"].get(name, {"linear": None, "extrapolated": False, "to_classic": {}})
            rates = (
                report.spread(point["steps_per_s"], ",.0f"),
                report.spread(equal["linear"], ",.1f") + " *" * equal["extrapolated"],
                report.spread(equal["to_classic"].get(largest), ",.2f"),
                report.spread(point["dollars_per_1e9"], ",.2f"),
            )
            cells.append(
                (*who, *rates, *("" if (s := point["split"][part]) is None else f"{s:.3f}" for part in STAGES))
            )
        notes += [f"- {each['env_id']}: {sentence}" for sentence in (*each["warnings"], *each["sentences"])]
    header = "environment | mean policy, mean length | who | cores | env steps/s | classic cores | "
    header += "engine ÷ classic on all cores | $ per 10⁹ steps | physics | policy | communication | update"
    return (
        "Live environment steps per second of training generations, median of the rounds (least to most); fractions of the\n"
        "time of one more generation. The same policy network, population and environment for all; an episode ends when it "
        "ends.\n\n"
        + report.markdown(header, cells)
        + "\n\\* extrapolated beyond the workers that were measured.\n\n"
        + "\n".join(notes)
        + "\n"
    )


if __name__ == "__main__":
    report.run_script(main)
