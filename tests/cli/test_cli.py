"""The command line: a run from start to end in a real process, and one-line messages for all user errors."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
from command_line import ROOT, SMALL, run, the_line
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import es_flipout
from es_flipout import cli
from es_flipout.config import TrainConfig
from es_flipout.envs import native_env_ids
from es_flipout.presets import preset
from es_flipout.training.checkpoint import atomic_write, checkpoints, load_checkpoint
from es_flipout.training.metrics import COLUMNS
from es_flipout.training.run_directory import load_agent

EVALUATION = {"env_id", "episodes", "mean_return", "std_return", "median_return", "versions"}


def strictly(text: str) -> dict[str, Any]:
    """Parse strict JSON, without NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not valid JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Run from start to end in a real process."""
    folder = tmp_path_factory.mktemp("trained")
    return folder / "run", run("train", "CartPole-v1", *SMALL, "--seed", "5", "--run-dir", "run", cwd=folder)


@pytest.fixture
def run_dir(trained: tuple[Path, Any], tmp_path: Path) -> Path:
    """Return a copy of the trained run that a test may damage."""
    return Path(shutil.copytree(trained[0], tmp_path / "copy"))


# A run from start to end.


def test_train_ends_with_the_score_and_the_place(trained: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    run_dir, done = trained
    assert done.returncode == 0, done.stderr
    evaluation = json.loads((run_dir / "evaluation.json").read_text(encoding="utf-8"))
    score, *_, effort, place = done.stdout.splitlines()
    _, progress = load_checkpoint(run_dir / "checkpoints")
    assert score.startswith(
        f"best policy (generation {progress.best_generation}): score {evaluation['mean_return']:,.1f} "
        f"(sd {evaluation['std_return']:,.1f}, "
    )
    assert f"over 3 episodes of CartPole-v1 in Gymnasium {gymnasium.__version__}" in score
    assert (evaluation["which"], evaluation["generation"]) == ("best", progress.best_generation)
    assert effort.startswith(f"trained on {progress.env_steps:,} environment steps in ")
    assert place == "run directory: run"
    assert "gen 3" in done.stderr.splitlines()[-1], "without a terminal the last generation is one line on stderr"
    assert "Traceback" not in done.stderr


def test_the_run_directory_is_complete(trained: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    run_dir, _ = trained
    assert {path.name for path in run_dir.iterdir()} == {
        "config.json",
        "environment.json",
        "metrics.csv",
        "tensorboard",
        "checkpoints",
        "evaluation.json",
        "policy.safetensors",
        "best.safetensors",
    }
    config = TrainConfig.from_json((run_dir / "config.json").read_text(encoding="utf-8"))
    assert (config.task.env_id, config.schedule.seed, config.strategy.population_size, config.schedule.generations) == (
        "CartPole-v1",
        5,
        4,
        3,
    )
    assert (config.policy.hidden, config.schedule.env_steps) == ((4,), None)
    usual = preset("CartPole-v1")
    assert (config.strategy.sigma, config.strategy.learning_rate) == (
        usual.strategy.sigma,
        usual.strategy.learning_rate,
    ), "the rest is the preset's"
    environment = json.loads((run_dir / "environment.json").read_text(encoding="utf-8"))
    assert set(environment) == {"versions", "hardware", "commit"}
    assert environment["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert environment["hardware"]["cores"] >= 1
    header, *rows = (run_dir / "metrics.csv").read_text(encoding="utf-8").splitlines()
    assert header == ",".join(COLUMNS)
    assert [row.split(",")[0] for row in rows] == ["1", "2", "3"]
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("mean_return")] == [1, 2, 3]
    assert [path.stem[-1] for path in checkpoints(run_dir / "checkpoints")] == ["0", "2", "3"]
    agent, _ = load_agent(run_dir)
    assert float(agent.state_dict()["observation_norm.count"]) > 0
    assert not [path for path in run_dir.rglob("*") if path.suffix in (".pt", ".pkl", ".tmp")]


def test_the_evaluation_is_that_of_the_saved_policy(trained: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    run_dir, _ = trained
    done = run("evaluate", run_dir, "--episodes", "3", "--json", cwd=run_dir.parent)
    assert (done.returncode, done.stderr) == (0, "")
    printed = strictly(done.stdout)
    written = strictly((run_dir / "evaluation.json").read_text(encoding="utf-8"))
    assert set(written) >= EVALUATION
    assert printed == written
    assert (written["env_id"], written["episodes"]) == ("CartPole-v1", 3)
    assert written["mean_return"] > 0


def test_evaluate_prints_a_table(trained: tuple[Path, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", str(trained[0]), "--episodes", "2"]) == 0
    captured = capsys.readouterr()
    table = dict(line.split(maxsplit=1) for line in captured.out.splitlines())
    assert set(table) >= EVALUATION - {"versions"}
    assert (table["env_id"], table["episodes"]) == ("CartPole-v1", "2")
    assert float(table["mean_return"]) > 0
    assert captured.err == ""


def test_resume_of_a_finished_run_scores_it_again(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run_dir / "metrics.csv").read_bytes()
    evaluation = (run_dir / "evaluation.json").read_bytes()
    (run_dir / "evaluation.json").unlink()
    assert cli.main(["resume", str(run_dir)]) == 0
    assert f"run directory: {run_dir}" in capsys.readouterr().out
    assert (run_dir / "metrics.csv").read_bytes() == before
    assert (run_dir / "evaluation.json").read_bytes() == evaluation


def test_options_may_come_before_the_environment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *SMALL, "--run-dir", str(tmp_path / "run"), "Acrobot-v1", "--generations=1"]) == 0
    config = TrainConfig.from_json((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert (config.task.env_id, config.schedule.generations, config.schedule.env_steps) == ("Acrobot-v1", 1, None)
    usual, other = preset("Acrobot-v1"), preset("CartPole-v1")
    assert (usual.strategy.learning_rate, usual.strategy.sigma) != (
        other.strategy.learning_rate,
        other.strategy.sigma,
    ), "compare something else"
    assert (config.strategy.learning_rate, config.strategy.sigma) == (
        usual.strategy.learning_rate,
        usual.strategy.sigma,
    )


def test_options_win_over_a_preset_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.json"
    own = {"sigma": 0.3, "population_size": 6, "generations": 2, "hidden": [3], "antithetic": False}
    file.write_text(json.dumps({"env_id": "Acrobot-v1", **own}), encoding="utf-8")

    def trained_with(name: str, *args: str) -> TrainConfig:
        given = [
            "--preset",
            str(file),
            "--device=cpu",
            "--evaluation-episodes",
            "1",
            "--run-dir",
            str(tmp_path / name),
            *args,
        ]
        assert cli.main(["train", *given]) == 0
        return TrainConfig.from_json((tmp_path / name / "config.json").read_text(encoding="utf-8"))

    fixed = {"evaluation_episodes": 1, "device": "cpu", "physics": "cpu"}
    expected = TrainConfig.of_json({"env_id": "Acrobot-v1", **own}).replace(**fixed)
    assert trained_with("a") == expected
    changed = trained_with("b", "CartPole-v1", "--population-size=7", "--env-steps", "100", "--learning-rate", "0.5")
    wanted = {"env_id": "CartPole-v1", "population_size": 7, "env_steps": 100, "learning_rate": 0.5}
    assert changed == expected.replace(**wanted, generations=None), "the file's limit does not end the run early"
    capsys.readouterr()


def test_a_preset_file_may_leave_the_environment_open(
    tmp_path: Path, refused: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.json"
    file.write_text('{"population_size": 10}', encoding="utf-8")
    assert f"names no environment: es-flipout plan ENV_ID --preset {file}" in refused("plan", "--preset", file)
    assert "--config and --preset both" in refused("train", "--preset", file, "--config", file)
    assert "--preset needs a value" in refused("plan", "CartPole-v1", "--preset")
    assert cli.main(["plan", "CartPole-v1", f"--preset={file}"]) == 0
    assert capsys.readouterr().out.startswith("CartPole-v1: 10 members")


def test_a_policy_with_memory_goes_on_to_the_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["CartPole-v1", *SMALL, "--policy", "recurrent", "--cell", "lstm", "--observed", "2", "0"]
    options += ["--learning-rate", "0.1", "--learning-rate-final", "0.1"]  # independent of the length of the run
    assert cli.main(["train", *options, "--run-dir", str(tmp_path / "whole"), "--generations", "4"]) == 0
    assert cli.main(["train", *options, "--run-dir", str(tmp_path / "parts"), "--generations", "2"]) == 0
    config = tmp_path / "parts" / "config.json"
    config.write_text(
        config.read_text(encoding="utf-8").replace('"generations": 2', '"generations": 4'), encoding="utf-8"
    )
    assert cli.main(["resume", str(tmp_path / "parts")]) == 0
    whole, parts = (load_agent(tmp_path / name)[0].state_dict() for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert "policy.cells.0.weight_hh" in whole
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []
    capsys.readouterr()
    assert cli.main(["evaluate", str(tmp_path / "parts"), "--episodes", "2", "--json"]) == 0
    assert strictly(capsys.readouterr().out)["episodes"] == 2


def test_a_run_directory_is_found_without_being_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "es_flipout/CartPole-v1", *SMALL]) == 0
    (made,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"es_flipout_CartPole-v1_seed0_[\d_-]+", made.name)
    assert capsys.readouterr().out.endswith(f"run directory: runs/{made.name}\n")
    assert (made / "evaluation.json").exists()


def test_envs_lists_every_environment_with_a_backend_or_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["envs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = {line.split()[0]: line.split()[1] for line in lines[:-1]}
    assert listed == native_env_ids() | {"LunarLander-v3": "gymnasium", "BipedalWalker-v3": "gymnasium"}
    assert [line.split()[0] for line in lines if "extra box2d" in line] == ["LunarLander-v3", "BipedalWalker-v3"]
    assert "Gymnasium" in lines[-1]


def test_help_is_complete_and_needs_no_torch(tmp_path: Path) -> None:
    code = """
