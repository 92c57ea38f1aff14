"""Run the GPU's code on device "cuda" without a GPU: tests/rollout/test_fake_cuda.py under a CUDA build of torch.

python scripts/checks/fake_cuda.py ENVIRONMENT                     # makes the virtual environment if it is missing (several GB)
python scripts/checks/fake_cuda.py ENVIRONMENT -k the_player       # more options go to pytest

The environment holds the default build of torch for Linux, which is one for CUDA, and the extras ``gpu`` and ``test``. Neither a
GPU nor a driver is needed: the tests compute with fake tensors.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_TESTS = "tests/rollout/test_fake_cuda.py"
_HAS_CUDA = "import sys, torch; sys.exit(torch.version.cuda is None)"


def main(arguments: list[str]) -> int:
    """Make the environment if needed, and run the tests; returns the exit code of pytest."""
    if not arguments or arguments[0].startswith("-"):
        print(__doc__)
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    folder, options = Path(arguments[0]).resolve(), arguments[1:]
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"making {folder}", flush=True)
        venv.create(folder, with_pip=True)
        for wanted in (["torch"], [f"{ROOT}[gpu,test]"]):
            # Without constraints.txt: the newest releases, as users get them.
            subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
    if subprocess.run([python, "-c", _HAS_CUDA], check=False).returncode:
        print(
            f"{folder} holds a CPU build of torch: choose another folder, or install another build there",
            file=sys.stderr,
        )
        return 2
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [
        python,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--override-ini",
        "addopts=",
        "--import-mode=importlib",
    ]
    return subprocess.run([*command, _TESTS, *options], cwd=ROOT, env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
