"""User errors are one line that names the mistake, and exit code 2."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import SMALL, run, the_line

from es_flipout import cli
from es_flipout.training.checkpoint import atomic_write, load_checkpoint

# In real processes.


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["train", "HalfChetah-v5"], r"unknown environment 'HalfChetah-v5'; did you mean HalfCheetah-v5"),
        (
            ["train", "CartPole-v1", "--population-size", "7"],
            r"population-size must be even \(antithetic pairs\), got 7",
        ),
        (["train", "CartPole-v1", "--popsize", "8"], r"unrecognized option --popsize"),
        (["trian", "CartPole-v1"], r"unknown command 'trian': did you mean train\?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path, args: list[str], line: str) -> None:
    done = run(*args, cwd=tmp_path)
    assert re.search(line, the_line(done.returncode, done.stdout, done.stderr))
    assert list(tmp_path.iterdir()) == []


def test_an_environment_that_raises_is_named_and_its_checkpoint_kept(oddities: Path) -> None:
    done = run("train", "oddities:Raising-v0", *SMALL, "--run-dir", "run", "--checkpoint-every", "50", cwd=oddities)
    line = the_line(done.returncode, done.stdout, done.stderr)
    assert re.search(r"Raising-v0: RuntimeError: the gearbox fell off \(File .*oddities\.py, line 24\)", line)
    _, progress = load_checkpoint(oddities / "run" / "checkpoints")
    assert progress.generation == 2, "12 steps to a generation, and the 30th step fails"


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    args = ["train", "CartPole-v1", *SMALL, "--generations", "60", "--score-every", "1000", "--run-dir", "run"]
    done = run(*args, cwd=tmp_path, file_size=2500)
    # TensorBoard's events may be the first file for which there is no room; then a warning comes first.
    last = done.stderr.splitlines(keepends=True)[-1]
    assert re.search(r"File too large", the_line(done.returncode, done.stdout, last))
    assert not list(tmp_path.rglob("*.tmp"))
    assert load_checkpoint(tmp_path / "run" / "checkpoints")[1].generation >= 0


# In this process.


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["train"], r"which environment\? .*es-flipout envs"),
        (["train", "CartPole-v7"], r"unknown environment 'CartPole-v7'; did you mean CartPole-v1"),
        (["train", "HalfCheetah"], r"unknown environment 'HalfCheetah'; did you mean HalfCheetah-v5"),
        (["train", "es_flipout/Hoper-v5"], r"unknown environment 'Hoper-v5'; did you mean Hopper-v5"),
        (["train", "nosuchmodule:Env-v0"], r"nosuchmodule:Env-v0: cannot import nosuchmodule"),
        (["train", "Xqzj"], r"unknown environment 'Xqzj'"),
        (["train", "CartPole-v1", "Acrobot-v1"], r"Acrobot-v1.*--help"),
        (["train", "CartPole-v1", "--sigma", "0"], r"sigma must be greater than 0, got 0"),
        (["train", "CartPole-v1", "--sigma", "-0.1"], r"sigma must be greater than 0, got -0\.1"),
        (["train", "CartPole-v1", "--sigma", "nan"], r"sigma must be greater than 0, got nan"),
        (["train", "CartPole-v1", "--sigma", "wide"], r"sigma.*wide.*--help"),
        (["train", "CartPole-v1", "--sigma"], r"sigma.*--help"),
        (["train", "CartPole-v1", "--population-size", "0"], r"population-size must be at least 2, got 0"),
        (["train", "CartPole-v1", "--learning-rate", "inf"], r"learning-rate must be greater than 0, got inf"),
        (["train", "CartPole-v1", "--generations", "0"], r"generations must be at least 1, got 0"),
        (["train", "CartPole-v1", "--seed", "-1"], r"seed must be in"),
        (
            ["train", "CartPole-v1", "--perturbation", "sparse"],
            r"--perturbation must be one of flipout, low_rank, dense, got sparse",
        ),
        (["train", "CartPole-v1", "--popsize", "8"], r"--popsize"),
        (["train", "--popsize", "8", "CartPole-v1"], r"--popsize"),
        (["train", "CartPole-v1", "--backend", "ray", "--ray-address", "there"], r"ray-address must be host:port"),
        (["train", "CartPole-v1", "--backend", "ray", "--ray-address", "127.0.0.1:1"], r"no Ray cluster answers at"),
        (["train", "CartPole-v1", "--backend", "ray", "--workers", "0"], r"workers must be at least 1, got 0"),
        (["train", "CartPole-v1", "--env-kwargs", "{"], r"env.kwargs must be a JSON object"),
        (["train", "CartPole-v1", "--env-kwargs", "[]"], r"env.kwargs must be a JSON object"),
        (["train", "CartPole-v1", "--env-kwargs", '{"gravity": 3}'], r"CartPole-v1: unsupported keyword 'gravity'"),
        (["train", "LunarLander-v3", "--env-kwargs", '{"winds": 3}'], r"LunarLander-v3.*(winds|box2d|Box2D)"),
        (["train", "CartPole-v1", "--env-kwargs", '{"num_envs": 3}'], r"num_envs"),
        (["train", "CartPole-v1", "--env-kwargs", '{"threads": 3}'], r"threads"),
        (["train", "CartPole-v1", "--env-kwargs", '{"env_id": 3}'], r"env_id"),
        (["train", "CartPole-v1", "--env-kwargs", '{"device": "mars"}'], r"device"),
        (["train", "CartPole-v1", "--env-kwargs", '{"max_episode_steps": 0}'], r"max_episode_steps"),
        (["train", "CartPole-v1", "--observed", "0", "4"], r"CartPole-v1: observed entries must be in \[0, 4\), got 4"),
        (["train", "CartPole-v1", "--policy", "convnet"], r"ConvNet needs observations of shape \(H, W\)"),
        (
            ["train", "CartPole-v1", "--policy", "transformer"],
            r"--policy must be one of .*recurrent, convnet, got transformer",
        ),
        (["resume"], r"RUN_DIR is required .*--help"),
        (["evaluate"], r"RUN is required .*--help"),
        (["evaluate", "nowhere", "--episodes", "0"], r"episodes must be at least 1, got 0"),
        (["evaluate", "nowhere"], r"run directory nowhere does not exist"),
        (["resume", "nowhere"], r"run directory nowhere does not exist"),
        (["envs", "--all"], r"--all"),
        (["fly"], r"unknown command 'fly': choose from train, resume, evaluate, "),
        (["--seed", "3"], r"unknown command '--seed'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_line_names_the_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Any, args: list[str], line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    said = refused(*args)
    assert re.search(line, said, re.IGNORECASE), said
    assert len(said) < 400, said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_gpu(refused: Any, tmp_path: Path) -> None:
    said = refused("train", "CartPole-v1", "--device", "cuda", "--run-dir", tmp_path / "run")
    assert "torch finds no CUDA GPU" in said
    assert "use --device cpu" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (
            "TupleAction",
            r"oddities:TupleAction-v0: actions must be Discrete, MultiDiscrete, MultiBinary or .*Box, not Tuple",
        ),
        ("SequenceObservation", r"oddities:SequenceObservation-v0: observations of .*Sequence"),
        (
            "Unmakeable",
            r"oddities:Unmakeable-v0 cannot be created: RuntimeError: no license found \(File .*, line 10\)",
        ),
    ],
)
def test_an_environment_that_cannot_be_used(refused: Any, oddities: Path, name: str, line: str) -> None:
    said = refused("train", f"oddities:{name}-v0", "--run-dir", oddities / "run")
    assert re.search(line, said), said
    assert not (oddities / "run").exists()


def test_nan_rewards_are_warned_of_once(oddities: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = oddities / "run"
    args = ["--generations", "6", "--population-size", "8", "--sigma", "0.5", "--run-dir", str(run_dir)]
    assert cli.main(["train", "oddities:Nan-v0", *SMALL, *args]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "NaN" in line]
    (warning,) = warnings
    assert re.match(r"warning: \d of 8 members had a NaN return in generation 1; they rank worst", warning)
    nan_returns = [int(line.split(",")[-1]) for line in (run_dir / "metrics.csv").read_text().splitlines()[1:]]
    assert len(nan_returns) == 6
    assert sum(count > 0 for count in nan_returns) > 1


@pytest.mark.parametrize("taken", ["not empty", "a file"])
def test_a_run_directory_that_exists(refused: Any, tmp_path: Path, taken: str) -> None:
    run_dir = tmp_path / "run"
    if taken == "a file":
        run_dir.write_text("precious", encoding="utf-8")
    else:
        run_dir.mkdir()
        (run_dir / "precious").touch()
    assert re.search(
        f"run directory {run_dir} exists: choose another", refused("train", "CartPole-v1", "--run-dir", run_dir)
    )
    assert run_dir.is_file() or [path.name for path in run_dir.iterdir()] == ["precious"]


@pytest.mark.parametrize("place", ["/dev/null/run", "/proc/run"])
def test_no_permission_to_write(refused: Any, place: str) -> None:
    assert place in refused("train", "CartPole-v1", *SMALL, "--run-dir", place)


def test_no_space_left_at_all(refused: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", no_space)
        assert "No space left on device" in refused("train", "CartPole-v1", *SMALL, "--run-dir", run_dir)
    assert list(run_dir.iterdir()) == []
    assert cli.main(["train", "CartPole-v1", *SMALL, "--run-dir", str(run_dir)]) == 0, "an empty directory can be used"


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace"])
def test_no_space_left_for_a_checkpoint(
    refused: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    run_dir = tmp_path / "run"
    write = atomic_write
    full = False

    def fills_up(path: Path, data: bytes | str) -> None:
        nonlocal full
        if "generation_000002" in path.name and not full:
            full = True
            monkeypatch.setattr(step, no_space)
        write(path, data)

    def no_space(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("es_flipout.training.checkpoint.atomic_write", fills_up)
    assert "No space left on device" in refused("train", "CartPole-v1", *SMALL, "--run-dir", run_dir)
    monkeypatch.undo()
    assert load_checkpoint(run_dir / "checkpoints")[1].generation == 0
    assert cli.main(["resume", str(run_dir)]) == 0, "with free space, the run continues"


# Ctrl-C outside of training.


def test_ctrl_c_while_the_final_score_is_played(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pressed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("es_flipout.cli.session.evaluate", pressed)
        try:
            code = cli.main(["train", "CartPole-v1", *SMALL, "--run-dir", str(run_dir)])
        except KeyboardInterrupt:
            pytest.fail("a traceback instead of a clean end")
    captured = capsys.readouterr()
    assert f"es-flipout resume {run_dir}" in captured.out + captured.err
    assert code in (0, 130)
    assert cli.main(["resume", str(run_dir)]) == 0
    assert (run_dir / "evaluation.json").exists()
