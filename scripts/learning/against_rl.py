"""Score against wall time and environment steps: this engine beside PPO, SAC and ARS, on the same cores of the same machine.

python scripts/learning/against_rl.py --out results/against_rl_<hardware>_<yyyy-mm> --venv /tmp/es_flipout_rl
python scripts/learning/against_rl.py --out ... --venv ... --envs HalfCheetah-v5 --seeds 0 1 2 --seconds 200
python scripts/learning/against_rl.py --out ... --render        # only table.md, sentence.md and figure.png

Installs stable-baselines3 and sb3-contrib in an environment of their own (the folder of ``--venv``, created when it does not
exist; about 1.5 GB, more where pip chooses a build of torch with CUDA), with the versions of torch, Gymnasium and MuJoCo that run
here, and drives them only through their public interfaces, with rl-zoo's tuned settings (``_rl_zoo.py``, ``_rl_worker.py``).

Every method runs on one core and on all of them. Runs on one core are pinned to it, and as many as there are cores run side by
side; a run on all cores has the machine to itself. "All cores" means: physics threads of this engine, candidates of ARS in a
process for each core, threads in SAC's products, and for PPO the number and kind of environments (and threads) with the most
steps per second in a trial, with as many steps per update as rl-zoo has. This engine trains its preset, with schedules that end
where the time ends. Every policy is saved at marks of wall time and played afterwards, outside the clock, deterministically, in
Gymnasium.

A line of ``rows.jsonl`` is written as soon as a policy was played; runs that are in there are not repeated, and a run that was
trained but not played to the end is only played. The policies stay in ``--snapshots``. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from es_flipout.errors import UserError
from scripts import report
from scripts.learning._rl_worker import Spec, Vector, trained
from scripts.peer_environment import installed, same

PINS = ("stable-baselines3==2.9.2", "sb3-contrib==2.9.2", same("gymnasium", "gymnasium[mujoco]"), same("mujoco"))
TASKS = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Swimmer-v5")
METHODS = {"es_flipout": "es_flipout", "ppo": "PPO", "sac": "SAC", "ars": "ARS"}
COLORS = {"es_flipout": "tab:blue", "ppo": "tab:orange", "sac": "tab:green", "ars": "tab:red"}
MARKS = (0.025, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of the seconds of a run
SHOWN_MARKS = (0.1, 0.5)  # in the table, besides the end
LEAST_STEPS = 64  # of an environment per update: PPO's advantages look as far ahead
KEY = ("env_id", "method", "cores", "seed")


@dataclass(frozen=True)
class Job:
    """One run; ``cores`` is their number."""

    env_id: str
    method: str
    cores: int
    seed: int

    @property
    def name(self) -> str:
        """The folder of its policies."""
        return f"{self.env_id}_{self.method}_{self.cores}-core_seed{self.seed}"


def main() -> None:
    """Install, run what is missing, and write the table and the figure.

    Raises:
        UserError: there is no environment for the peers, or runs have failed.
    """
    options = parse()
    if not options.render:
        if options.venv is None:
            raise UserError("give the folder of the peers' environment with --venv")
        peers = installed(options.venv, same("torch"), PINS)
        without = ("venv", "snapshots", "envs", "seeds", "methods", "cores")
        cores = sorted(os.sched_getaffinity(0))
        report.begin(options.out, report.config_of(options, *without) | {"all_cores": len(cores), "peers": PINS})
        failed = Runs(options, cores, peers).run()
        if failed:
            raise UserError(f"{len(failed)} runs failed, run the script again: {'; '.join(failed)}")
    report.write_table(options.out, table(options.out))
    (options.out / "sentence.md").write_text(sentence(options.out), encoding="utf-8")
    plot(options.out)


def parse() -> argparse.Namespace:
    """The options."""
    parser = report.script_parser(__doc__)
    parser.add_argument("--venv", type=Path, help="folder of the peers' environment")
    parser.add_argument(
        "--snapshots", type=Path, help="folder of the policies (default: runs/NAME, as --out is called)"
    )
    parser.add_argument("--envs", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--cores", nargs="+", choices=("one", "all"), default=["one", "all"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=200.0, help="of training, wall time")
    parser.add_argument("--side-by-side", type=int, default=report.usable_cores(), help="runs on one core at a time")
    parser.add_argument("--episodes", type=int, default=20, help="of an evaluation")
    parser.add_argument("--final-episodes", type=int, default=100, help="of the last evaluation")
    parser.add_argument("--trial-seconds", type=float, default=8.0, help="of a trial of PPO's environments")
    options = report.parse(parser)
    options.snapshots = options.snapshots or Path("runs") / options.out.name
    return options


def jobs(options: argparse.Namespace, env_id: str, cores: int) -> list[Job]:
    """The runs of a task on so many cores."""
    return [Job(env_id, method, cores, seed) for seed in options.seeds for method in options.methods]


def choices(cores: int, steps_per_update: int) -> Iterator[Vector]:
    """PPO's environments to choose from on several cores."""
    for kind, counts in (("dummy", (1, 4, 8)), ("subproc", (cores, 2 * cores, 4 * cores))):
        for n_envs in counts:
            if steps_per_update % n_envs == 0 and steps_per_update // n_envs >= LEAST_STEPS:
                for threads in (1, cores):
                    yield Vector(kind, n_envs, threads)


