"""`bench compare` on several environments, written to results/: the classic strategy on Ray against this engine.

python scripts/compare.py --out results/compare_<hardware>_<yyyy-mm>
python scripts/compare.py --out ... --run-dirs runs/A runs/B       # also around the mean policies of these runs
python scripts/compare.py --out ... --render                       # only runs.csv and table.md again

Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from _runs import append_csv, run_script, write_environment

COLUMNS = ("env_id", "mean_policy", "contender", "cores", "round", "steps_per_s")
PARTS = ("physics", "policy", "communication", "update")


def main() -> None:
    """Measure; write a JSON and a PNG for each comparison, and the files of every results folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--env-ids", nargs="+", default=["HalfCheetah-v5", "Hopper-v5", "Humanoid-v5", "CartPole-v1"])
    parser.add_argument(
        "--episode-steps", type=int, help="end episodes after so many steps (HalfCheetah's never end before)"
    )
    parser.add_argument("--run-dirs", nargs="+", type=Path, default=[])
    parser.add_argument("--workers", help="numbers of classic workers, for instance 1,2")
    parser.add_argument("--devices", help="cpu,cuda")
    parser.add_argument("--population-size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="of one measurement, at least")
    parser.add_argument("--price-core-hour", type=float)
    parser.add_argument("--price-gpu-hour", type=float)
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    out: Path = options.out
    if not options.render:
        measure(options)
    (out / "runs.csv").unlink(missing_ok=True)
    found = [json.loads((out / name).read_text()) for name in json.loads((out / "config.json").read_text())["written"]]
    results = [each["results"]["compare"] for each in found]
    append_csv(out / "runs.csv", COLUMNS, [row for each in results for row in rows(each)])
    (out / "table.md").write_text(table(results))


def measure(options: argparse.Namespace) -> None:
    """Run all comparisons."""
    from rich.console import Console

    from es_flipout.bench import compare
    from es_flipout.trainer import read_config

    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    names = ("workers", "devices", "population_size", "rounds", "seconds", "price_core_hour", "price_gpu_hour")
    common = {name: getattr(options, name) for name in names}
    kwargs = json.dumps({} if options.episode_steps is None else {"max_episode_steps": options.episode_steps})
    plans = [compare.CompareBench(env_id=env_id, env_kwargs=kwargs, out=out, **common) for env_id in options.env_ids]
    plans += [
        compare.CompareBench(env_id=read_config(run_dir).env_id, run_dir=run_dir, out=out, **common)
        for run_dir in options.run_dirs
    ]
    for plan in plans:
        compare.run(plan, Console())
    written = [plan.file_name() for plan in plans]
    (out / "config.json").write_text(
        json.dumps(common | {"episode_steps": options.episode_steps, "written": written}, indent=2) + "\n"
    )
    write_environment(out)


def rows(results: dict[str, Any]) -> list[dict[str, object]]:
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
    lines = [
        "Live environment steps per second of training generations, median of the rounds (least to most); fractions of the",
        "time of one more generation. The same policy network, population and environment for all; an episode ends when it ends.",
        "",
        "| environment | mean policy, mean length | who | cores | env steps/s | classic cores | engine ÷ classic on all cores |"
        " $ per 10⁹ steps | " + " | ".join(PARTS) + " |",
        "|---" * (8 + len(PARTS)) + "|",
    ]
    notes: list[str] = []
    for each in results:
        largest = f"classic_{max(each['scaling']['workers'])}"
        for name, point in each["contenders"].items():
            equal, price = each["equivalent_cores"].get(name), point["dollars_per_1e9"]
            cells = [
                each["env_id"],
                f"{each['mean_policy']}, {point['mean_length']:.0f}",
                name,
                str(point["cores"]),
                _spread(point["steps_per_s"], 0),
                "" if equal is None else _spread(equal["linear"], 1) + (" *" if equal["extrapolated"] else ""),
                "" if equal is None else _spread(equal["to_classic"][largest], 2),
                "" if price is None else _spread(price, 2),
                *("" if point["split"][part] is None else f"{point['split'][part]:.3f}" for part in PARTS),
            ]
            lines.append("| " + " | ".join(cells) + " |")
        notes += [f"- {each['env_id']}: {sentence}" for sentence in (*each["warnings"], *each["sentences"])]
    lines += ["", "\\* extrapolated beyond the workers that were measured.", "", *notes]
    return "\n".join(lines) + "\n"


def _spread(spread: dict[str, float], digits: int) -> str:
    return f"{spread['median']:,.{digits}f} ({spread['min']:,.{digits}f} to {spread['max']:,.{digits}f})"


if __name__ == "__main__":
    run_script(main)
