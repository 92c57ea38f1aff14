"""How many of the environment steps that a GPU computes are live, before and after turns (simulated from recorded lengths).

es-flipout train Humanoid-v5 ... --checkpoint-every 20 --keep-checkpoints 1000 --run-dir RUN     # see reproduce.sh
python scripts/speed/occupancy.py --out results/occupancy_<hardware>_<yyyy-mm> --run-dir RUN     # minutes
python scripts/speed/occupancy.py --out ... --render                                             # only table.md

A device rollout steps all its slots at every control step, so slots without a live episode are stepped in vain. This script
records how long the episodes of a population last around policies of a run: the untrained one, the one after half of the
run's environment steps, and the last one. From these lengths it counts what a rollout computes, launch by launch, as
``rollout/device.py`` does (a test compares the count with a rollout). A run of hours on a GPU would reach policies that last
longer; their lengths are made up, see ``made_up``. Nothing here is timed.
"""

from __future__ import annotations

import argparse
import heapq
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
from numpy.typing import NDArray

from es_flipout.rollout.device import STEPS_PER_LAUNCH
from es_flipout.rollout.episodes import Episodes, start_seeds
from es_flipout.rollout.plan import BUSY_SLOTS, slots_in_turns
from es_flipout.training.checkpoint import checkpoints, load_checkpoint, load_progress
from es_flipout.training.run_directory import read_config
from es_flipout.training.setup import make_trainer
from scripts import report

LIMIT = 1000  # of Humanoid-v5


class Cost(NamedTuple):
    """What a rollout computes.

    Attributes:
        steps: control steps of the batch.
        computed: environment steps, live or not.
    """

    steps: int
    computed: int


def main() -> None:
    """Record the lengths, and write the table."""
    parser = report.script_parser(__doc__)
    parser.add_argument("--run-dir", type=Path, help="a run with checkpoints of all its stages")
    parser.add_argument("--members", type=int, default=384, help="episodes to record around each policy")
    parser.add_argument("--jobs", type=int, nargs="+", default=[16384, 65536], help="episodes of a generation")
    options = report.parse(parser)
    if not options.render:
        if options.run_dir is None:
            parser.error("--run-dir is missing")
        run = read_config(options.run_dir).flat()
        report.begin(options.out, {**report.config_of(options, "run_dir"), "run": run}, fresh=True)
        (options.out / "lengths.csv").unlink(missing_ok=True)
        record(options)
    report.write_table(options.out, table(options.out))


def record(options: argparse.Namespace) -> None:
    """Record episode lengths around the policies of a run."""
    found = checkpoints(options.run_dir / "checkpoints")
    for name, path in zip(("untrained", "half of the run", "end of the run"), _stages(found), strict=True):
        config = read_config(options.run_dir).replace(device="cpu", physics="cpu", slots=128, row_block=None)
        with tempfile.TemporaryDirectory() as folder:
            for file in (path, path.with_suffix(".safetensors")):
                shutil.copy(file, folder)
            tensors, progress = load_checkpoint(Path(folder))
        trainer = make_trainer(config)
        trainer.load(tensors, progress)
        trainer.strategy.population_size = options.members
        population = trainer.strategy.ask()
        rollout = trainer.player.play(population, Episodes(start_seeds(population, 1)))
        trainer.close()
        lengths = rollout.lengths.flatten()
        report.append_csv(options.out / "lengths.csv", [{"policy": name, "length": n} for n in lengths.tolist()])
        row = {"env_steps": progress.env_steps, "sigma": trainer.strategy.sigma, "episodes": len(lengths)}
        mean_return = float(rollout.returns.mean())
        report.append_csv(options.out / "runs.csv", [{"policy": name, **row, "mean_return": mean_return}])


def _stages(found: Sequence[Path]) -> tuple[Path, Path, Path]:
    """Return the first checkpoint, the one closest to half of the environment steps, and the last one."""
    steps = {}
    for path in found:
        with tempfile.TemporaryDirectory() as folder:
            for file in (path, path.with_suffix(".safetensors")):
                shutil.copy(file, folder)
            progress = load_progress(Path(folder))
        steps[path] = progress.env_steps if progress is not None else 0
    half = min(found, key=lambda path: abs(steps[path] - steps[found[-1]] / 2))
    return found[0], half, found[-1]


