"""Invalid options are rejected with a one-line message that names the option; JSON round trips are lossless."""

import dataclasses
import json
from typing import Any

import pytest

from es_flipout.config import PLACES, TrainConfig
from es_flipout.errors import UserError

NAN, INF = float("nan"), float("inf")

WRONG: dict[str, list[Any]] = {
    "sigma": [0.0, -0.1, NAN, INF],
    "sigma_final": [0.0, -1.0, NAN, INF],
    "learning_rate": [0.0, -0.1, NAN, INF],
    "learning_rate_final": [-0.1, NAN, INF],
    "momentum": [-0.1, 1.0, NAN],
    "weight_decay": [-0.1, NAN, INF],
    "output_gain": [NAN, INF],
    "episode_cap_until": [0.0, 1.1, NAN],
    "seed": [-1, 2**63],
    "population_size": [0, 1, 7, -2],
    "hidden": [(64, 0), (-1,)],
    "channels": [(16, 0)],
    "observed": [(0, -1)],
    "episodes": [0],
    "bases": [0],
    "rank": [0],
    "score_every": [0],
    "score_episodes": [0],
    "evaluation_episodes": [0],
    "checkpoint_every": [0],
    "keep_checkpoints": [0],
    "generations": [0, -1],
    "env_steps": [0],
    "starts": [0],
    "start_fraction": [0.0, -0.1, 1.0, NAN],
    "threads": [0],
    "slots": [0],
    "row_block": [0],
    "episode_cap": [0],
    "env_kwargs": ["{", "[1]", "3", ""],
}

# All values at the edge of their allowed range: the checks must not be too strict either.
EDGE = TrainConfig.of(
    "Any-v0",
    sigma=1e-12,
    sigma_final=1e-12,
    learning_rate=1e-12,
    learning_rate_final=0.0,
    momentum=0.0,
    weight_decay=0.0,
    episode_cap_until=1.0,
    seed=2**63 - 1,
    population_size=2,
    hidden=(),
    generations=1,
    env_steps=1,
    threads=1,
    slots=1,
    row_block=1,
    episode_cap=1,
)

# Options that exclude some of those below.
HORIZON = TrainConfig.of("Any-v0", horizon=7, shaping="differences", starts=3, start_fraction=0.1)

# A non-default value for every other field.
OTHER = TrainConfig.of(
    "Other-v3",
    env_kwargs='{"a": [1, null], "ü": "\\n"}',
    seed=2**62 + 1,
    generations=3,
    env_steps=10**13,
    population_size=9,
    episodes=2,
    sigma=0.1,
    sigma_final=1 / 3,
    perturbation="low_rank",
    base="gaussian",
    bases=2,
    rank=3,
    antithetic=False,
    optimizer="clipup",
    learning_rate=1e-7,
    learning_rate_final=0.0,
    momentum=0.1,
    weight_decay=0.3,
    hidden=(3,),
    policy="convnet",
    cell="lstm",
    channels=(3,),
    observed=(2, 0),
    activation="gelu",
    output_gain=1.0,
    squash="tanh",
    observation_norm=False,
    remove_alive_bonus=False,
    start_states="generation",
    episode_cap=5,
    episode_cap_until=0.7,
    kernels="torch",
    precision="tf32",
    device="cpu",
    physics="cpu",
    backend="ray",
    worker_kind="classic",
    workers=3,
    ray_address="auto",
    overlap=False,
    threads=1,
    slots=2,
    row_block=3,
    compile="off",
    score_every=4,
    score_episodes=5,
    evaluation_episodes=6,
    checkpoint_every=7,
    keep_checkpoints=8,
    anneal_generations=2,
    anneal_env_steps=10**12,
    track=("wandb",),
    video="gif",
)


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG.items() for value in values])
def test_a_value_out_of_range_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(UserError) as refused:
        TrainConfig.of("Any-v0").replace(**{field: value})
    message = str(refused.value)
    assert field.replace("_", "-") in message.replace("_", "-").split()[0], message
    assert "must be" in message
    assert str(value) in message
    assert "\n" not in message


