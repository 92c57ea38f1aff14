"""Every preset is a valid configuration of its environment; preset files are read with checks of every value."""

import json
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from toy_envs import lanes_of

from es_flipout.config import TrainConfig
from es_flipout.envs import native_env_ids
from es_flipout.errors import UserError
from es_flipout.presets import preset, preset_ids, read_preset
from es_flipout.training.setup import make_trainer

IDS = sorted({*native_env_ids(), *preset_ids()})


@pytest.mark.parametrize("env_id", IDS)
def test_a_preset_can_be_trained(env_id: str) -> None:
    config = preset(env_id)
    assert config.task.env_id == env_id
    assert config.schedule.env_steps is not None
    small = config.replace(population_size=2, episodes=1)
    trainer = make_trainer(small)
    assert lanes_of(trainer)[0].env_id == env_id
    assert not trainer.finished
    for env in lanes_of(trainer):
        env.close()


def test_no_preset_is_for_an_environment_that_does_not_exist() -> None:
    assert set(preset_ids()) <= set(gymnasium.registry)


@pytest.mark.parametrize("env_id", IDS)
def test_the_prefix_changes_nothing_but_the_id(env_id: str) -> None:
    prefixed = preset(f"es_flipout/{env_id}")
    assert prefixed == preset(env_id).replace(env_id=f"es_flipout/{env_id}")


def test_other_environments_get_the_general_preset() -> None:
    general = preset("Nobody-v7")
    assert general.task.env_id == "Nobody-v7"
    assert general.schedule.env_steps is not None
    assert general.replace(env_steps=None) == TrainConfig.of("Nobody-v7")


@pytest.mark.parametrize("env_id", IDS)
def test_a_preset_can_be_written_to_a_file(tmp_path: Path, env_id: str) -> None:
    path = tmp_path / "preset.json"
    path.write_text(json.dumps(preset(env_id).flat()), encoding="utf-8")
    assert read_preset(path) == preset(env_id)


def test_a_preset_file_may_be_short(tmp_path: Path) -> None:
    path = tmp_path / "preset.json"
    path.write_text('{"sigma": 1, "hidden": [8]}', encoding="utf-8")
    assert read_preset(path) == TrainConfig.of("", sigma=1.0, hidden=(8,))


@pytest.mark.parametrize(
    ("contents", "line"),
    [
        (None, r"preset file .*preset\.json does not exist"),
        (b"{", r"preset\.json: not a preset file"),
        (b"\xff\xfe", r"preset\.json: not a preset file"),
        (b"[1]", r"preset\.json: not a preset file"),
        ({"sigmma": 0.1}, r"preset\.json: unknown option sigmma; did you mean sigma\?"),
        ({"xyzzy": 0.1}, r"preset\.json: unknown option xyzzy; the options are env_id, "),
        ({"sigma": "0.1"}, r"preset\.json: sigma must be a number, got '0\.1'"),
        ({"sigma": -1}, r"preset\.json: sigma must be greater than 0, got -1"),
        ({"population_size": 8.5}, r"preset\.json: population_size must be a whole number, got 8.5"),
        ({"env_steps": True}, r"preset\.json: env_steps must be a whole number or null, got True"),
        ({"optimizer": 3}, r"preset\.json: optimizer must be one of adam, sgd, clipup, got 3"),
        ({"optimizer": "lion"}, r"preset\.json: optimizer must be one of adam, sgd, clipup, got lion"),
        ({"observed": {"a": 1}}, r"preset\.json: observed must be a list of whole numbers or null, got {'a': 1}"),
        ({"env_steps": 2**63}, r"preset\.json: env_steps does not fit into 64 bits"),
        ({"population_size": 7}, r"preset\.json: population-size must be even"),
    ],
)
def test_a_preset_file_with_a_mistake_is_refused_by_name(tmp_path: Path, contents: Any, line: str) -> None:
    path = tmp_path / "preset.json"
    if contents is not None:
        path.write_bytes(contents if isinstance(contents, bytes) else json.dumps(contents).encode())
    with pytest.raises(UserError, match=line) as refused:
        read_preset(path)
    assert "\n" not in str(refused.value)