import contextlib, io, sys
from es_flipout.cli import main
commands = ("train", "resume", "evaluate", "envs", "tune")
for arguments in ([], ["--help"], ["-h"], ["--version"], *([c, "--help"] for c in commands)):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            status = main(arguments)
        except SystemExit as stop:
            status = stop.code
    assert status in (0, None), (arguments, status)
    print("==", *arguments)
    print(out.getvalue())
assert not {"torch", "gymnasium", "mujoco", "optuna"} & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    _, empty, long, short, version, train, resume, evaluate, envs, tune = done.stdout.split("==")
    for text in (empty, long, short):
        assert all(f"  {command} " in text for command in ("train", "resume", "evaluate", "envs", "tune", "bench"))
    assert f"es-flipout {es_flipout.__version__}" in version
    for option in ("--seed", "--population-size", "--sigma", "--perturbation", "--generations", "--env-steps"):
        assert option in train
    for option in ("--device", "--backend", "--run-dir", "flipout,low_rank,dense", "auto,cpu,cuda", "local,ray"):
        assert option in train
    assert all(option in tune for option in ("--trials", "--seeds", "--jobs", "--search", "--env-steps", "--output"))
    assert "Directory of the run" in resume
    assert all(option in evaluate for option in ("Run directory", "--episodes", "--json"))
    assert "list what can be trained" in envs.lower()


