"""Shared by the scripts that train many runs: run them side by side, keep what is done, read it back."""

from __future__ import annotations

import csv
import dataclasses
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from es_flipout.config import TrainConfig
from es_flipout.errors import UserError

ROW_COLUMNS = (
    "name",
    "env_id",
    "seed",
    "env_steps",
    "generations",
    "train_s",
    "mean_return",
    "std_return",
    "median_return",
    "best_score",
    "commit",
)
CURVE_COLUMNS = ("name", "env_id", "seed", "generation", "env_steps", "wall_s", "mean_return", "score")


@dataclass(frozen=True)
class Job:
    """One run: a label (several runs share it and differ in the seed) and its configuration."""

    name: str
    config: TrainConfig


class _Recorder:
    """Keeps the rows in which the mean policy was scored."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.rows: list[dict[str, object]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        return

    def show(self, metrics, progress: float) -> None:  # noqa: ANN001  (importing Metrics here would import torch)
        if metrics.score is not None:
            values = {c: getattr(metrics, c) for c in CURVE_COLUMNS[3:]}
            self.rows.append(
                {"name": self.job.name, "env_id": self.job.config.env_id, "seed": self.job.config.seed, **values}
            )

    def say(self, message: str) -> None:
        print(message)


def train_and_score(job: Job) -> tuple[dict[str, object], list[dict[str, object]]]:
    """Train one run and score it in the real environment; a row of ``runs.csv`` and the rows of ``curves.csv``."""
    from es_flipout.evaluate import evaluate
    from es_flipout.runinfo import commit
    from es_flipout.trainer import Trainer

    recorder = _Recorder(job)
    trainer = Trainer(job.config, None, recorder)
    trainer.train()
    evaluation = evaluate(trainer.trained_agent(), job.config, job.config.evaluation_episodes)
    row: dict[str, object] = {
        "name": job.name,
        "env_id": job.config.env_id,
        "seed": job.config.seed,
        "env_steps": trainer.progress.env_steps,
        "generations": trainer.progress.generation,
        "train_s": round(trainer.progress.wall_s, 1),
        "mean_return": evaluation.mean_return,
        "std_return": evaluation.std_return,
        "median_return": evaluation.median_return,
        "best_score": max(float(str(r["score"])) for r in recorder.rows),
        "commit": commit(),
    }
    return row, recorder.rows


def run_all(jobs: Iterable[Job], out: Path, processes: int) -> None:
    """Run the jobs that ``out/runs.csv`` does not hold yet, ``processes`` at a time with one physics thread each."""
    out.mkdir(parents=True, exist_ok=True)
    done = {(row["name"], row["seed"]) for row in read_csv(out / "runs.csv")}
    todo = [job for job in jobs if (job.name, str(job.config.seed)) not in done]
    _keep_configs(todo, out)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        futures = [pool.submit(train_and_score, job) for job in todo]
        for future in as_completed(futures):
            row, curve = future.result()
            append_csv(out / "curves.csv", CURVE_COLUMNS, curve)
            append_csv(out / "runs.csv", ROW_COLUMNS, [row])
            print(f"{row['name']} seed {row['seed']}: {row['mean_return']:,.1f} in {row['train_s']} s", flush=True)
    write_environment(out)


def adopt(jobs: Iterable[Job], other: Path, out: Path) -> None:
    """Take over from another folder the runs that had the very same configuration, instead of repeating them."""
    named = json.loads((other / "config.json").read_text())
    same_as = {_but_seed(config): name for name, config in named.items()}
    done = {(row["name"], row["seed"]) for row in read_csv(out / "runs.csv")}
    out.mkdir(parents=True, exist_ok=True)
    for job in jobs:
        key = (same_as.get(_but_seed(json.loads(job.config.to_json()))), str(job.config.seed))
        if key[0] is None or (job.name, key[1]) in done:
            continue
        for file, columns in (("runs.csv", ROW_COLUMNS), ("curves.csv", CURVE_COLUMNS)):
            rows = [row for row in read_csv(other / file) if (row["name"], row["seed"]) == key]
            append_csv(out / file, columns, [{**row, "name": job.name} for row in rows])
        _keep_configs([job], out)


def _keep_configs(jobs: Iterable[Job], out: Path) -> None:
    configs = {job.name: dataclasses.asdict(job.config) for job in jobs}
    previous = json.loads((out / "config.json").read_text()) if (out / "config.json").exists() else {}
    (out / "config.json").write_text(json.dumps(previous | configs, indent=2, sort_keys=True) + "\n")


def _but_seed(config: dict[str, object]) -> str:
    return json.dumps(config | {"seed": None}, sort_keys=True)


def write_environment(out: Path) -> None:
    """Write hardware, versions and commit to ``out/environment.json``."""
    from es_flipout.runinfo import environment

    (out / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")


def one_thread(config: TrainConfig, **changes: object) -> TrainConfig:
    """The configuration for one core (the runs of a sweep share the machine), with other changes."""
    return dataclasses.replace(config, threads=1, overlap=False, **changes)  # type: ignore[arg-type]


def default_processes() -> int:
    """One run for each core."""
    return len(os.sched_getaffinity(0))


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none where it does not exist."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append_csv(path: Path, columns: tuple[str, ...], rows: list[dict[str, object]]) -> None:
    """Add rows to a CSV file, which begins with a header."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def run_script(main: Callable[[], None]) -> None:
    """Run the script; what the user can mend becomes one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
