"""The preset that a search prints, and the one that it writes, are the configuration that it found."""

import ast
from pathlib import Path

import pytest

from es_flipout.config import TrainConfig
from es_flipout.presets import preset, read_preset
from es_flipout.tuning.result import preset_code, preset_json

FOUND = [
    preset("Pendulum-v1"),
    preset("Hopper-v5").replace(horizon=50, shaping="differences", weight_decay=0.003, learning_rate_final=None),
    TrainConfig.of("ns/Odd.Env-v0", env_kwargs='{"a": "\\"ü"}', observed=(0, 2), env_steps=123_456, hidden=(8,)),
]


@pytest.mark.parametrize("config", FOUND, ids=[config.task.env_id for config in FOUND])
def test_both_forms_are_the_configuration(tmp_path: Path, config: TrainConfig) -> None:
    elsewhere = config.replace(seed=7, threads=1, device="cpu", slots=3, evaluation_episodes=5)
    path = tmp_path / "preset.json"
    path.write_text(preset_json(elsewhere), encoding="utf-8")
    assert read_preset(path) == config, "seed and computation are not part of a preset"
    names: dict[str, object] = {"TrainConfig": TrainConfig}
    code = preset_code(elsewhere)
    exec(code, names)
    (function,) = ast.parse(code).body
    assert isinstance(function, ast.FunctionDef)
    made = names[function.name]
    assert callable(made)
    assert made(config.task.env_id) == config
