"""Every preset is a valid configuration of its environment."""

import pytest
from toy_envs import lanes_of

from es_flipout import presets
from es_flipout.config import TrainConfig
from es_flipout.envs import native_env_ids
from es_flipout.presets import preset
from es_flipout.training.setup import make_trainer

NATIVE = sorted(native_env_ids())


@pytest.mark.parametrize("env_id", NATIVE)
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
    assert set(presets._PRESETS) <= set(NATIVE)


@pytest.mark.parametrize("env_id", NATIVE)
def test_the_prefix_changes_nothing_but_the_id(env_id: str) -> None:
    prefixed = preset(f"es_flipout/{env_id}")
    assert prefixed == preset(env_id).replace(env_id=f"es_flipout/{env_id}")


def test_other_environments_get_the_general_preset() -> None:
    general = preset("Nobody-v7")
    assert general.task.env_id == "Nobody-v7"
    assert general.schedule.env_steps is not None
    assert general.replace(env_steps=None) == TrainConfig.of("Nobody-v7")
