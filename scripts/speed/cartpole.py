"""CartPole, many members around a trained policy: this engine with and without compilation, classic workers, and evosax.

python scripts/speed/cartpole.py --out results/cartpole_<hardware>_<yyyy-mm> --venv /tmp/peers
python scripts/speed/cartpole.py --out ... --render        # only table.md

Every measurement is a process of its own (``_peer_measure.py``), which first trains a policy, so that nearly all episodes have
full length, and then measures whole generations with a learning rate of practically zero. The processes take turns, round by
round. evosax and gymnax are installed in an environment of their own (the folder of ``--venv``, created when it does not exist).
Counts are live steps. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from es_flipout.errors import UserError
from scripts import report
from scripts.peer_environment import installed
from scripts.speed.peers import measured

PEERS = ("evosax>=0.3,<0.4", "gymnax", "six")  # gymnax needs six
LABELS = {
    "trained_eager": "es_flipout, `--compile off`",
    "trained_compiled": "**es_flipout, `--compile on`**",
    "trained_classic": "classic Ray workers",
    "trained_evosax": "evosax, gymnax",
}


def main() -> None:
    """Install, measure, and write the table.

    Raises:
        UserError: there is no environment for evosax.
    """
    parser = report.script_parser(__doc__)
    parser.add_argument("--venv", type=Path, help="folder of evosax's environment")
    parser.add_argument("--engines", nargs="+", choices=LABELS, default=list(LABELS))
    parser.add_argument("--cores", nargs="+", type=int, default=sorted({1, report.usable_cores()}))
    parser.add_argument("--population-size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of one measurement, at least")
    options = report.parse(parser)
    if not options.render:
        if options.venv is None:
            raise UserError("give the folder of evosax's environment with --venv")
        python = installed(options.venv, *PEERS[:1], PEERS[1:])
        report.begin(options.out, report.config_of(options, "venv") | {"peers": PEERS}, fresh=True)
        measure(options, python)
    report.write_table(options.out, table(options.out))


def measure(options: argparse.Namespace, peers_python: Path) -> None:
    """All measurements, round by round."""
    for number in range(options.rounds):
        for cores in options.cores:
            for engine in options.engines:
                python = str(peers_python) if engine == "trained_evosax" else sys.executable
                counts = measured(python, engine, "CartPole-v1", options.population_size, options.seconds, cores)
                episodes = counts["generations"] * options.population_size
                row = {
                    "cores": cores,
                    "engine": engine,
                    "round": number,
                    "steps_per_s": round(counts["env_steps"] / counts["seconds"], 1),
                    "mean_length": round(counts["env_steps"] / episodes, 1),
                    "generations": counts["generations"],
                }
                report.append_csv(options.out / "runs.csv", [row])
                print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)


def table(out: Path) -> str:
    """Medians (least to most), and the ratio of the compiled engine, round by round, in Markdown."""
    runs, config = report.read_csv(out / "runs.csv"), report.read_json(out / "config.json")
    rates = {key: own.set_index("round")["steps_per_s"] for key, own in report.groups(runs, "cores", "engine")}
    lengths = {key: own["mean_length"] for key, own in report.groups(runs, "cores", "engine")}
    rows = []
    for (cores, engine), own in rates.items():
        ours = rates.get((cores, "trained_compiled"))
        ratio = "" if engine == "trained_compiled" or ours is None else report.spread((ours / own).dropna(), ",.2f")
        shown = report.spread(own, ",.0f"), report.spread(lengths[cores, engine], ",.0f")
        rows.append((cores, LABELS[engine], *shown, ratio))
    text = (
        f"CartPole-v1, {config['population_size']} members (64-64) around a trained policy, live environment steps per second: "
        "median of the rounds (least to most).\n\n"
    )
    return text + report.markdown("cores | engine | env steps/s | mean length of an episode | compiled ÷ it", rows)


if __name__ == "__main__":
    report.run_script(main)
