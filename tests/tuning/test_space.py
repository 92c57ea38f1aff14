"""The search space contains the configuration from which it starts, and every trial in it is a valid configuration."""

from typing import Any

import optuna
import pytest

from es_flipout.config import TrainConfig
from es_flipout.envs import native_env_ids
from es_flipout.errors import UserError
from es_flipout.presets import preset
from es_flipout.tuning.result import preset_options
from es_flipout.tuning.search import _traits
from es_flipout.tuning.space import NAMES, Choice, LogRange, Traits, configured, make_space, start_of, suggest

RUNNER = Traits(box_actions=True, alive_bonus=True, restorable=True, max_episode_steps=1000)
POLE = Traits(box_actions=False, alive_bonus=False, restorable=True, max_episode_steps=500)
FOREIGN = Traits(box_actions=True, alive_bonus=False, restorable=False, max_episode_steps=None)


@pytest.mark.parametrize("env_id", sorted(native_env_ids()))
def test_the_search_starts_from_the_preset(env_id: str) -> None:
    config = preset(env_id)
    space = make_space(config, _traits(config))
    assert {"learning_rate", "sigma", "population_size", "policy"} <= set(space)
    for domain in space.values():
        inside = (
            domain.low <= domain.start <= domain.high if isinstance(domain, LogRange) else domain.start in domain.values
        )
        assert inside
    assert preset_options(configured(config, start_of(space))) == preset_options(config)


def test_the_space_follows_the_task() -> None:
    only_runner = {"squash", "remove_alive_bonus"}
    runner, pole = (set(make_space(preset(e), t)) for e, t in (("Hopper-v5", RUNNER), ("CartPole-v1", POLE)))
    assert runner - pole == only_runner
    foreign = set(make_space(TrainConfig.of("Foreign-v0"), FOREIGN))
    assert runner - foreign == {"horizon", "episode_cap", "episode_cap_until", "remove_alive_bonus"}
    assert set(make_space(preset("Hopper-v5"), RUNNER, fixed=("sigma", "hidden"))) == runner - {"sigma", "policy"}
    assert list(make_space(preset("Hopper-v5"), RUNNER, ("episodes", "sigma"), ("sigma",))) == ["sigma", "episodes"]


@pytest.mark.parametrize(
    ("env_steps", "sizes"),
    [
        (None, (8, 16, 32, 64, 128)),
        (5 * 500 * 128, (8, 16, 32, 64, 128)),
        (5 * 500 * 128 - 1, (8, 16, 32, 64)),
        (1000, (8, 16, 32)),
    ],
)
def test_no_population_uses_up_the_run_in_a_few_generations(env_steps: int | None, sizes: tuple[int, ...]) -> None:
    config = TrainConfig.of("Any-v0", population_size=32, env_steps=env_steps)
    domain = make_space(config, POLE, ["population_size"])["population_size"]
    assert domain == Choice(32, sizes)


@pytest.mark.parametrize(
    ("changes", "traits", "names", "line"),
    [
        ({}, RUNNER, ["speed"], "speed cannot be searched; choose from learning_rate, "),
        ({}, POLE, ["squash"], "squash cannot be searched with discrete actions"),
        ({}, POLE, ["remove_alive_bonus"], "Any-v0, which has no alive bonus"),
        ({}, FOREIGN, ["horizon"], "Any-v0, whose state cannot be restored"),
        ({}, FOREIGN, ["episode_cap"], "Any-v0, which has no time limit"),
        ({"policy": "recurrent"}, RUNNER, ["horizon"], "with a recurrent policy"),
        ({"policy": "convnet"}, RUNNER, ["policy"], "with a convnet policy"),
        ({"start_states": "generation"}, RUNNER, ["horizon"], "start states shared"),
        ({"episode_cap": 50}, RUNNER, ["horizon"], "with an episode cap"),
        ({"horizon": 50}, RUNNER, ["episode_cap"], "with a horizon"),
        ({}, RUNNER, ["episode_cap_until"], "without an episode cap"),
        ({"antithetic": False}, RUNNER, ["shaping"], "without antithetic pairs"),
        ({"antithetic": False, "population_size": 7}, RUNNER, ["antithetic"], "with an odd population"),
    ],
)
def test_what_cannot_be_searched_is_refused(changes: Any, traits: Traits, names: list[str], line: str) -> None:
    with pytest.raises(UserError, match=line):
        make_space(TrainConfig.of("Any-v0", **changes), traits, names)


@pytest.mark.parametrize(
    "start", [{}, {"horizon": 30}, {"episode_cap": 30}, {"antithetic": False}, {"policy": "recurrent"}]
)
def test_every_trial_is_a_valid_configuration(start: dict[str, Any]) -> None:
    config = TrainConfig.of("Any-v0", **start)
    left_out = {"horizon"} if start.get("policy") == "recurrent" else set()
    space = make_space(config, RUNNER, [name for name in NAMES if name not in left_out])
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen: dict[str, set[Any]] = {name: set() for name in space}
    for _ in range(100):
        trial = study.ask()
        made = suggest(trial, space, config)  # raises if the options contradict each other
        for name, value in trial.params.items():
            seen[name].add(value)
        flat, values = made.flat(), trial.params
        assert configured(config, values) == made, "a trial can be read back from its values"
        assert flat["sigma"] == float(f"{values['sigma']:.3g}")
        assert flat["learning_rate_final"] == pytest.approx(
            values["learning_rate"] * values["learning_rate_final"], rel=0.01
        )
        if flat["horizon"] is not None:
            assert flat["episode_cap"] is None
            assert not {"episode_cap", "episode_cap_until"} & set(values)
        assert ("shaping" in values) == flat["antithetic"]
        kind, *hidden = values["policy"].split()
        assert flat["policy"] == kind
        assert not hidden or flat["hidden"] == tuple(map(int, hidden))
    for name, domain in space.items():
        if not isinstance(domain, LogRange):
            assert seen[name] == set(domain.values), "every value can occur"
