"""Mistakes and accidents that once ended in a traceback, in silence or in a dead end."""

import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command_line import ROOT, SMALL, run, the_line

from es_flipout import cli
from es_flipout.cli.session import going_on
from es_flipout.config import TrainConfig
from es_flipout.errors import UserError
from es_flipout.presets import TUNED
from es_flipout.training.checkpoint import checkpoints
from es_flipout.training.run_directory import read_config

# More environments as written by a user.
MODULES = {
    "raising": "raise OSError('no board\\nfound')",
    "exiting": "import sys\nsys.exit('bye')",
    "misspelt": "import gymnasium\ndef f(:\n    pass\n",
    "needy": "import not_installed_anywhere",
    "mine": """
import gymnasium, numpy as np

class Mine(gymnasium.Env):
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, shape=(2,), fail=None, observe=0.0):
        self.observation_space = gymnasium.spaces.Box(-9, 9, tuple(shape), np.float32)
        self.fail, self.observe = fail, observe

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.full(self.observation_space.shape, self.observe, np.float32), {}

    def step(self, action):
        self.t += 1
        if self.fail == "exit":
            raise SystemExit(3)
        if self.fail == "numpy":
            np.zeros(3) + np.zeros(2)
        return np.full(self.observation_space.shape, self.observe, np.float32), 1.0, self.t == 3, False, {}

gymnasium.register("Good-v0", Mine)
""",
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with the modules, which is the current one."""
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        sys.modules.pop(name, None)
    import gymnasium

    gymnasium.registry.pop("Good-v0", None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["raising:X-v0"], r"raising cannot be imported: OSError: no board found \(File .*raising\.py, line 1\)"),
        (["exiting:X-v0"], r"exiting cannot be imported: SystemExit: bye \(File .*exiting\.py, line 2\)"),
        (["misspelt:X-v0"], r"misspelt cannot be imported: SyntaxError: .*\(misspelt\.py, line 2\)"),
        (["needy:X-v0"], r"needy cannot be imported: ModuleNotFoundError.*not_installed_anywhere.*needy\.py, line 1"),
        (["nowhere:X-v0"], r"cannot import nowhere .*searched the current folder \(.*\), PYTHONPATH and the installed"),
        (["mine:Good-v0", "--env-kwargs", '{"shape": 3}'], r"cannot be created: TypeError: .*mine\.py, line \d+\)"),
        (["mine:Good-v0", "--env-kwargs", '{"fail": "exit"}'], r"Good-v0: SystemExit: 3 \(File .*mine\.py, line 19\)"),
        (["mine:Good-v0", "--env-kwargs", '{"fail": "numpy"}'], r"ValueError: operands .*\(File .*mine\.py, line 21\)"),
        (
            ["CartPole-v1", "--env-kwargs", '{"sutton_barto_reward": 1}'],
            r"sutton_barto_reward must be true or false, got 1",
        ),
        (["Hopper-v5", "--env-kwargs", '{"healthy_reward": "much"}'], r"healthy_reward must be a number, got 'much'"),
        (["Hopper-v5", "--env-kwargs", '{"healthy_z_range": [1]}'], r"healthy_z_range must be tuple\[float, float\]"),
        (["Hopper-v5", "--env-kwargs", '{"max_episode_steps": 1e99}'], r"max_episode_steps must be a positive integer"),
        (["Hopper-v5", "--env-kwargs", "[" * 5000], r"env-kwargs must be a JSON object"),
        (["CartPole-v1", "--hidden", "1000000", "1000000"], r"a policy of 1,000,\d{3},000,002 parameters .* GB"),
        (["CartPole-v1", "--hidden", "1e10", "1e10"], r"hidden \(10000000000, 10000000000\) is too large"),
        (["CartPole-v1", "--population-size", "1e13"], r"10000000000000 members.*needs at least"),
        (["CartPole-v1", "--row-block", "2147483648"], r"needs at least .* es-flipout plan"),
        (["Hopper-v5", "--slots", "10G"], r"10000000000 parallel environments needs at least"),
        (["CartPole-v1", "--generations", "99999999999999999999"], r"generations must be less than 2\*\*63"),
        (["CartPole-v1", "--hidden", "99999999999999999999"], r"hidden must be less than 2\*\*63"),
        (["CartPole-v1", "--lr", "1"], r"unrecognized option --lr; did you mean --learning-rate\?"),
        (["CartPole-v1", "--popsize", "8"], r"--popsize; did you mean --population-size\?"),
        (["CartPole-v1", "--total-timesteps=8"], r"--total-timesteps; did you mean --env-steps\?"),
        (
            ["CartPole-v1", "--env-steps", "1.5"],
            r"--env-steps must be a whole number such as 1000, 1e6 or 10k, got 1\.5",
        ),
        (["ALE/Pong-v5"], r"ALE/Pong-v5 needs a package that is missing: pip install ale-py"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_the_line(here: Path, refused: Any, args: list[str], line: str) -> None:
    said = refused("train", *SMALL[:4], *args, "--run-dir", "run")
    assert re.search(line, said), said


def test_the_traceback_is_there_on_request(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "raising:X-v0", "--traceback"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert "raise OSError('no board" in err
    assert err.splitlines()[-1].startswith("error: raising:X-v0")


def test_the_current_folder_counts(here: Path) -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("es-flipout"), "train", "mine:Good-v0", *SMALL, "--run-dir", "run"],
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    args = ["--env-steps", "2e2", "--hidden", "4,3", "--score-episodes=1", "--evaluation-episodes", "1"]
    assert cli.main(["train", "CartPole-v1", *args, "--seed", "1_0", "--run-dir", str(tmp_path / "run")]) == 0
    config = read_config(tmp_path / "run")
    assert (config.schedule.env_steps, config.policy.hidden, config.schedule.seed) == (200, (4, 3), 10)


@pytest.mark.filterwarnings("ignore:.*obs returned")  # Gymnasium's checker
@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["CartPole-v1", "--workers", "2"], r"warning: --workers has no effect without --backend ray"),
        (
            ["mine:Good-v0", "--env-kwargs", '{"shape": [8, 8]}'],
            r"warning: the observations are images of shape \(8, 8\)",
        ),
        (["mine:Good-v0", "--env-kwargs", '{"observe": NaN}'], r"warning: all 4 episodes of generation 1 ended with"),
        (["mine:Good-v0"], r"(?!.*warning)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_would_go_wrong_in_silence(
    here: Path, capsys: pytest.CaptureFixture[str], args: list[str], line: str
) -> None:
    assert cli.main(["train", *args, *SMALL, "--run-dir", "run"]) == 0
    assert re.match(line, capsys.readouterr().err, re.DOTALL)


def test_envs_says_what_is_tuned(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["envs"]) == 0
    lines = capsys.readouterr().out.splitlines()[:-1]
    tuned = {line.split()[0] for line in lines if line.endswith(", tuned")}
    assert tuned == TUNED
    assert all(line.endswith(("tuned", "not tuned")) for line in lines)


def test_a_run_that_died_before_its_first_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    assert cli.main(["train", "CartPole-v1", *SMALL, "--run-dir", str(whole)]) == 0
    run_dir.mkdir()
    (run_dir / "config.json").write_bytes((whole / "config.json").read_bytes())
    assert cli.main(["resume", str(run_dir)]) == 0
    assert (run_dir / "policy.safetensors").read_bytes() == (whole / "policy.safetensors").read_bytes()
    assert [path.name for path in checkpoints(run_dir / "checkpoints")] == [
        path.name for path in checkpoints(whole / "checkpoints")
    ]
    left = tmp_path / "left"
    left.mkdir()
    for name in (".config.json.tmp", "environment.json"):
        (left / name).touch()
    assert cli.main(["train", "CartPole-v1", *SMALL, "--run-dir", str(left)]) == 0, "no run, so nothing to continue"


def test_files_have_the_umask_of_the_user(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        assert cli.main(["train", "CartPole-v1", *SMALL, "--run-dir", str(tmp_path / "run")]) == 0
    finally:
        os.umask(before)
    made = [path for path in (tmp_path / "run").rglob("*")]
    assert len(made) > 8
    for path in made:
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), path


def test_a_full_disk_says_which_file_and_how_to_go_on(tmp_path: Path) -> None:
    args = ["train", "CartPole-v1", *SMALL, "--generations", "60", "--score-every", "1000", "--run-dir", "run"]
    done = run(*args, cwd=tmp_path, file_size=2500)
    line = the_line(done.returncode, done.stdout, done.stderr.splitlines(keepends=True)[-1])
    assert re.search(
        r"File too large: '.*run/.*'; free some space, then continue with: es-flipout resume run$", line
    ), line


# Signals outside of training, in real processes that wait where the signal is to arrive.

WAITING = """
import os, signal, sys, time
import es_flipout.training.{module} as module

def waits(*args, **kwargs):
    print("waiting", flush=True)
    time.sleep(60)

module.{function} = waits
import es_flipout.cli.session as session
if hasattr(session, "{function}"):
    session.{function} = waits
from es_flipout.cli import main
sys.exit(main())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize(
    ("module", "function", "line", "code"),
    [
        ("setup", "make_trainer", "stopped by {name}; training had not begun; nothing was written\n", None),
        ("evaluate", "evaluate", "stopped while scoring; score with: es-flipout resume run\n", 0),
    ],
)
def test_a_signal_outside_of_training(
    tmp_path: Path, number: signal.Signals, module: str, function: str, line: str, code: int | None
) -> None:
    code_of_child = WAITING.format(module=module, function=function)
    process = subprocess.Popen(
        [sys.executable, "-c", code_of_child, "train", "CartPole-v1", *SMALL, "--generations", "1", "--run-dir", "run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        while process.stdout.readline() != "waiting\n":
            assert process.poll() is None
        for each in (number, signal.SIGTERM, signal.SIGHUP):  # the others come when all is being ended
            process.send_signal(each)
            time.sleep(0.02)
        out, err = process.communicate(timeout=100)
    finally:
        process.kill()
    assert "Traceback" not in err
    assert (err + out).endswith(line.format(name=number.name)), (out, err)
    assert process.returncode == (128 + number if code is None else code)
    assert (tmp_path / "run").exists() == (code == 0)


@pytest.mark.parametrize("end", ["returns", "raises", "exits", "killed"])
def test_the_last_words_of_a_process_that_ray_ends(end: str, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Ray's threads end the process as ``exits`` does: no Python code runs after that."""
    child = os.fork()
    if child == 0:
        try:
            with going_on(TrainConfig.of("CartPole-v1", backend="ray"), tmp_path / "a run"):
                if end == "exits":
                    os._exit(1)
                elif end == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                elif end == "raises":
                    raise UserError("of the user")
        except UserError:
            pass
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    until, said = time.monotonic() + 10, ""
    while "\n" not in said and end in ("exits", "killed") and time.monotonic() < until:
        said += capfd.readouterr().err
    assert said.count("error: ") == (end in ("exits", "killed"))
    assert said.endswith(f"continue with: es-flipout resume '{tmp_path}/a run'\n") or not said
    assert capfd.readouterr() == ("", "")
