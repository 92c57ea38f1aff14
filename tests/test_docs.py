"""Links in the pages of docs/ lead somewhere, and the files that are not run here are valid."""

import re
import tomllib
from pathlib import Path

import pytest

from scripts.checks.container import USER, base_image
from scripts.checks.dockerfile import instructions

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
LINKS = [(p, link) for p in PAGES for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", p.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("page", "link"), LINKS, ids=[f"{page.name}-{link}" for page, link in LINKS])
def test_links_lead_somewhere(page: Path, link: str) -> None:
    assert (page.parent / link).exists()


def test_design_page_names_every_module_in_the_row_of_its_room() -> None:
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    rows = {
        name: row
        for row in page.splitlines()
        if row[:3] == "| `"
        for name in re.findall(r"`(\w+/?)`", row.split("|")[1])
    }
    for path in sorted((ROOT / "es_flipout").rglob("*.py")):
        room, *inner = path.relative_to(ROOT / "es_flipout").parts
        if path.stem.startswith("__") or room == "envs":
            continue
        if inner:
            assert f"`{path.stem}`" in rows.get(f"{room}/", ""), (
                f"docs/design.md does not name {room}/{'/'.join(inner)}"
            )
        else:
            assert path.stem in rows, f"docs/design.md does not name {room}"
    beside = page.partition("`envs/` stands beside the rooms")[2].partition("\n\n")[0]
    for path in sorted((ROOT / "envs").glob("[a-z]*.py")):
        assert f"`{path.stem}`" in beside, f"docs/design.md does not name envs/{path.stem}.py"


def test_design_page_has_the_rooms_in_the_order_of_the_contract() -> None:
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    rows = [row.split("|")[1] for row in page.splitlines() if row.startswith("| `")]
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ][0]
    layers = " ".join(contract["layers"]).replace("|", " ").split()
    rooms = [name for row in rows for name in re.findall(r"`(\w+)/?`", row)]
    assert rooms == [name for name in layers if name != "__main__"]


def test_cluster_file_fits_the_schema_of_the_installed_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    util = pytest.importorskip("ray.autoscaler._private.util")
    import yaml

    config = yaml.safe_load((ROOT / "docs" / "cluster.yaml").read_text(encoding="utf-8"))
    util.validate_config(config)
    with pytest.raises(Exception, match="no_such_key"):  # the schema rejects unknown keys
        util.validate_config(config | {"no_such_key": 1})


def test_image_holds_what_a_wheel_is_built_from_and_what_checks_a_gpu() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    needed = {project["project"]["readme"], *project["project"]["license-files"], "pyproject.toml", "constraints.txt"}
    needed |= set(project["tool"]["setuptools"]["package-dir"].values())
    assert allowed == needed | {"scripts", "tests"}
    assert "*" in ignored
    dockerfile = instructions((ROOT / "Dockerfile").read_text(encoding="utf-8"))
    stages = [number for number, (name, _) in enumerate(dockerfile) if name == "FROM"]
    build, final = dockerfile[: stages[-1]], dockerfile[stages[-1] :]
    kept = [rest for name, rest in build if name == "RUN" and "/opt/checkout" in rest]
    assert len(kept) == 1
    assert {"pyproject.toml", "scripts", "tests"} <= set(kept[0].split())
    assert any(name == "COPY" and rest.endswith("/opt/checkout /opt/checkout") for name, rest in final)
    # one volume is enough for everything that is compiled on the machine
    caches = [rest for name, rest in final if name == "ENV" and "CACHE_DIR" in rest]
    assert all(pair.partition("=")[2].startswith("/home/es/.cache/") for rest in caches for pair in rest.split())
    assert {"TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"} == {p.partition("=")[0] for c in caches for p in c.split()}


def test_steps_of_the_dockerfile_are_read_as_they_are_written() -> None:
    text = 'ARG A=1\n# note\nFROM x AS build\nRUN a \\\n    # why\n    && b\n\nCMD ["c"]\n'
    read = [(name, " ".join(rest.split())) for name, rest in instructions(text)]
    assert read == [("ARG", "A=1"), ("FROM", "x AS build"), ("RUN", "a && b"), ("CMD", '["c"]')]
    dockerfile = instructions((ROOT / "Dockerfile").read_text(encoding="utf-8"))
    extras = next(rest for name, rest in dockerfile if name == "ARG" and rest.startswith("EXTRAS="))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(extras.removeprefix("EXTRAS=").split(",")) <= set(project["optional-dependencies"])
    assert dockerfile[-1] == ("CMD", '["es-flipout", "train", "HalfCheetah-v5"]')
    assert ("USER", str(USER)) in dockerfile
    assert base_image({}) == "docker.io/library/debian:bookworm-slim"
    assert base_image({"DEBIAN": "trixie"}) == "docker.io/library/debian:trixie-slim"
