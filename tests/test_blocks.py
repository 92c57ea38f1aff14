"""Every code block of the README and of docs/ is run.

Blocks of a page run in their order, in one folder: Python in one namespace, shell commands line by line. Loops of ten rounds and
more have three, and commands that train a reduced form (``REDUCED``); slow lines are left to the slow test. What cannot be run on
the machines that run the tests is preceded by ``<!-- not run: REASON -->`` on its page, or is listed in ``NOT_HERE``; even then,
every option of the ``es-flipout`` commands must exist.
"""

import contextlib
import importlib.util
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import command_line
import gymnasium
import pytest
import torch

from es_flipout import cli
from es_flipout.cli.entry import _COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>[^>]+?) -->\n)?^```(?P<info>[^\n]*)\n(?P<code>.*?)^```$", re.M | re.S)
_TRAIN = (
    "--population-size 4 --generations 1 --score-episodes 1 --evaluation-episodes 1 --checkpoint-every 1 --hidden 4"
)
REDUCED = {  # the last occurrence of an option counts
    "train": _TRAIN,
    "resume": "",
    "evaluate": "--episodes 1",
    "tune": "--trials 1 --seeds 1 --jobs 1 --confirm 0 --population-size 4 --env-steps 60 --score-episodes 1",
    "render": "--steps 3",
    "bench forward": "--widths 8 --populations 8 --rounds 1 --seconds-per-point 0 --memory-members 0 --wide 0",
    "bench rollout": "--env-ids HalfCheetah-v5 --populations 4 --rounds 1 --seconds 0 --shortest-episode 10 --no-gymnasium",
    "bench compare": "--population-size 4 --rounds 1 --seconds 0 --hidden 4 --workers 1",
}
NOT_HERE = {
    r"es-flipout play": "there is no display",
    r"--ray-address \d": "that machine is the reader's",
    r"--ray-address auto": "there is no cluster to join",
}
COMMAND = rf"es-flipout (?={'|'.join(_COMMANDS)})"
SLOW = r"--backend ray|es-flipout (bench|tune)|Ant-v5|MinAtar|65536"


@dataclass(frozen=True)
class Block:
    """A fenced block: its language and title, its code, and why it is not run."""

    info: str
    code: str
    reason: str | None

    @property
    def lines(self) -> list[str]:
        """Shell commands: continued lines are joined, comments and empty lines left out."""
        joined = re.sub(r"\s*\\\n\s*", " ", self.code).splitlines()
        return [line for line in (re.sub(r"(^|\s)#.*", "", line).strip() for line in joined) if line]


def blocks(page: Path) -> list[Block]:
    found = _BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Block(each["info"].strip(), each["code"], each["reason"]) for each in found]


WITH_BLOCKS = [page for page in PAGES if blocks(page)]
IDS = [page.relative_to(ROOT).as_posix() for page in WITH_BLOCKS]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to run in, from which modules can be imported; what a page registers is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(gymnasium.registry)
    yield tmp_path
    for name in set(gymnasium.registry) - before:
        gymnasium.registry.pop(name)
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=IDS)
def test_blocks_run(page: Path, here: Path) -> None:
    run_page(page, here, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_BLOCKS, ids=IDS)
def test_slow_lines_run(page: Path, here: Path) -> None:
    if not any(re.search(SLOW, line) for block in blocks(page) for line in block.lines):
        pytest.skip("every line of this page was run by the other test")
    run_page(page, here, slow=True)


def run_page(page: Path, here: Path, slow: bool) -> None:
    names: dict[str, object] = {}
    for block in blocks(page):
        language = block.info.split()[0] if block.info else "sh"
        if title := re.search(r'title="(\S+)"', block.info):
            (here / title[1]).write_text(block.code, encoding="utf-8")
        elif language == "python":
            if block.reason is None:
                exec(compile(re.sub(r"range\(\d\d+\)", "range(3)", block.code), str(page), "exec"), names)
        else:
            assert language == "sh", f"{page.name}: a block is python or sh, not {language}"
            for line in block.lines:
                with_reason = block.reason is not None or any(re.search(each, line) for each in NOT_HERE)
                if re.search(COMMAND, line):
                    options_exist(line)
                if not with_reason and (slow or not re.search(SLOW, line)):
                    run_line(line, here)


def arguments(line: str) -> list[str]:
    """The arguments after ``es-flipout``; a command in quotes is an argument of another one."""
    before, after = re.split(COMMAND, line, maxsplit=1)
    return shlex.split(after.rstrip(before[-1]) if before.endswith(("'", '"')) else after)


