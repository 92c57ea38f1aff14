"""Validate the files of docs/cloud/ with the parsers of SkyPilot and dstack, each in an environment of its own.

python scripts/checks/cloud.py                    # installs both tools below build/
python scripts/checks/cloud.py --venvs DIR        # uses DIR/skypilot and DIR/dstack, made if missing

No account is needed and nothing is started. A parser that accepts a file with an unknown key is an error, too.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = {"skypilot": "0.14.1", "dstack": "0.22.5"}
FILES = {"skypilot": "skypilot_*.yaml", "dstack": "*.dstack.yml"}
# Reads a configuration from stdin and fails if the tool rejects it; runs in the tool's environment.
_PARSERS = {
    "skypilot": "import sys, yaml, sky; sky.Task.from_yaml_config(yaml.safe_load(sys.stdin)).validate_name()",
    "dstack": "import sys, yaml; from dstack._internal.core.models.configurations import parse_apply_configuration; "
    "parse_apply_configuration(yaml.safe_load(sys.stdin))",
}


def environment(folder: Path, tool: str) -> Path:
    """Interpreter of the tool's environment, which is made if it is missing."""
    python = folder / tool / "bin" / "python"
    if not python.exists():
        print(f"installing {tool} {VERSIONS[tool]}", flush=True)
        venv.create(folder / tool, with_pip=True)
        command = [python, "-m", "pip", "install", "--quiet", f"{tool}=={VERSIONS[tool]}"]
        subprocess.run(command, check=True)
    return python


def accepts(python: Path, tool: str, text: str) -> str | None:
    """None if the tool accepts the configuration, otherwise the end of its message."""
    done = subprocess.run(
        [python, "-c", _PARSERS[tool]], input=text, capture_output=True, text=True, check=False, cwd=ROOT
    )
    return None if done.returncode == 0 else done.stderr.strip()[-800:]


def main() -> int:
    """Validate every file; return the number of those that are wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venvs", type=Path, default=ROOT / "build" / "cloud_tools")
    folder = parser.parse_args().venvs.resolve()
    wrong = 0
    for tool, pattern in FILES.items():
        python = environment(folder, tool)
        for path in sorted((ROOT / "docs" / "cloud").glob(pattern)):
            text = path.read_text(encoding="utf-8")
            problem = accepts(python, tool, text)
            if problem is None and accepts(python, tool, text + "\nno_such_key: 1\n") is None:
                problem = "an unknown key was accepted, so this check shows nothing"
            print(f"{tool} {VERSIONS[tool]}: {path.name}: {problem or 'valid'}")
            wrong += problem is not None
    return wrong


if __name__ == "__main__":
    sys.exit(main())
