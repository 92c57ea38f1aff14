"""Environment steps per second of other evolution-strategies engines, beside ours, on this machine's CPU.

python scripts/peers.py --out results/peers_<hardware>_<yyyy-mm> --venv /tmp/peers
python scripts/peers.py --out ... --render        # only table.md again

Installs the peers in an environment of their own (the folder of ``--venv``, made when it is not there; about 1.5 GB) and drives
them through their public interfaces only, each in its fastest arrangement that we know of (``_peer_measure.py``): EvoTorch's
vectorised problem with one actor for each core, ARS of sb3-contrib with its asynchronous evaluation (64 candidates), evosax with
gymnax compiled by JAX (CartPole only: it has no MuJoCo). Every measurement is a process of its own; they take turns, round by
round. Policies stay untrained and all counts are live steps. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

from _runs import append_csv, default_processes, read_csv, run_script, write_environment

from es_flipout.bench.timing import Spread
from es_flipout.errors import UserError

TORCH = "torch==2.13.0"
PEERS = (
    "evotorch==0.6.1",
    "sb3-contrib>=2.9,<3",
    "evosax>=0.3,<0.4",
    "gymnax",
    "six",
    "gymnasium[mujoco]",
)  # gymnax needs six
COLUMNS = (
    "env_id",
    "engine",
    "population",
    "round",
    "env_steps",
    "seconds",
    "steps_per_s",
    "computed_steps_per_s",
    "generations",
)
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
    """Install, measure and write ``config.json``, ``environment.json``, ``versions.json``, ``runs.csv`` and ``table.md``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--venv", type=Path, help="folder of the peers' environment")
    parser.add_argument("--env-ids", nargs="+", default=["HalfCheetah-v5", "Hopper-v5", "CartPole-v1"])
    parser.add_argument("--engines", nargs="+", default=[*OURS, "evotorch", "ars_linear", "ars_mlp", "evosax"])
    parser.add_argument("--population-size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of one measurement, at least")
    parser.add_argument("--cores", type=int, default=default_processes())
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    out: Path = options.out
    if not options.render:
        if options.venv is None:
            raise UserError("give the folder of the peers' environment with --venv")
        unknown = set(options.engines) - set(LABELS)
        if unknown:
            raise UserError(f"engines must be among {', '.join(LABELS)}, got {', '.join(sorted(unknown))}")
        python = installed(options.venv)
        out.mkdir(parents=True, exist_ok=True)
        (out / "runs.csv").unlink(missing_ok=True)
        given = {name: str(value) if name == "venv" else value for name, value in vars(options).items()}
        kept = {name: value for name, value in given.items() if name not in ("out", "venv", "render")}
        (out / "config.json").write_text(json.dumps(kept | {"peers": [TORCH, *PEERS]}, indent=2) + "\n")
        write_environment(out)
        measure(options, python)
    (out / "table.md").write_text(table(out))
    print((out / "table.md").read_text())


def installed(folder: Path) -> Path:
    """The Python of the peers' environment, which is made when it is not there."""
    python = folder / "bin" / "python"
    marker = folder / "peers.json"
    if marker.exists() and json.loads(marker.read_text()) == [TORCH, *PEERS]:
        return python
    print(f"installing {', '.join(PEERS)} in {folder}", flush=True)
    venv.create(folder, with_pip=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    for wanted in (
        (TORCH,),
        (TORCH, *PEERS),
    ):  # torch comes first and alone, so that nothing brings another build of it
        if subprocess.run([*pip, *wanted], check=False).returncode:
            raise UserError(f"could not install {', '.join(wanted)}; pip says why above")
    marker.write_text(json.dumps([TORCH, *PEERS]))
    return python


def measure(options: argparse.Namespace, peers_python: Path) -> None:
    """All measurements, round by round."""
    versions: dict[str, dict[str, str]] = {}
    for number in range(options.rounds):
        for env_id in options.env_ids:
            for engine in options.engines:
                sizes = {options.population_size}
                if env_id == "CartPole-v1" and "evosax" in options.engines and engine in ("es_flipout", "evosax"):
                    sizes = set(EVOSAX_POPULATIONS) if engine == "evosax" else sizes | set(EVOSAX_POPULATIONS)
                elif engine == "evosax":
                    continue
                for population in sorted(sizes):
                    python = sys.executable if engine in OURS else str(peers_python)
                    counts = measured(python, engine, env_id, population, options.seconds, options.cores)
                    versions["es_flipout" if engine in OURS else "peers"] = counts.pop("versions")
                    computed = counts.pop("computed_steps", None)
                    row = {
                        "env_id": env_id,
                        "engine": engine,
                        "population": population,
                        "round": number,
                        **counts,
                        "steps_per_s": round(counts["env_steps"] / counts["seconds"], 1),
                        "computed_steps_per_s": None if computed is None else round(computed / counts["seconds"], 1),
                    }
                    append_csv(options.out / "runs.csv", COLUMNS, [row])
                    print(
                        f"round {number}, {env_id}, {engine} {population}: {row['steps_per_s']:,.0f} steps/s",
                        flush=True,
                    )
    (options.out / "versions.json").write_text(json.dumps(versions, indent=2, sort_keys=True) + "\n")


def measured(python: str, engine: str, env_id: str, population: int, seconds: float, cores: int) -> dict:
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
    rows = read_csv(out / "runs.csv")
    config = json.loads((out / "config.json").read_text())
    rates: dict[tuple[str, str, str], dict[str, float]] = {}
    computed: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        key = row["env_id"], row["engine"], row["population"]
        rates.setdefault(key, {})[row["round"]] = float(row["steps_per_s"])
        if row["computed_steps_per_s"]:
            computed.setdefault(key, []).append(float(row["computed_steps_per_s"]))
    lines = [
        f"Live environment steps per second on {config['cores']} cores, training generations with an untrained 64-64 policy"
        " (linear where it says so): median of the rounds (least to most).",
        "",
        "| environment | engine | population | env steps/s | es_flipout ÷ it |",
        "|---|---|---|---|---|",
    ]
    for (env_id, engine, population), by_round in rates.items():
        usual = rates.get((env_id, "es_flipout", str(config["population_size"])), {})
        own = rates.get((env_id, "es_flipout", population), usual)
        ratios = [own[number] / rate for number, rate in by_round.items() if number in own]
        cells = [env_id, LABELS[engine], f"{int(population):,}", _spread(list(by_round.values()), 0)]
        cells.append("" if engine == "es_flipout" or not ratios else _spread(ratios, 2))
        lines.append("| " + " | ".join(cells) + " |")
    if computed:
        lines += ["", "evosax goes on computing after an episode has ended. Steps with those, per second:", ""]
        lines += [
            f"- {env_id}, population {int(n):,}: {_spread(values, 0)}" for (env_id, _, n), values in computed.items()
        ]
    return "\n".join(lines) + "\n"


def _spread(values: list[float], digits: int) -> str:
    spread = Spread.of(values)
    return f"{spread.median:,.{digits}f} ({spread.min:,.{digits}f} to {spread.max:,.{digits}f})"


if __name__ == "__main__":
    run_script(main)