def options_exist(line: str) -> None:
    """With ``--help`` at its end, a command with an unknown option is refused and any other one prints its help."""
    said = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        cli.main([*arguments(line), "--help"])
    assert "error:" not in said.getvalue(), f"{line}: {said.getvalue()}"


def run_line(line: str, here: Path) -> None:
    """Run a shell command in its reduced form, or check what can be checked of it."""
    if line.startswith("make "):
        assert subprocess.run(["make", "-n", *shlex.split(line)[1:]], cwd=ROOT, capture_output=True).returncode == 0, (
            line
        )
    elif line.startswith("pip install "):
        extras = re.findall(r"es-flipout\[([\w,]+)\]", line)
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert extras or "es-flipout" in line, f"what is installed here? {line}"
        assert set(",".join(extras).split(",")) - {""} <= set(project["optional-dependencies"]), line
    elif re.match(r"es-flipout ", line):
        run_command(arguments(line), here)
    else:
        pytest.fail(f"this command is not run: {line!r}; give its block a reason (<!-- not run: ... -->)")


def run_command(words: list[str], here: Path) -> None:
    words = [existing(word, here) for word in words]
    name = " ".join(words[: 2 if words[0] == "bench" else 1])
    words += REDUCED.get(name, "").split()
    said = io.StringIO()
    if "ray" in words:  # in a process of its own, which ends Ray
        words += ["--workers", "1"]
        done = command_line.run(*words, cwd=here, timeout=400)  # Ray starts slowly on a busy machine
        code, text = done.returncode, done.stderr
    else:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = cli.main(words)
        text = said.getvalue()
    if "cuda" in words and name != "plan" and not torch.cuda.is_available():
        assert code == 2, text
        assert "finds no CUDA GPU" in text
    else:
        assert code == 0, f"es-flipout {' '.join(words)}: {text}"


def existing(word: str, here: Path) -> str:
    """A placeholder of a run directory (``runs/ENV_seed0_...``), replaced by the run that it stands for."""
    if not (named := re.fullmatch(r"runs/(\S+)_seed(\d+)_\.\.\.", word)):
        return word
    runs = sorted((here / "runs").glob(f"{named[1]}_seed{named[2]}_*"))
    if not runs:
        runs = [here / "runs" / f"{named[1]}_seed{named[2]}_earlier"]
        run_command(["train", named[1], "--seed", named[2], "--run-dir", str(runs[0])], here)
    return str(runs[-1])


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_options_in_the_text_exist(page: Path) -> None:
    for command in re.findall(r"`(es-flipout [^`\n]+ --[^`\n]+)`", page.read_text(encoding="utf-8")):
        options_exist(command)


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "cloud").glob("*.y*ml")), ids=lambda path: path.name)
def test_scripts_of_the_cloud_files_are_valid(path: Path) -> None:
    """What the tools' own parsers (``scripts/checks/cloud.py``) do not look into."""
    import yaml

    file = yaml.safe_load(path.read_text(encoding="utf-8"))
    scripts = [file[name] for name in ("setup", "run") if name in file] + file.get("commands", [])
    assert bool(scripts) == (file.get("type") != "fleet")
    for script in scripts:
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        for line in script.splitlines():
            if re.search(COMMAND, line):
                options_exist(line.replace("$SEED", "0"))


def test_a_command_with_an_unknown_option_is_noticed() -> None:
    options_exist("es-flipout train CartPole-v1 --sigma 0.1")
    with pytest.raises(AssertionError, match="unrecognized option --sigmas"):
        options_exist("es-flipout train CartPole-v1 --sigmas 0.1")


def test_a_command_that_is_not_run_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="is not run"):
        run_line("curl example.com", tmp_path)


@pytest.mark.slow
def test_notebook_runs(tmp_path: Path) -> None:
    import nbclient
    import nbformat

    source = ROOT / "docs" / "cloud" / "colab.ipynb"
    notebook = nbformat.read(source, as_version=4)
    shutil.copy(source, tmp_path)
    environment = {**os.environ, "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))}
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environment)
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert '"env_id": "CartPole-v1"' in printed
    first, last = re.search(r"(\d+) in the first generation, (\d+) in the last", printed).groups()  # type: ignore[union-attr]
    assert int(last) > 2 * int(first)


def test_pages_that_need_minatar_can_be_run() -> None:
    assert importlib.util.find_spec("minatar"), "the extra pixels is part of the extra dev"