@pytest.mark.parametrize(("command", "name"), [("train", "ENV"), ("resume", "RUN"), ("evaluate", "RUN")])
def test_help_names_the_argument(capsys: pytest.CaptureFixture[str], command: str, name: str) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    usage = capsys.readouterr().out.splitlines()[0]
    assert re.search(rf"usage: es-flipout {command} .*{name}([_-]|$)", usage), usage


def test_help_of_an_environment_shows_its_preset(capsys: pytest.CaptureFixture[str]) -> None:
    shown: dict[str, int] = {}
    for env_id in ("CartPole-v1", "HalfCheetah-v5"):
        with pytest.raises(SystemExit) as stop:
            cli.main(["train", env_id, "--help"])
        assert stop.value.code in (0, None)
        match = re.search(r"--env-steps.*?default:[│|\s]*(\d+)", capsys.readouterr().out, re.DOTALL)
        assert match is not None
        shown[env_id] = int(match[1])
    assert shown == {env_id: preset(env_id).schedule.env_steps for env_id in shown}
    assert len(set(shown.values())) == 2


# User errors, in real processes.


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


# User errors, in this process.


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


@pytest.mark.filterwarnings("ignore:.*The reward is a NaN value")  # Gymnasium's checker
def test_nan_rewards_in_the_evaluation_are_still_json(oddities: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = oddities / "run"
    assert cli.main(["train", "oddities:NanAlways-v0", *SMALL, "--run-dir", str(run_dir)]) == 0
    assert set(strictly((run_dir / "evaluation.json").read_text(encoding="utf-8"))) >= EVALUATION
    capsys.readouterr()
    assert cli.main(["evaluate", str(run_dir), "--json", "--trust"]) == 0
    assert set(strictly(capsys.readouterr().out)) >= EVALUATION


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


# Damage to a run directory.


@pytest.mark.parametrize("command", ["resume", "evaluate"])
def test_not_a_run_directory(refused: Any, tmp_path: Path, command: str) -> None:
    assert f"{tmp_path} is not a run directory: it has no config.json" in refused(command, tmp_path)
    file = tmp_path / "file"
    file.touch()
    assert str(file) in refused(command, file)


def damage_config(run_dir: Path, kind: str) -> None:
    path = run_dir / "config.json"
    whole = path.read_text(encoding="utf-8")
    if kind == "binary":
        path.write_bytes(b"\xff\xfe\x00")
    elif kind == "truncated":
        path.write_text(whole[: len(whole) // 2], encoding="utf-8")
    elif kind == "empty":
        path.write_text("", encoding="utf-8")
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    else:
        subject, change = {
            "unknown key": ("policy", {"dropout": 0.5}),
            "unknown choice": ("strategy", {"optimizer": "lion"}),
            "out of range": ("strategy", {"sigma": -1}),
            "other network": ("policy", {"hidden": [5]}),
            "no such environment": ("task", {"env_id": "Nowhere-v0"}),
        }[kind]
        values = json.loads(whole)
        path.write_text(json.dumps(values | {subject: values[subject] | change}), encoding="utf-8")


@pytest.mark.parametrize("command", ["resume", "evaluate"])
@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("binary", r"config\.json"),
        ("truncated", r"config\.json: not a configuration of es_flipout"),
        ("empty", r"config\.json: not a configuration of es_flipout"),
        ("folder", r"config\.json"),
        ("unknown key", r"config\.json: not a configuration of es_flipout.*dropout"),
        ("unknown choice", r"config\.json.*optimizer.*lion"),
        ("out of range", r"config\.json.*sigma must be greater than 0"),
        ("other network", r"does not fit"),
        ("no such environment", r"unknown environment 'Nowhere-v0'"),
    ],
)
def test_a_damaged_configuration(refused: Any, run_dir: Path, command: str, kind: str, line: str) -> None:
    damage_config(run_dir, kind)
    said = refused(command, run_dir)
    assert re.search(line, said), said


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("changed byte", r"generation_000003\.safetensors is damaged: its checksum is wrong"),
        ("truncated", r"generation_000003\.safetensors is damaged: its checksum is wrong"),
        ("truncated json", r"generation_000003\.json is damaged"),
        ("other version", r"generation_000003\.json was written by es_flipout 0\.0\.1"),
        ("no checkpoints", r"checkpoints contains no complete checkpoint"),
    ],
)
def test_a_damaged_checkpoint(refused: Any, run_dir: Path, kind: str, line: str) -> None:
    tensors = run_dir / "checkpoints" / "generation_000003.safetensors"
    meta = tensors.with_suffix(".json")
    raw = tensors.read_bytes()
    if kind == "changed byte":
        tensors.write_bytes(raw[:-5] + bytes([raw[-5] ^ 4]) + raw[-4:])
    elif kind == "truncated":
        tensors.write_bytes(raw[:-5])
    elif kind == "truncated json":
        meta.write_bytes(meta.read_bytes()[:50])
    elif kind == "other version":
        meta.write_text(json.dumps(json.loads(meta.read_text()) | {"version": "0.0.1"}), encoding="utf-8")
    else:
        shutil.rmtree(run_dir / "checkpoints")
    said = refused("resume", run_dir)
    assert re.search(line, said), said


def test_the_checkpoint_before_a_damaged_one_goes_on(
    trained: tuple[Path, Any], run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (run_dir / "checkpoints").glob("generation_000003.*"):
        path.unlink()
    assert cli.main(["resume", str(run_dir)]) == 0
    again, whole = (json.loads((path / "evaluation.json").read_text()) for path in (run_dir, trained[0]))
    assert again == whole


@pytest.mark.parametrize("kind", ["missing", "truncated", "changed byte"])
def test_a_damaged_policy(refused: Any, run_dir: Path, kind: str) -> None:
    path = run_dir / "policy.safetensors"
    raw = path.read_bytes()
    if kind == "missing":
        path.unlink()
        (run_dir / "best.safetensors").unlink()
    elif kind == "truncated":
        path.write_bytes(raw[:-5])
    else:
        path.write_bytes(raw[:-5] + bytes([raw[-5] ^ 4]) + raw[-4:])
    said = refused("evaluate", run_dir, "--episodes", "1", "--which", "last")
    assert re.search(rf"policy\.safetensors is ({'missing' if kind == 'missing' else 'damaged'})", said), said


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
