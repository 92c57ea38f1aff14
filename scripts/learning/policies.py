"""Write the policies that come along (``zoo:ENV_ID``) from finished runs, one per task, each with a card.

python scripts/learning/policies.py --table results/learning_<hardware>_<yyyy-mm>     # of every task the run of the median seed
python scripts/learning/policies.py RUN_DIR ...                                       # these runs, one per task

The learning table's run directories are in the subfolder ``runs`` of its folder. Every policy is scored again, from the files
that were written, in 100 episodes of the real Gymnasium environment; with ``--table`` the score has to be that of the table.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from es_flipout.errors import UserError
from es_flipout.tools.card import card, read_json
from es_flipout.tools.zoo import folder_name
from es_flipout.training.evaluate import evaluate
from es_flipout.training.run_directory import load_agent, policy_file, read_config
from scripts import report
from scripts.learning._runs import run_dir_of

POLICIES = Path(__file__).parents[2] / "results" / "policies"


def median_runs(table: Path) -> dict[Path, float]:
    """Run directories of the median seeds of a learning table (of an even number, the lower one), and their scores."""
    found = {}
    for name, runs in report.groups(report.read_csv(table / "runs.csv"), "name"):
        row = runs.sort_values("mean_return").iloc[(len(runs) - 1) // 2]
        found[run_dir_of(table, name, row["seed"])] = float(row["mean_return"])
    return found


def write(run_dir: Path, out: Path, expected: float | None, episodes: int) -> Path:
    """Write the best policy of a run to its folder, score it there, and add the card.

    Raises:
        UserError: its score is not the expected one.
    """
    config = read_config(run_dir)
    folder = out / folder_name(config.task.env_id)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(policy_file(run_dir, "best"), folder / "policy.safetensors")
    shutil.copyfile(run_dir / "config.json", folder / "config.json")
    agent, config = load_agent(folder)
    evaluation = evaluate(agent, config, episodes)
    if expected is not None and not math.isclose(evaluation.mean_return, expected, rel_tol=1e-6):
        raise UserError(f"{run_dir} scores {evaluation.mean_return}, but its table says {expected}")
    commit = (read_json(run_dir / "environment.json") or {}).get("commit")
    text = card(config, f"zoo:{config.task.env_id}", evaluation.to_dict(), commit)
    (folder / "card.md").write_text(text, encoding="utf-8")
    print(f"{folder}: {evaluation.mean_return:,.1f}", flush=True)
    return folder


def main() -> None:
    """Write the policies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN_DIR", help="run directories")
    parser.add_argument("--table", type=Path, help="folder of a learning table")
    parser.add_argument("--out", type=Path, default=POLICIES)
    parser.add_argument("--episodes", type=int, default=100, help="episodes of the score")
    options = parser.parse_args()
    if bool(options.runs) == bool(options.table):
        raise UserError("name either run directories or --table")
    runs = median_runs(options.table) if options.table else dict.fromkeys(options.runs)
    tasks = [read_config(run_dir).task.env_id for run_dir in runs]
    if twice := {task for task in tasks if tasks.count(task) > 1}:
        raise UserError(f"several runs of {', '.join(sorted(twice))}: name one run per task")
    for run_dir, expected in runs.items():
        write(run_dir, options.out, expected, options.episodes)


if __name__ == "__main__":
    report.run_script(main)