class Runs:
    """Runs what ``rows.jsonl`` does not hold yet."""

    def __init__(self, options: argparse.Namespace, cores: list[int], peers: Path) -> None:
        self.options, self.cores, self.peers = options, cores, peers
        self.rows = options.out / "rows.jsonl"
        self.writing = threading.Lock()
        self.workers: set[subprocess.Popen[str]] = set()
        self.failed: list[str] = []

    def run(self) -> list[str]:
        """Run everything; returns what failed."""
        done = {tuple(row[name] for name in KEY) for row in read_lines(self.rows) if row["final"]}
        for env_id in self.options.envs:
            for number in sorted({1 if word == "one" else len(self.cores) for word in self.options.cores}):
                todo = [job for job in jobs(self.options, env_id, number) if tuple(asdict(job).values()) not in done]
                if number == 1:
                    self.on_one_core(todo)
                else:
                    for job in todo:
                        self.attempt(job, self.cores)
        return self.failed

    def on_one_core(self, todo: list[Job]) -> None:
        """Several at a time, each on a core of its own."""
        free: queue.Queue[int] = queue.Queue()
        number = min(self.options.side_by_side, len(self.cores))
        for core in self.cores[:number]:
            free.put(core)

        def run(job: Job) -> None:
            core = free.get()
            try:
                self.attempt(job, [core])
            finally:
                free.put(core)

        with ThreadPoolExecutor(number) as pool:
            try:
                for future in as_completed([pool.submit(run, job) for job in todo]):
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for worker in self.workers.copy():
                    worker.kill()
                raise

    def attempt(self, job: Job, cores: list[int]) -> None:
        """One run; if it fails, the others go on."""
        try:
            self.one(job, cores)
        except UserError as error:
            print(error, file=sys.stderr, flush=True)
            self.failed.append(job.name)

    def one(self, job: Job, cores: list[int]) -> None:
        """One run, with the rows that it prints."""
        options, key = self.options, {name: getattr(job, name) for name in KEY}
        spec = Spec(
            method=job.method,
            env_id=job.env_id,
            seed=job.seed,
            cores=cores,
            marks=[round(options.seconds * mark, 3) for mark in MARKS],
            folder=str((options.snapshots / job.name).resolve()),
            episodes=options.episodes,
            final_episodes=options.final_episodes,
            vector=self.vector(job.env_id) if job.method == "ppo" and len(cores) > 1 else None,
        )
        with self.writing:
            before = read_lines(self.rows)
            if trained(spec):
                spec.evaluated.extend(row["mark_s"] for row in before if key.items() <= row.items())
            else:  # rows of policies that are no more
                kept = [row for row in before if not key.items() <= row.items()]
                write_lines(self.rows, kept)
        self.work(spec, self.keep)

    def keep(self, row: dict[str, Any]) -> None:
        """Append a row."""
        with self.writing, self.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)

    def vector(self, env_id: str) -> Vector:
        """PPO's environments with the most steps per second on all cores, by a trial that ``trials.jsonl`` keeps."""
        path, cores = self.options.out / "trials.jsonl", len(self.cores)
        known = {(row["env_id"], row["kind"], row["n_envs"], row["threads"]): row for row in read_lines(path)}
        for choice in choices(cores, steps_per_update(env_id)):
            if (env_id, *asdict(choice).values()) not in known:
                rates: list[float] = []
                marks, folder = [self.options.trial_seconds], str(self.options.snapshots.resolve())
                spec = Spec("ppo", env_id, 0, self.cores, marks, folder, vector=choice, trial=True)
                self.work(spec, lambda row, rates=rates: rates.append(row["steps_per_s"]))
                row = {"env_id": env_id, **asdict(choice), "steps_per_s": rates[0]}
                write_lines(path, [*read_lines(path), row])
                print(f"PPO trial: {row}", flush=True)
        return best_vector(path, env_id)

    def work(self, spec: Spec, take: Callable[[dict[str, Any]], None]) -> None:
        """A worker, whose rows are taken as they come; its other messages are kept beside its folder.

        Raises:
            UserError: it failed.
        """
        ours = spec.method == "es_flipout"
        command = [sys.executable if ours else str(self.peers), str(Path(__file__).with_name("_rl_worker.py"))]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if not ours:
            environment.pop("PYTHONPATH", None)
        messages = Path(f"{spec.folder}.log")
        messages.parent.mkdir(parents=True, exist_ok=True)
        with (
            messages.open("w", encoding="utf-8") as log,
            subprocess.Popen(
                [*command, json.dumps(asdict(spec))], stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            ) as worker,
        ):
            self.workers.add(worker)
            try:
                assert worker.stdout is not None
                for line in worker.stdout:
                    row = json.loads(line) if line.startswith("{") else {}
                    if "versions" in row:
                        self.note_versions("es_flipout" if ours else "peers", row["versions"])
                    elif row:
                        take(row)
            except BaseException:
                worker.kill()
                raise
            finally:
                self.workers.discard(worker)
        if worker.returncode:
            said = messages.read_text(encoding="utf-8").split("\n")
            last = next((line for line in reversed(said) if line.strip()), f"exit code {worker.returncode}")
            raise UserError(f"{spec.method} on {spec.env_id}, seed {spec.seed} failed: {last} (see {messages})")

    def note_versions(self, whose: str, versions: dict[str, str]) -> None:
        """Keep the versions that ran in ``versions.json``."""
        with self.writing:
            path = self.options.out / "versions.json"
            known = report.read_json(path) if path.exists() else {}
            report.write_json(path, dict(sorted({**known, whose: versions}.items())))


