"""Run the steps of the Dockerfile in a clean Debian root, without a Docker engine.

As root:

debootstrap --variant=minbase bookworm BASE           # what debian:bookworm-slim is made from
python scripts/checks/dockerfile.py BASE WORK         # WORK/<stage> is a copy of BASE in which the steps were run
python scripts/checks/dockerfile.py BASE WORK --build-arg EXTRAS=ray --bind DIR --run es-flipout envs

Only the instructions of our Dockerfile are implemented; any other is an error. The environment reaches the steps (pip reads
PIP_INDEX_URL and the like), ``--bind`` mounts a directory of this machine read-only, and ``--run`` runs a command in the last
stage as its user.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path
from string import Template

ROOT = Path(__file__).resolve().parents[2]
# Everything of this machine is mounted read-only: what packages write in the root must not reach it.
_MOUNTS = "mount -t proc proc {0}/proc; mount --bind -o ro /dev {0}/dev; mount -t tmpfs tmpfs {0}/dev/shm; "
_SHOW = "mount --bind -o ro {1} {0}{1}; "


def instructions(text: str) -> list[tuple[str, str]]:
    """Name and arguments of every instruction; continued lines are joined, comments left out."""
    lines = (line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in joined.splitlines()) if name]


def command_line(doc: str | None) -> argparse.ArgumentParser:
    """The options of every check of the Dockerfile."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--run", nargs=argparse.REMAINDER, default=[])
    return parser


def main() -> None:
    """Run all stages, then the command."""
    parser = command_line(__doc__)
    parser.add_argument("--bind", action="append", default=[], metavar="DIR")
    options = parser.parse_args()
    options.work = options.work.resolve()
    given = dict(pair.split("=", 1) for pair in options.build_arg)
    stage, env, user, workdir = Path(), {}, "0:0", "/"
    for name, rest in instructions((ROOT / "Dockerfile").read_text(encoding="utf-8")):
        if name != "RUN":  # the shell expands what RUN says
            rest = Template(rest).safe_substitute(env)
        print(f"{name} {rest}", flush=True)
        if name == "FROM":
            stage = options.work / (rest.partition(" AS ")[2] or "final")
            stage.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["cp", "-a", options.base, stage], check=True)
            env = {k: v for k, v in os.environ.items() if k.startswith("PIP_") or k.endswith(("_proxy", "_PROXY"))}
            env["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
            user, workdir = "0:0", "/"
        elif name == "ARG":
            env |= {k: given.get(k, v) for k, v in (pair.split("=", 1) for pair in [rest])}
        elif name == "ENV":
            env |= dict(pair.split("=", 1) for pair in shlex.split(rest))
        elif name == "WORKDIR":
            workdir = rest
            (stage / rest[1:]).mkdir(parents=True, exist_ok=True)
        elif name == "COPY" and rest.startswith("--from="):
            source, chown, path, target = rest.removeprefix("--from=").split()
            subprocess.run(["cp", "-a", options.work / source / path[1:], stage / target[1:]], check=True)
            subprocess.run(["chown", "-hR", chown.removeprefix("--chown="), stage / target[1:]], check=True)
        elif name == "COPY":  # what .dockerignore lets through: it names what is wanted
            wanted = [rest.split()[0]]
            if wanted == ["."]:
                ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
                wanted = [line[1:] for line in ignore if line.startswith("!")]
            command = f"git ls-files -z {shlex.join(wanted)} | xargs -0 cp -a --remove-destination --parents -t {stage}{workdir}"
            subprocess.run(["sh", "-c", command], cwd=ROOT, check=True)
        elif name == "USER":
            user = f"{rest}:{rest}"
        elif name == "RUN":
            _inside(stage, ["sh", "-c", rest], env, user, workdir, options.bind)
        elif name not in ("VOLUME", "CMD"):
            sys.exit(f"unknown instruction {name}")
    if options.run:
        _inside(stage, options.run, env | {"HOME": workdir}, user, workdir, options.bind)


def _inside(stage: Path, command: list[str], env: dict[str, str], user: str, workdir: str, binds: list[str]) -> None:
    """Run a command in the root ``stage``; the mounts end with it."""
    mounts = _MOUNTS.format(stage) + _SHOW.format(stage, "/etc/resolv.conf")
    mounts += "".join(f"mkdir -p {stage}{d}; " + _SHOW.format(stage, d) for d in binds)
    variables = [f"{name}={value}" for name, value in env.items()]
    inner = ["chroot", f"--userspec={user}", str(stage), "/usr/bin/env", "-i", "-C", workdir, *variables, *command]
    subprocess.run(["unshare", "-m", "sh", "-ec", mounts + "exec " + shlex.join(inner)], check=True)


if __name__ == "__main__":
    main()
