"""Speed tables: `bench rollout` (with Gymnasium's async vectors beside it) and `bench forward`, written to results/.

python scripts/speed.py --out results/speed_<hardware>_<yyyy-mm>
python scripts/speed.py --out ... --render        # only table.md again

Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def main() -> None:
    """Measure and write ``rollout.json``, ``forward.json``, ``environment.json`` and ``table.md``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of one rollout measurement")
    parser.add_argument("--env-ids", nargs="+", default=["HalfCheetah-v5", "Humanoid-v5"])
    parser.add_argument("--populations", nargs="+", type=int, default=[128, 256, 512])
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    if not options.render:
        measure(options)
    (options.out / "table.md").write_text(rollout_table(options.out) + "\n" + forward_tables(options.out))
    (options.out / "sentence.md").write_text(sentence(options.out))


def measure(options: argparse.Namespace) -> None:
    """Run both benchmarks."""
    from _runs import write_environment
    from rich.console import Console

    from es_flipout.bench import forward, rollout

    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    training = rollout.RolloutBench(
        env_ids=tuple(options.env_ids),
        populations=tuple(options.populations),
        rounds=options.rounds,
        seconds=options.seconds,
        gymnasium=True,
        json=out / "rollout.json",
    )
    rollout.run(training, console)
    forward.run(forward.ForwardBench(rounds=options.rounds, json=out / "forward.json"), console)
    write_environment(out)


def rollout_table(out: Path) -> str:
    """Training against bare physics and Gymnasium's async vectors, in Markdown."""
    if not (out / "rollout.json").exists():
        return ""
    lines = [
        "| environment | population | bare physics, env steps/s | training, env steps/s | training ÷ physics |"
        " training ÷ physics with contact forces | training ÷ gymnasium async |",
        "|---|---|---|---|---|---|---|",
    ]
    for point in json.loads((out / "rollout.json").read_text())["results"]["rollout"]:
        rates, ratios = point["steps_per_s"], point["training_to"]
        cells = [_spread(ratios[name]) for name in ("physics", "physics_and_forces", "gymnasium") if name in ratios]
        if "physics_and_forces" not in ratios:
            cells.insert(1, "")
        lines.append(
            f"| {point['env_id']} | {point['population']} | {rates['physics']['median']:,.0f} | "
            f"{rates['training']['median']:,.0f} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines) + "\n"


def forward_tables(out: Path) -> str:
    """Population forward as a fraction of plain inference, and the memory of 65,536 members, in Markdown."""
    if not (out / "forward.json").exists():
        return ""
    results = json.loads((out / "forward.json").read_text())["results"]
    points: list[dict[str, Any]] = results["forward"]
    families = list(dict.fromkeys(name for point in points for name in (*point["ratio"], *point["left_out_bytes"])))
    lines = [
        "Plain inference of the unperturbed network ÷ time of the population forward, one thread (median, least to most):",
        "",
        "| hidden width | members | " + " | ".join(families) + " |",
        "|---|---|" + "---|" * len(families),
    ]
    for point in points:
        cells = [
            _spread(point["ratio"][name], 2)
            if name in point["ratio"]
            else f"needs {point['left_out_bytes'][name] / 2**30:.0f} GiB"
            for name in families
        ]
        lines.append(f"| {point['width']} | {point['population']:,} | " + " | ".join(cells) + " |")
    lines += ["", "Memory of the perturbations of a Humanoid policy (348-256-256-17):", ""]
    lines += ["| family | 65,536 members |", "|---|---|"]
    for row in results["memory"]:
        computed = " (computed, not allocated)" if row["family"] == "dense" else ""
        lines.append(f"| {row['family']} | {row['population_bytes'] / 1e6:,.0f} MB{computed} |")
    return "\n".join(lines) + "\n"


def sentence(out: Path) -> str:
    """The first thing that the README says of speed: HalfCheetah at the largest population measured."""
    results = json.loads((out / "rollout.json").read_text())
    hardware = results["environment"]["hardware"]
    point = [p for p in results["results"]["rollout"] if p["env_id"] == "HalfCheetah-v5"][-1]
    ratios = point["training_to"]
    return (
        f"On {hardware['cores']} cores of an {hardware['cpu']}, HalfCheetah-v5 trains at "
        f"**{point['steps_per_s']['training']['median']:,.0f} environment steps per second** with "
        f"{point['population']} members: {ratios['physics']['median']:.2f} of what bare MuJoCo does with the same threads, "
        f"and {ratios['gymnasium']['median']:.1f} times what Gymnasium's asynchronous vector environment gives with the "
        "same network.\n"
    )


def _spread(spread: dict[str, float], digits: int = 3) -> str:
    return f"{spread['median']:.{digits}f} ({spread['min']:.{digits}f} to {spread['max']:.{digits}f})"


if __name__ == "__main__":
    main()
