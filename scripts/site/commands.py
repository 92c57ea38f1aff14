"""The commands at the top of the README with what they print on stdout, as results/make_train_<hardware>_<yyyy-mm>/output.md.

python scripts/site/commands.py --out results/make_train_<hardware>_<yyyy-mm>                  # nothing else should run meanwhile
python scripts/site/commands.py --out ... --run-dir runs/HalfCheetah-v5_seed0_...   # a run that `make train` has finished
python scripts/site/commands.py --out ... --render                                 # only output.md

With ``--run-dir``, what ``make train`` printed comes from ``es-flipout resume``, which scores a finished run again and then
prints the same lines.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from es_flipout.errors import UserError
from scripts import report

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
RENDER = "es-flipout render zoo:HalfCheetah-v5 --output cheetah.mp4"


def main() -> None:
    """Run the commands, and write what they print."""
    parser = report.script_parser(__doc__)
    parser.add_argument("--run-dir", type=Path, help="a run that `make train` has finished")
    options = report.parse(parser)
    path = options.out / "commands.json"
    if not options.render:
        printed, run_dir = trained(options.run_dir)
        options.out.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "environment.json", "evaluation.json"):
            shutil.copyfile(run_dir / name, options.out / name)
        with tempfile.TemporaryDirectory() as here:
            shown = stdout([sys.executable, "-m", *RENDER.replace("-", "_", 1).split()], Path(here))
        report.write_json(path, {"make train": printed, RENDER: shown})
    text = rendered(report.read_json(path), report.read_json(options.out / "environment.json"))
    (options.out / "output.md").write_text(text, encoding="utf-8")


def trained(run_dir: Path | None) -> tuple[list[str], Path]:
    """What ``make train`` prints, and its run directory."""
    if run_dir is None:
        printed = stdout(["make", "--silent", "train"], ROOT)
        return printed, ROOT / printed[-1].removeprefix("run directory: ")
    with tempfile.TemporaryDirectory() as here:
        name = Path("runs") / run_dir.name
        shutil.copytree(run_dir, here / name)
        return stdout([sys.executable, "-m", "es_flipout", "resume", str(name)], Path(here)), run_dir


def stdout(command: list[str], here: Path) -> list[str]:
    """The lines that a command prints on stdout.

    Raises:
        UserError: it failed.
    """
    done = subprocess.run(command, cwd=here, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed with exit code {done.returncode}")
    return done.stdout.splitlines()


def rendered(commands: dict[str, list[str]], environment: dict[str, Any]) -> str:
    """The code block: commands, with what they print as comments."""
    hardware = environment["hardware"]
    cpu = report.processor(hardware["cpu"])
    lines = []
    for command, printed in commands.items():
        where = f"   # sets up .venv first; on {hardware['cores']} cores of an {cpu}" if command == "make train" else ""
        lines += [command + where, *(f"# {line}" for line in printed)]
    return "\n".join(["```sh", *lines, "```"]) + "\n"


if __name__ == "__main__":
    report.run_script(main)
