"""Runs are found by path, and policies of the repository by name."""

from pathlib import Path

import pytest
from tools.runs import write_run

import es_flipout
from es_flipout import cli
from es_flipout.errors import UserError
from es_flipout.tools import source


def test_zoo_names_are_run_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "ZOO", tmp_path)
    with pytest.raises(UserError, match="the zoo is part of the repository"):
        source.find_run("zoo:CartPole-v1")
    write_run(tmp_path / "CartPole-v1", "CartPole-v1", policy="linear")
    write_run(tmp_path / "Pendulum-v1", "Pendulum-v1", policy="linear")
    assert es_flipout.load("zoo:Pendulum-v1").config.task.env_id == "Pendulum-v1"
    assert cli.main(["evaluate", "zoo:CartPole-v1", "--episodes", "1"]) == 0
    with pytest.raises(UserError, match=r"the zoo has no policy 'Cartpole': did you mean zoo:CartPole-v1\?"):
        source.find_run("zoo:Cartpole")
    with pytest.raises(UserError, match=r"no policy 'Xyzzy': choose from CartPole-v1, Pendulum-v1"):
        source.find_run("zoo:Xyzzy")
    assert source.find_run("zoo/CartPole-v1") == Path("zoo/CartPole-v1")