def test_the_edges_are_allowed() -> None:
    assert dataclasses.replace(EDGE) == EDGE


def test_only_antithetic_populations_must_be_even() -> None:
    assert TrainConfig.of("Any-v0", population_size=7, antithetic=False).strategy.population_size == 7
    with pytest.raises(UserError, match=r"population-size must be even \(antithetic pairs\), got 7"):
        TrainConfig.of("Any-v0", population_size=7)


@pytest.mark.parametrize(("policy", "name"), [("recurrent", "hidden"), ("convnet", "channels")])
def test_a_policy_needs_its_layers(policy: str, name: str) -> None:
    with pytest.raises(UserError, match=f"{name} must be at least one size for a {policy} policy"):
        TrainConfig.of(**{"env_id": "Any-v0", "policy": policy, name: ()})


def test_json_round_trip_of_every_field() -> None:
    default, other, horizon = (config.flat() for config in (TrainConfig.of("Any-v0"), OTHER, HORIZON))
    same = [name for name, value in default.items() if value == other[name] == horizon[name]]
    assert not same, f"OTHER or HORIZON must differ from the defaults in every field, also in {same}"
    assert set(json.loads(OTHER.to_json())) == {"version", *TrainConfig.SUBJECTS}
    for config in (OTHER, EDGE, HORIZON, TrainConfig.of("Any-v0")):
        again = TrainConfig.from_json(config.to_json())
        assert again == config
        assert isinstance(again.policy.hidden, tuple)
        assert again.to_json() == config.to_json()


def test_flat_names_are_the_fields_of_all_subjects() -> None:
    flat = OTHER.flat()
    assert list(flat) == list(PLACES)
    assert len(flat) == sum(len(dataclasses.fields(kind)) for kind in TrainConfig.SUBJECTS.values())
    assert TrainConfig.of(**flat) == OTHER
    assert EDGE.replace(**flat) == OTHER
    assert (flat["policy"], flat["sigma"]) == (OTHER.policy.kind, OTHER.strategy.sigma)
    with pytest.raises(UserError, match="unknown option popsize"):
        OTHER.replace(popsize=3)
    with pytest.raises(UserError, match="unknown option kind"):
        TrainConfig.of("Any-v0", kind="linear")


def test_whole_floats_stay_floats() -> None:
    found = TrainConfig.from_json(with_changes("strategy", momentum=0)).strategy.momentum
    assert (found, type(found)) == (0.0, float)


def with_changes(subject: str, **changes: Any) -> str:
    values = json.loads(OTHER.to_json())
    return json.dumps(values | {subject: values[subject] | changes})


def test_a_configuration_from_before_a_field_existed_is_what_such_a_run_did() -> None:
    later = (
        "horizon",
        "shaping",
        "anneal_generations",
        "anneal_env_steps",
        "starts",
        "start_fraction",
        "compile",
        "track",
        "video",
    )
    for name in later:
        values = json.loads(OTHER.to_json())
        subject, field = PLACES[name]
        del values[subject][field]
        default = "off" if name == "compile" else TrainConfig.of("Any-v0").flat()[name]
        assert TrainConfig.from_json(json.dumps(values)) == OTHER.replace(**{name: default})
    for name in set(PLACES) - {*later}:
        values = json.loads(OTHER.to_json())
        subject, field = PLACES[name]
        del values[subject][field]
        with pytest.raises(UserError, match=f"in {subject} it has no {field}"):
            TrainConfig.from_json(json.dumps(values))


