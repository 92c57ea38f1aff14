"""Malformed input by the thousand, and runs that are disturbed in every way, as one table of counts.

python scripts/checks/reliability.py --out results/reliability_<hardware>_<yyyy-mm>                      # hours
python scripts/checks/reliability.py --out ... --render                                                  # only table.md

Runs ``fuzz.py``, and ``chaos.py`` three times: on full disks, with runs on this machine, and with runs on Ray. Each of them can
be run alone, and writes its counts, its command with the seeds, and every problem to a JSON file. The counts of all files
``chaos*.json`` are added up, those on Ray by themselves.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from scripts import report

HERE = Path(__file__).parent


def main() -> None:
    """Run the checks, and write the table."""
    parser = report.script_parser(__doc__)
    parser.add_argument("--cases", type=int, default=2000, help="malformed inputs")
    parser.add_argument("--minutes", type=float, default=120.0, help="time for runs on this machine")
    parser.add_argument("--ray-minutes", type=float, default=60.0, help="time for runs on Ray")
    parser.add_argument("--full-disks", type=int, default=20, help="runs on full disks")
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    options = report.parse(parser)
    if not options.render:
        options.out.mkdir(parents=True, exist_ok=True)
        seed, minutes, ray = (
            f"--seed={options.seed}",
            f"--minutes={options.minutes:g}",
            f"--minutes={options.ray_minutes:g}",
        )
        for name, command in {
            "fuzz.json": ["fuzz.py", f"--cases={options.cases}", seed],
            "chaos_disks.json": ["chaos.py", "--minutes=0", seed, f"--full-disks={options.full_disks}"],
            "chaos.json": ["chaos.py", minutes, seed],
            "chaos_ray.json": ["chaos.py", ray, seed, "--ray=1"],
        }.items():
            # The exit code says whether there were problems, which are in the file.
            subprocess.run(
                [sys.executable, HERE / command[0], *command[1:], "--output", options.out / name], check=False
            )
    report.write_table(options.out, table(options.out))


def table(folder: Path) -> str:
    """Return the table of the counts in a folder; files that are not there have no rows."""
    paths = [path for path in (folder / "fuzz.json", *sorted(folder.glob("chaos*.json"))) if path.exists()]
    files = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    chaos = [found for name, found in files.items() if name != "fuzz.json"]
    rows = rows_of_fuzz(files["fuzz.json"]) if "fuzz.json" in files else []
    for on_ray in (False, True):
        some = [found for found in chaos if bool(found["kills_of_ray"]) == on_ray]
        rows += rows_of_chaos(some, "on Ray, " if on_ray else "") if some else []
    problems = [
        f"- `{name}`: {' '.join(str(each).split())}"
        for name, found in files.items()
        for each in found.get("failures", []) + found.get("problems", [])
    ]
    seeds = [
        f"- `{found['command']}` at commit {str(found['environment'].get('commit'))[:12]}" for found in files.values()
    ]
    parts = [
        report.markdown("tried | number | problems", rows),
        "A problem is a bit that differs from the undisturbed run, a traceback, a hang, a wrong exit code, or a failure that",
        "does not say how to continue. The commands, with their seeds:\n",
        *seeds,
        *(["\nThe problems:\n", *problems] if problems else []),
    ]
    return "\n".join(parts) + "\n"


def rows_of_fuzz(found: dict[str, Any]) -> list[tuple[str, object, object]]:
    """Return a row for all malformed inputs, and one for each kind."""
    kinds = {f"malformed input: {kind}": ends for kind, ends in found["by_kind"].items()}
    return [
        (what, sum(ends.values()), sum(count for end, count in ends.items() if end not in ("ran", "refused")))
        for what, ends in {"malformed inputs": found["ends"], **kinds}.items()
    ]


def rows_of_chaos(files: list[dict[str, Any]], where: str) -> list[tuple[str, object, object]]:
    """Return a row for the runs of some files with the number of their problems, and one for each kind of event."""
    kinds = {"events": "events", "kills_in": "killed in", "kills_of_ray": "process killed"}
    problems = sum(len(found["problems"]) for found in files)
    full = sum((Counter(found["disk_full_at"]) for found in files), Counter[str]())
    rows: list[tuple[str, object, object]] = [
        (f"{where}disturbed runs", sum(found["runs"] for found in files) + full.total(), problems)
    ]
    for key, said in kinds.items():
        counts = sum((Counter(found[key]) for found in files), Counter[str]())
        rows += [(f"{where}{said}: {name}", count, "") for name, count in sorted(counts.items())]
    rows += [
        ("disk not full: the run fitted" if name == "none" else f"disk full at: {name}", count, "")
        for name, count in sorted(full.items())
    ]
    return rows + [(f"not done: {why}", "", "") for found in files for why in found["not_done"]]


if __name__ == "__main__":
    report.run_script(main)
