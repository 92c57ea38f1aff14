"""The command line: a run from start to end in a real process, and help."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
from command_line import ROOT, SMALL, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import es_flipout
from es_flipout import cli
from es_flipout.config import TrainConfig
from es_flipout.envs import native_env_ids
from es_flipout.presets import preset
from es_flipout.training.checkpoint import checkpoints, load_checkpoint
from es_flipout.training.metrics import COLUMNS
from es_flipout.training.run_directory import load_agent

EVALUATION = {"env_id", "episodes", "mean_return", "std_return", "median_return", "versions"}


def strictly(text: str) -> dict[str, Any]:
    """Parse strict JSON, without NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not valid JSON")

    return json.loads(text, parse_constant=refuse)


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

    fixed = {"evaluation_episodes": 1, "device": "cpu", "physics": "cpu", "compile": "off"}  # the last as decided
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


@pytest.mark.filterwarnings("ignore:.*The reward is a NaN value")  # Gymnasium's checker
def test_nan_rewards_in_the_evaluation_are_still_json(oddities: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = oddities / "run"
    assert cli.main(["train", "oddities:NanAlways-v0", *SMALL, "--run-dir", str(run_dir)]) == 0
    assert set(strictly((run_dir / "evaluation.json").read_text(encoding="utf-8"))) >= EVALUATION
    capsys.readouterr()
    assert cli.main(["evaluate", str(run_dir), "--json", "--trust"]) == 0
    assert set(strictly(capsys.readouterr().out)) >= EVALUATION