def made_up(count: int) -> dict[str, NDArray[np.int64]]:
    """Lengths for later policies, by name.

    Half-trained: the same chance of falling, one in 300, at every step. Trained: nine of ten episodes reach the time limit, the
    others end at any time.
    """
    rng = np.random.default_rng(0)
    half = np.minimum(rng.geometric(1 / 300, count), LIMIT)
    trained = np.where(rng.uniform(size=count) < 0.9, LIMIT, rng.integers(1, LIMIT, count))
    return {"half-trained (made up)": half, "trained (made up)": trained}


def in_turns(lengths: Sequence[int], slots: int, launch: int = STEPS_PER_LAUNCH) -> Cost:
    """Count what a device rollout computes: slots take the next episode at the end of a launch."""
    ends = [0] * slots  # of the last episode of each slot, in control steps
    for length in lengths:
        heapq.heapreplace(ends, ends[0] + -(-length // launch) * launch)
    steps = max(ends) + launch  # the host learns one launch late that nothing is live
    return Cost(steps, slots * steps)


def compacted(lengths: Sequence[int], fewest: int, launch: int = STEPS_PER_LAUNCH) -> Cost:
    """Count what a rollout would compute that halves its batch of one slot per episode whenever the live ones fit.

    The batch has at least ``fewest`` slots.
    """
    ends = np.sort(-(-np.asarray(lengths) // launch) * launch)
    slots, steps, computed = len(ends), 0, 0
    while steps < ends[-1]:
        live = len(ends) - int(np.searchsorted(ends, steps, side="right"))
        while slots // 2 >= max(live, fewest):
            slots //= 2
        steps += launch
        computed += slots * launch
    return Cost(steps + launch, computed + slots * launch)


def table(out: Path) -> str:
    """The table, from the recorded lengths."""
    recorded, runs = report.read_csv(out / "lengths.csv"), report.read_csv(out / "runs.csv")
    busy = BUSY_SLOTS["mujoco"]
    known = {str(name): own["length"].to_numpy() for name, own in report.groups(recorded, "policy")}
    known |= made_up(1000)
    rng = np.random.default_rng(0)
    rows = []
    for jobs in report.read_json(out / "config.json")["jobs"]:
        for name, lengths in known.items():
            drawn = rng.choice(lengths, jobs).tolist()
            slots = slots_in_turns(jobs, jobs, busy)
            before, after, moved = in_turns(drawn, jobs), in_turns(drawn, slots), compacted(drawn, busy)
            live = sum(drawn)
            shown = [f"{live / cost.computed:.2f}" for cost in (before, after, moved)]
            ratio = f"{before.computed / after.computed:.1f}"
            mean = f"{live / jobs:.0f}"
            rows.append([name, f"{jobs:,}", mean, max(drawn), shown[0], f"{slots:,}", *shown[1:], ratio])
    header = (
        "policy | episodes | mean length | longest | a slot per episode: live | slots, in turns | in turns: live | "
        "halved batches: live | computed, before ÷ after"
    )
    steps = ", ".join(f"{row.policy} {row.env_steps:,} environment steps" for row in runs.itertuples())
    return (
        "# Live part of what a GPU computes, Humanoid-v5\n\n"
        + report.markdown(header, rows)
        + f"\nSimulated, not measured: lengths of {runs['episodes'].iloc[0]} episodes recorded around each policy ({steps}), "
        "drawn with replacement for a generation. Two rows are made up: the same chance of falling, one in 300, at every "
        f"step; and nine of ten episodes reach the limit of {LIMIT:,} steps, the others end at any time.\n\n"
        "*A slot per episode*: as before. *In turns*: fewer slots, "
        f"at least {busy:,}, of which each plays several episodes. *Halved batches* (not built): a slot per episode, and the "
        f"live ones are moved to a batch of half the size, but not below {busy:,}, whenever they fit. Slots wait for the end "
        f"of a launch of {STEPS_PER_LAUNCH} steps, and one more launch is computed at the end.\n"
    )


if __name__ == "__main__":
    report.run_script(main)