FLAT = json.dumps({"env_id": "Any-v0", "sigma": 0.1})  # the format of version 0.1.0


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "not a configuration of es_flipout"),
        (OTHER.to_json()[:100], "not a configuration of es_flipout"),
        ("[]", "not a JSON object"),
        ("null", "not a JSON object"),
        (FLAT, "it has no task, policy, strategy"),
        (json.dumps(json.loads(OTHER.to_json()) | {"tasks": {}}), "unknown tasks"),
        (json.dumps(json.loads(OTHER.to_json()) | {"task": [], "version": "0.0.7"}), r"es_flipout 0\.0\.7 wrote it"),
        (json.dumps(json.loads(OTHER.to_json()) | {"policy": 3}), "policy is not a JSON object"),
        (with_changes("policy", dropout=0.5), "dropout"),
        (with_changes("policy", hidden=64), "policy.hidden must be a list of whole numbers, got 64"),
        (with_changes("policy", hidden=[64.0]), "policy.hidden must be a whole number, got 64.0"),
        (with_changes("policy", observation_norm=1), "policy.observation_norm must be true or false, got 1"),
        (with_changes("task", env_id=False), "task.env_id must be a string, got False"),
        (with_changes("task", episodes=True), "task.episodes must be a whole number, got True"),
        (with_changes("strategy", bases=1.5), "strategy.bases must be a whole number, got 1.5"),
        (with_changes("strategy", sigma="large"), "strategy.sigma must be a number, got 'large'"),
        (with_changes("strategy", sigma=-1.0), "sigma must be greater than 0"),
        (with_changes("strategy", perturbation="sparse"), "perturbation must be one of"),
        (with_changes("strategy", optimizer="lion"), "optimizer must be one of"),
        (with_changes("policy", kind="transformer"), "policy must be one of"),
        (with_changes("policy", activation="step"), "activation must be one of"),
        (with_changes("policy", squash="sin"), "squash must be one of"),
        (with_changes("task", start_states="random"), "start-states must be one of"),
        (with_changes("strategy", base="uniform"), "base must be one of"),
        (with_changes("compute", overlap="abc"), "compute.overlap must be true or false or null, got 'abc'"),
    ],
)
def test_json_of_another_version_is_refused(text: str, named: str) -> None:
    with pytest.raises(UserError, match=named) as refused:
        TrainConfig.from_json(text)
    assert "\n" not in str(refused.value)


def test_progress_is_the_larger_fraction() -> None:
    config = EDGE.replace(generations=10, env_steps=1000)
    assert config.schedule.progress(0, 0) == 0.0
    assert config.schedule.progress(5, 100) == 0.5
    assert config.schedule.progress(1, 900) == 0.9
    assert config.schedule.progress(10, 0) == 1.0
    assert config.schedule.progress(3, 1700) == 1.0
    assert config.replace(generations=None).schedule.progress(99, 250) == 0.25
    assert config.replace(env_steps=None).schedule.progress(2, 10**9) == 0.2
    assert config.replace(generations=None, env_steps=None).schedule.progress(5, 5) == 0.0


def test_sigma_and_learning_rate_move_linearly() -> None:
    config = TrainConfig.of("Any-v0", sigma=0.5, sigma_final=0.25, learning_rate=0.5, learning_rate_final=1.0)
    assert [config.strategy.sigma_at(p) for p in (0.0, 0.5, 1.0)] == [0.5, 0.375, 0.25]
    assert [config.strategy.learning_rate_at(p) for p in (0.0, 0.5, 1.0)] == [0.5, 0.75, 1.0]
    still = TrainConfig.of("Any-v0", sigma=0.3, learning_rate=0.7)
    assert {still.strategy.sigma_at(p) for p in (0.0, 0.3, 1.0)} == {0.3}
    assert {still.strategy.learning_rate_at(p) for p in (0.0, 0.3, 1.0)} == {0.7}
    assert TrainConfig.of("Any-v0", learning_rate=0.5, learning_rate_final=0.0).strategy.learning_rate_at(1.0) == 0.0


def test_the_episode_cap_grows_to_the_limit_and_goes() -> None:
    config = TrainConfig.of("Any-v0", episode_cap=100, episode_cap_until=0.5)
    assert [config.task.episode_cap_at(p, 1000) for p in (0.0, 0.25, 0.499)] == [100, 550, 998]
    assert [config.task.episode_cap_at(p, 1000) for p in (0.5, 1.0)] == [None, None]
    assert [config.task.episode_cap_at(p, None) for p in (0.0, 0.49, 0.5)] == [100, 100, None]
    uncapped = TrainConfig.of("Any-v0")
    assert [uncapped.task.episode_cap_at(p, 1000) for p in (0.0, 1.0)] == [None, None]
