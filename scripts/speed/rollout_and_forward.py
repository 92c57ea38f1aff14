"""Speed tables: ``bench rollout`` (with Gymnasium's async vectors beside it) and ``bench forward``.

python scripts/speed/rollout_and_forward.py --out results/speed_<hardware>_<yyyy-mm>
python scripts/speed/rollout_and_forward.py --out ... --render        # only table.md and sentence.md

Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from rich.console import Console

from es_flipout.bench import forward, rollout
from scripts import report


def main() -> None:
    """Measure, and write ``rollout.json``, ``forward.json``, ``environment.json``, ``table.md`` and ``sentence.md``."""
    parser = report.script_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of one rollout measurement")
    parser.add_argument("--env-ids", nargs="+", default=["HalfCheetah-v5", "Humanoid-v5"])
    parser.add_argument("--populations", nargs="+", type=int, default=[128, 256, 512])
    options = report.parse(parser)
    if not options.render:
        measure(options)
    trained, inferred = (report.read_json(options.out / f"{name}.json") for name in ("rollout", "forward"))
    report.write_table(options.out, rollout_table(trained["results"]) + "\n" + forward_tables(inferred["results"]))
    (options.out / "sentence.md").write_text(sentence(trained), encoding="utf-8")


def measure(options: argparse.Namespace) -> None:
    """Run both benchmarks."""
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    training = rollout.RolloutBench(
        env_ids=tuple(options.env_ids),
        populations=tuple(options.populations),
        rounds=options.rounds,
        seconds=options.seconds,
        preset=True,
        gymnasium=True,
        json=out / "rollout.json",
    )
    rollout.run(training, console)
    forward.run(forward.ForwardBench(rounds=options.rounds, json=out / "forward.json"), console)
    report.write_environment(out)


def rollout_table(results: dict[str, Any]) -> str:
    """Training against bare physics and Gymnasium's async vectors, in Markdown."""
    rows = []
    for point in results["rollout"]:
        rates = [f"{point['steps_per_s'][name]['median']:,.0f}" for name in ("physics", "training")]
        ratios = [
            report.spread(point["training_to"].get(name), ".3f")
            for name in ("physics", "physics_and_forces", "gymnasium")
        ]
        rows.append((point["env_id"], rollout.population_name(point), *rates, *ratios))
    return report.markdown(
        "environment | population | bare physics, env steps/s | training, env steps/s | training ÷ physics | "
        "training ÷ physics with contact forces | training ÷ gymnasium async",
        rows,
    )


def forward_tables(results: dict[str, Any]) -> str:
    """Population forward as a fraction of plain inference, and the memory of 65,536 members, in Markdown."""
    points = results["forward"]
    families = list(dict.fromkeys(name for point in points for name in (*point["ratio"], *point["left_out_bytes"])))
    rows = [
        (point["width"], f"{point['population']:,}", *(_ratio_or_need(point, family) for family in families))
        for point in points
    ]
    notes = {"dense": " (computed, not allocated)"}
    memory = [
        (row["family"], f"{row['population_bytes'] / 1e6:,.0f} MB{notes.get(row['family'], '')}")
        for row in results["memory"]
    ]
    return (
        "Plain inference of the unperturbed network ÷ time of the population forward, one thread (median, least to most):\n\n"
        + report.markdown(" | ".join(("hidden width", "members", *families)), rows)
        + "\nMemory of the perturbations of a Humanoid policy (348-256-256-17):\n\n"
        + report.markdown("family | 65,536 members", memory)
    )


def _ratio_or_need(point: dict[str, Any], family: str) -> str:
    if family in point["ratio"]:
        return report.spread(point["ratio"][family], ".2f")
    return f"needs {point['left_out_bytes'][family] / 2**30:.0f} GiB"


def sentence(trained: dict[str, Any]) -> str:
    """The first thing that the README says about speed: HalfCheetah at the largest population measured."""
    hardware = trained["environment"]["hardware"]
    point = [p for p in trained["results"]["rollout"] if p["env_id"] == "HalfCheetah-v5"][-1]
    ratios = point["training_to"]
    return (
        f"On {hardware['cores']} cores of an {hardware['cpu']}, HalfCheetah-v5 trains at "
        f"**{point['steps_per_s']['training']['median']:,.0f} environment steps per second** with "
        f"{point['population']} members: {ratios['physics']['median']:.2f} of what bare MuJoCo does with the same threads, "
        f"and {ratios['gymnasium']['median']:.1f} times what Gymnasium's asynchronous vector environment gives with the "
        "same network.\n"
    )


if __name__ == "__main__":
    report.run_script(main)
