"""Environment steps per second of other evolution-strategies engines, beside ours, on this machine's CPU.

python scripts/speed/peers.py --out results/peers_<hardware>_<yyyy-mm> --venv /tmp/peers
python scripts/speed/peers.py --out ... --render        # only table.md

Installs the peers in an environment of their own (the folder of ``--venv``, created when it does not exist; about 1.5 GB) and
drives them only through their public interfaces, each in the fastest setup that we know (``_peer_measure.py``): EvoTorch's
vectorized problem with one actor for each core, ARS of sb3-contrib with its asynchronous evaluation (64 candidates), evosax with
gymnax compiled by JAX (CartPole only: it has no MuJoCo). Every measurement is a process of its own; they take turns, round by
round. Policies stay untrained and all counts are live steps. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from es_flipout.errors import UserError
from scripts import report
from scripts.peer_environment import installed

TORCH = "torch==2.13.0"
# gymnax needs six
PEERS = ("evotorch==0.6.1", "sb3-contrib>=2.9,<3", "evosax>=0.3,<0.4", "gymnax", "six", "gymnasium[mujoco]")
OURS = ("es_flipout", "es_flipout_classic_ray")
EVOSAX_POPULATIONS = (256, 4096)
LABELS = {
    "es_flipout": "**es_flipout**",
    "es_flipout_classic_ray": "es_flipout, classic Ray workers",
    "evotorch": "EvoTorch, VecGymNE",
    "ars_linear": "sb3-contrib ARS, linear policy",
    "ars_mlp": "sb3-contrib ARS",
    "evosax": "evosax, gymnax",
}


def main() -> None:
    """Install, measure, and write the table.

    Raises:
        UserError: an engine is unknown, or there is no environment for the peers.
    """
    parser = report.script_parser(__doc__)
    parser.add_argument("--venv", type=Path, help="folder of the peers' environment")
    parser.add_argument("--env-ids", nargs="+", default=["HalfCheetah-v5", "Hopper-v5", "CartPole-v1"])
    parser.add_argument("--engines", nargs="+", choices=LABELS, default=list(LABELS))
    parser.add_argument("--population-size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of one measurement, at least")
    parser.add_argument("--cores", type=int, default=report.usable_cores())
    options = report.parse(parser)
    if not options.render:
        if options.venv is None:
            raise UserError("give the folder of the peers' environment with --venv")
        python = installed(options.venv, TORCH, PEERS)
        report.begin(options.out, report.config_of(options, "venv") | {"peers": [TORCH, *PEERS]}, fresh=True)
        measure(options, python)
    report.write_table(options.out, table(options.out))


def measure(options: argparse.Namespace, peers_python: Path) -> None:
    """All measurements, round by round."""
    versions: dict[str, dict[str, str]] = {}
    for number in range(options.rounds):
        for env_id in options.env_ids:
            for engine in options.engines:
                for population in populations(env_id, engine, options):
                    python = sys.executable if engine in OURS else str(peers_python)
                    counts = measured(python, engine, env_id, population, options.seconds, options.cores)
                    versions["es_flipout" if engine in OURS else "peers"] = counts["versions"]
                    seconds, computed = counts["seconds"], counts.get("computed_steps")
                    row = {
                        "env_id": env_id,
                        "engine": engine,
                        "population": population,
                        "round": number,
                        "env_steps": counts["env_steps"],
                        "seconds": seconds,
                        "steps_per_s": round(counts["env_steps"] / seconds, 1),
                        "computed_steps_per_s": None if computed is None else round(computed / seconds, 1),
                        "generations": counts["generations"],
                    }
                    report.append_csv(options.out / "runs.csv", [row])
                    print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    report.write_json(options.out / "versions.json", versions)


def populations(env_id: str, engine: str, options: argparse.Namespace) -> list[int]:
    """Population sizes of an engine: where evosax is measured, ours also has its sizes."""
    with_evosax = env_id == "CartPole-v1" and "evosax" in options.engines
    if engine == "evosax":
        return list(EVOSAX_POPULATIONS) if with_evosax else []
    more = EVOSAX_POPULATIONS if with_evosax and engine == "es_flipout" else ()
    return sorted({options.population_size, *more})


def measured(python: str, engine: str, env_id: str, population: int, seconds: float, cores: int) -> dict[str, Any]:
    """One measurement in a process of its own."""
    script = Path(__file__).with_name("_peer_measure.py")
    command = [python, str(script), engine, env_id, str(population), str(seconds), str(cores)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    if python != sys.executable:
        environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise UserError(f"{engine} on {env_id} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(out: Path) -> str:
    """Medians (least to most) and the ratio of ours, round by round, in Markdown."""
    runs, config = report.read_csv(out / "runs.csv"), report.read_json(out / "config.json")
    found = {
        key: own.set_index("round")["steps_per_s"] for key, own in report.groups(runs, "env_id", "engine", "population")
    }
    rows = []
    for (env_id, engine, population), rates in found.items():
        usual = found.get((env_id, "es_flipout", config["population_size"]))
        ours = found.get((env_id, "es_flipout", population), usual)
        ratio = "" if engine == "es_flipout" or ours is None else report.spread((ours / rates).dropna(), ",.2f")
        rows.append((env_id, LABELS[engine], f"{population:,}", report.spread(rates, ",.0f"), ratio))
    text = (
        f"Live environment steps per second on {config['cores']} cores, training generations with an untrained 64-64 policy"
        " (linear where it says so): median of the rounds (least to most).\n\n"
    )
    text += report.markdown("environment | engine | population | env steps/s | es_flipout ÷ it", rows)
    computed = runs.dropna(subset="computed_steps_per_s")
    if len(computed):
        text += "\nevosax goes on computing after an episode has ended. Steps with those, per second:\n\n"
    for (env_id, population), own in report.groups(computed, "env_id", "population"):
        text += f"- {env_id}, population {population:,}: {report.spread(own['computed_steps_per_s'], ',.0f')}\n"
    return text


if __name__ == "__main__":
    report.run_script(main)