def steps_per_update(env_id: str) -> int:
    """Environment steps of one update of rl-zoo's PPO."""
    from scripts.learning._rl_zoo import ppo

    settings = ppo(env_id)
    return settings["n_envs"] * settings["n_steps"]


def best_vector(path: Path, env_id: str) -> Vector:
    """The fastest of the trials of a task."""
    rows = [row for row in read_lines(path) if row["env_id"] == env_id]
    best = max(rows, key=lambda row: row["steps_per_s"])
    return Vector(best["kind"], best["n_envs"], best["threads"])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file with one JSON object per line; none if there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace such a file."""
    new = path.with_name(path.name + ".new")
    new.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    new.replace(path)


# What is rendered


def read_rows(out: Path) -> report.Frame:
    """The rows of complete runs in the order of the tasks, the methods and the cores.

    Raises:
        UserError: there are none.
    """
    import pandas as pd

    rows = read_lines(out / "rows.jsonl")
    complete = {tuple(row[name] for name in KEY) for row in rows if row["final"]}
    rows = [row for row in rows if tuple(row[name] for name in KEY) in complete]
    if not rows:
        raise UserError(f"{out / 'rows.jsonl'} has no complete run: run the script without --render")
    order = [(env_id, method) for env_id in TASKS for method in METHODS]
    rows.sort(key=lambda row: (order.index((row["env_id"], row["method"])), row["cores"], row["seed"], row["mark_s"]))
    return pd.DataFrame(rows)


def label(method: str, cores: int) -> str:
    """A method on so many cores, as the table and the figure call it."""
    return f"{METHODS[method]}, {cores} core{'s' * (cores > 1)}"


def score_at(own: report.Frame, mark: float) -> str:
    """Median over the seeds of the last score up to a mark; nothing if a seed has none."""
    last = [run[run["mark_s"] <= mark]["mean_return"] for _, run in report.groups(own, "seed")]
    return f"{median(scores.iloc[-1] for scores in last):,.0f}" if all(len(scores) for scores in last) else ""


def table(out: Path) -> str:
    """Final scores in Markdown, with the scores on the way, and the environments that were chosen for PPO."""
    rows, config = read_rows(out), report.read_json(out / "config.json")
    finals = rows[rows["final"]]
    shown = [config["seconds"] * mark for mark in SHOWN_MARKS]
    scores = {key: sorted(own["mean_return"]) for key, own in report.groups(finals, "env_id", "method", "cores")}
    cells = []
    for (env_id, method, cores), own in report.groups(finals, "env_id", "method", "cores"):
        mine, classic = scores[env_id, method, cores], scores.get((env_id, "ppo", 1))
        curves = rows[(rows["env_id"] == env_id) & (rows["method"] == method) & (rows["cores"] == cores)]
        ratio = f"{median(mine) / median(classic):.2f}" if classic and median(classic) > 0 else ""
        cells.append(
            (
                env_id,
                label(method, cores),
                *(score_at(curves, mark) for mark in shown),
                f"**{median(mine):,.0f}**",
                ", ".join(f"{score:,.0f}" for score in mine),
                ratio,
                f"{own['env_steps'].median() / 1e6:.3g}M",
                report.spread(own["wall_s"], ".1f"),
            )
        )
    header = "environment | method | " + " | ".join(f"after {mark:g} s" for mark in shown)
    header += " | median seed | seeds, worst to best | ÷ PPO on one core | env steps | s"
    return (
        f"Mean return of the deterministic policy in Gymnasium after {config['seconds']:g} s of training: median of the seeds,\n"
        f"{config['final_episodes']} episodes (on the way {config['episodes']}). PPO, SAC and ARS are those of stable-baselines3 "
        "and sb3-contrib with rl-zoo's settings. Runs on\none core are pinned to it, "
        f"{config['side_by_side']} side by side; runs on {config['all_cores']} cores have the machine to themselves. s: wall "
        "time of training, median (least to most).\n\n" + report.markdown(header, cells) + chosen(out)
    )


def sentence(out: Path) -> str:
    """What the README says about HalfCheetah on one core, this engine beside PPO; nothing without both."""
    rows, config = read_rows(out), report.read_json(out / "config.json")
    finals = rows[rows["final"] & (rows["env_id"] == "HalfCheetah-v5") & (rows["cores"] == 1)]
    runs = {method: own for method, own in report.groups(finals, "method")}
    if not {"es_flipout", "ppo"} <= runs.keys():
        return ""
    scores = {method: sorted(own["mean_return"]) for method, own in runs.items()}
    steps = {method: median(own["env_steps"]) for method, own in runs.items()}
    mine, ppo = scores["es_flipout"], scores["ppo"]
    cpu = report.read_json(out / "environment.json")["hardware"]["cpu"]
    return (
        f"On one core of an {report.processor(cpu)}, {config['seconds']:g} seconds each, {len(mine)} seeds: median "
        f"{median(mine):,.0f} (worst {mine[0]:,.0f}) on HalfCheetah-v5, where PPO with rl-zoo's settings reaches "
        f"{median(ppo):,.0f} (best {ppo[-1]:,.0f}) with {steps['es_flipout'] / steps['ppo']:.0f} times fewer environment steps.\n"
    )


def chosen(out: Path) -> str:
    """What the trials chose for PPO."""
    path = out / "trials.jsonl"
    text = "\nPPO's environments on all cores, those with the most steps per second in a trial:\n\n" * path.exists()
    for env_id in dict.fromkeys(row["env_id"] for row in read_lines(path)):
        rates = [row["steps_per_s"] for row in read_lines(path) if row["env_id"] == env_id]
        best = best_vector(path, env_id)
        where = "one process" if best.kind == "dummy" else "processes of their own"
        text += f"- {env_id}: {best.n_envs} in {where}, {best.threads} threads, {max(rates):,.0f} steps/s "
        text += f"(the slowest of {len(rates)}: {min(rates):,.0f})\n"
    return text


def plot(out: Path) -> None:
    """Scores against environment steps and against wall time: median of the seeds, with all of their range shaded."""
    rows = read_rows(out)
    envs = list(dict.fromkeys(rows["env_id"]))
    figure, axes = report.panels(2 * len(envs), 4.2, 3.2, columns=len(envs))
    for number, (x, named) in enumerate((("env_steps", "environment steps"), ("wall_s", "wall time, s"))):
        for axis, env_id in zip(axes[number * len(envs) :], envs, strict=False):
            own = rows[rows["env_id"] == env_id]
            for (method, cores), curves in report.groups(own, "method", "cores"):
                style = "--" if cores == 1 else "-"
                report.plot_seeds(
                    axis, curves, x, "mean_return", COLORS[method], label(method, cores), band=0, style=style
                )
            axis.set_xlabel(named, fontsize=9)
            axis.tick_params(labelsize=8)
            if x == "env_steps":
                axis.set_xscale("log")
                axis.set_title(env_id, fontsize=10)
    for axis in axes[:: len(envs)]:
        axis.set_ylabel("score (deterministic policy)", fontsize=9)
    axes[0].legend(fontsize=7)
    report.save(figure, out)


if __name__ == "__main__":
    report.run_script(main)
