"""Build the image with buildah from a root made by debootstrap; a run in its container is stopped and resumed.

As root, with buildah and debootstrap (packages of Debian); no Docker engine and no registry is needed:

debootstrap --variant=minbase bookworm BASE           # what debian:bookworm-slim is made from
python scripts/checks/container.py BASE WORK
python scripts/checks/container.py BASE WORK --build-arg EXTRAS=ray --volume $PWD/wheels:/wheels:ro
python scripts/checks/container.py BASE WORK --run es-flipout envs      # a command in place of the check

BASE becomes the image that the Dockerfile names in FROM. ``--volume`` mounts files of this machine while the image is built, for
example a pip configuration (``my.conf:/etc/pip.conf:ro``); they are not in the image. Images are kept below WORK, about 4 GB.
"""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from string import Template

sys.path.insert(0, str(Path(__file__).parents[2]))

from scripts.checks.dockerfile import ROOT, command_line, instructions

IMAGE, CONTAINER, USER = "es-flipout", "es-flipout-check", 1000
RUN = "runs/check"
TRAIN = ["es-flipout", "train", "CartPole-v1", "--run-dir", RUN, "--env-steps", "2000000", "--compile", "off"]


def main() -> None:
    """Build the image, then run the command or the check."""
    parser = command_line(__doc__)
    parser.add_argument("--volume", action="append", default=[], metavar="FROM:TO[:ro]")
    options = parser.parse_args()
    work: Path = options.work.resolve()
    buildah = ["buildah", "--root", str(work / "storage"), "--runroot", str(work / "run")]
    os.environ |= {"STORAGE_DRIVER": "vfs", "BUILDAH_ISOLATION": "chroot"}
    given = dict(pair.split("=", 1) for pair in options.build_arg)
    _commit_base(buildah, options.base.resolve(), base_image(given))
    extra = [item for pair in options.build_arg for item in ("--build-arg", pair)]
    extra += [item for volume in options.volume for item in ("--volume", volume)]
    subprocess.run([*buildah, "bud", "--pull=never", *extra, "--tag", IMAGE, str(ROOT)], check=True)
    subprocess.run([*buildah, "from", "--pull=never", "--name", CONTAINER, f"localhost/{IMAGE}"], check=True)
    runs = work / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    runs.mkdir()
    os.chown(runs, USER, USER)
    inside = [*buildah, "run", "--volume", f"{runs}:/home/es/runs", CONTAINER, "--"]
    try:
        if options.run:
            subprocess.run([*inside, *options.run], check=True)
        else:
            stop_and_resume(inside, runs)
    finally:
        subprocess.run([*buildah, "rm", CONTAINER], check=True, stdout=subprocess.DEVNULL)


def _commit_base(buildah: list[str], base: Path, name: str) -> None:
    """Make an image of a root, unless it is there."""
    if subprocess.run([*buildah, "inspect", "--type", "image", name], capture_output=True, check=False).returncode == 0:
        return
    made = subprocess.run([*buildah, "from", "scratch"], check=True, capture_output=True, text=True).stdout.strip()
    subprocess.run([*buildah, "add", "--quiet", made, str(base), "/"], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([*buildah, "commit", "--quiet", "--rm", made, name], check=True, stdout=subprocess.DEVNULL)


def base_image(given: dict[str, str]) -> str:
    """The full name of the image that the Dockerfile is built from."""
    values: dict[str, str] = {}
    for name, rest in instructions((ROOT / "Dockerfile").read_text(encoding="utf-8")):
        if name == "FROM":
            return "docker.io/library/" + Template(rest.partition(" ")[0]).substitute(values)
        if name == "ARG":
            key, _, default = rest.partition("=")
            values[key] = given.get(key, default)
    raise ValueError("the Dockerfile has no FROM")


def stop_and_resume(inside: list[str], runs: Path) -> None:
    """Train in the container, send the run SIGTERM, resume it, and check that no generation is missing or repeated."""
    process = subprocess.Popen([*inside, *TRAIN])
    checkpoints = runs / "check" / "checkpoints"
    deadline = time.monotonic() + 300
    while len(list(checkpoints.glob("*.json"))) < 2:  # the one before the first generation, and another
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            sys.exit("training wrote no checkpoints")
        time.sleep(0.2)
    # An engine sends the signal to the first process of the container. buildah would kill that one instead.
    os.kill(_last_descendant(process.pid), signal.SIGTERM)
    if process.wait(60):
        sys.exit("the stopped run failed")
    stopped = _generations(runs)
    subprocess.run([*inside, "es-flipout", "resume", RUN], check=True)
    resumed = _generations(runs)
    if resumed != list(range(1, resumed[-1] + 1)) or resumed[-1] <= stopped[-1]:
        sys.exit(f"generations are missing or repeated: {resumed}")
    print(f"stopped after generation {stopped[-1]}, resumed to generation {resumed[-1]}; each is there once")


def _last_descendant(pid: int) -> int:
    """The last of a chain of processes, each of which started the next."""
    children: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text(encoding="utf-8").rpartition(")")[2].split()[1])
        except OSError:  # it has ended meanwhile
            continue
        children[parent] = int(stat.parent.name)
    while pid in children:
        pid = children[pid]
    return pid


def _generations(runs: Path) -> list[int]:
    with (runs / "check" / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return [int(row["generation"]) for row in csv.DictReader(file)]


if __name__ == "__main__":
    main()
