"""List the licences of all packages that es_flipout installs, from their own metadata.

    .venv/bin/python scripts/checks/licences.py

writes ``docs/licences.md``: the packages that ``pip install es-flipout`` brings, and those of the extras, each with the
licence that its metadata names. It needs no network; the versions are those of the environment it runs in.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PAGE = Path(__file__).parents[2] / "docs" / "licences.md"
EXTRAS = ("ray", "gpu", "pixels", "box2d")
_OF_CUDA_BUILDS = re.compile(r"nvidia-|cuda-|triton$")  # brought by torch where it is a build for CUDA
_CLASSIFIER = "License :: OSI Approved :: "


def needed(extra: str = "") -> dict[str, Distribution | None]:
    """Return the packages that es_flipout with an extra installs, by name; None for one that is not installed here."""
    found: dict[str, Distribution | None] = {}
    waiting = [("es-flipout", frozenset({extra}))]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            package = distribution(name)
        except PackageNotFoundError:
            found[name] = None
            continue
        found[name] = package
        for text in package.requires or []:
            wanted = Requirement(text)
            marker = wanted.marker
            if _OF_CUDA_BUILDS.match(canonicalize_name(wanted.name)):
                continue
            if marker is None or any(marker.evaluate({"extra": each}) for each in extras or {""}):
                waiting.append((canonicalize_name(wanted.name), frozenset(wanted.extras or {""})))
    del found["es-flipout"]
    return dict(sorted(found.items()))


def licence(package: Distribution) -> str:
    """Return the licence that a package's metadata names."""
    metadata = package.metadata
    if "License-Expression" in metadata:
        return metadata["License-Expression"]
    named = [
        each.removeprefix(_CLASSIFIER) for each in metadata.get_all("Classifier") or [] if each.startswith(_CLASSIFIER)
    ]
    if named:
        return ", ".join(named)
    line = str(metadata["License"] or "").strip().partition("\n")[0]
    return line if line and len(line) < 60 else "see its licence file"


def table(packages: dict[str, Distribution | None]) -> list[str]:
    """Return a Markdown table."""
    rows = ["| package | version | licence |", "|---|---|---|"]
    for name, package in packages.items():
        if package is None:
            rows.append(f"| {name} | not installed here | |")
        else:
            version = re.sub(r"\+.*", "", package.version)  # of a build of torch for one kind of device
            rows.append(f"| {name} | {version} | {licence(package).replace('|', '/')} |")
    return rows


def page() -> str:
    """Return the page."""
    base = needed()
    lines = [
        "# Licences of the dependencies",
        "",
        "es_flipout is licensed under Apache-2.0. It contains no code of its dependencies, which `pip` installs beside it. This",
        "page is made by `scripts/checks/licences.py` from the metadata of the packages in the tested set (`constraints.txt`).",
        "A build of torch for CUDA also brings Triton (MIT) and CUDA's libraries, under NVIDIA's own licences.",
        "",
        "## es-flipout",
        "",
        *table(base),
    ]
    for extra in EXTRAS:
        more = {name: package for name, package in needed(extra).items() if name not in base}
        lines += ["", f"## The extra `{extra}`, in addition", "", *table(more)]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
