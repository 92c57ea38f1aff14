"""One configuration per environment, and preset files. Does not import torch.

Those of ``TUNED`` were tuned; ``results/LOG.md`` lists what was tried. The others are starting points: some have a row in
``results/learning_*``, of runs that are shorter than the preset.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from es_flipout import schema
from es_flipout.config import TrainConfig
from es_flipout.errors import UserError

TUNED = frozenset(
    {
        "CartPole-v1",
        "Pendulum-v1",
        "Acrobot-v1",
        "MountainCar-v0",
        "MountainCarContinuous-v0",
        "InvertedPendulum-v5",
        "InvertedDoublePendulum-v5",
        "Reacher-v5",
        "Pusher-v5",
        "Swimmer-v5",
        "HalfCheetah-v5",
        "Hopper-v5",
        "Walker2d-v5",
    }
)
"""Environments whose preset was tuned."""

_NATIVE_PREFIX = "es_flipout/"

# Where a policy must not fall, small steps of bounded length learn more than Adam's (results/LOG.md).
_CLIPUP: dict[str, Any] = {
    "policy": "linear",
    "sigma": 0.02,
    "optimizer": "clipup",
    "learning_rate": 0.0075,
    "momentum": 0.9,
}
_LARGER_STEPS = _CLIPUP | {"learning_rate": 0.015}
# In short trials, Humanoid learned more with Adam and larger perturbations than with ClipUp.
_ADAM_DIFFERENCES: dict[str, Any] = {
    "policy": "linear",
    "squash": "tanh",
    "population_size": 64,
    "shaping": "differences",
    "learning_rate": 0.02,
}


def preset(env_id: str) -> TrainConfig:
    """Return the configuration of an environment; environments without a preset get the general one.

    Args:
        env_id: a Gymnasium id, with or without the prefix ``es_flipout/`` of the native environments.
    """
    base_id = env_id.removeprefix(_NATIVE_PREFIX)
    return _PRESETS.get(base_id, _general)(env_id)


def preset_ids() -> tuple[str, ...]:
    """Return the ids that have a preset of their own."""
    return tuple(_PRESETS)


def read_preset(path: Path) -> TrainConfig:
    """Read a preset file: the arguments of :meth:`TrainConfig.of` as a JSON object, such as ``{"sigma": 0.1}``.

    Args:
        path: the file. Options that it does not name have their general defaults; the environment is then ``""``.

    Raises:
        UserError: the file is missing or is not a JSON object, or names an unknown option or a value that is not
            allowed; the message names the option.
    """
    try:
        values = schema.load_object(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"preset file {path} does not exist") from None
    except schema.NOT_AS_EXPECTED as error:
        raise UserError(f"{path}: not a preset file, which is a JSON object ({error})") from None
    try:
        return TrainConfig.of_json({"env_id": "", **values})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _general(env_id: str) -> TrainConfig:
    return TrainConfig.of(env_id, env_steps=1_000_000)


def _cartpole(env_id: str) -> TrainConfig:
    return TrainConfig.of(
        env_id,
        env_steps=200_000,
        population_size=32,
        sigma=0.1,
        learning_rate=0.1,
        learning_rate_final=0.01,
        hidden=(32, 32),
        score_every=5,
        checkpoint_every=20,
    )


def _pendulum(env_id: str) -> TrainConfig:
    # Many small generations with plain SGD: with Adam the outputs saturate before the policy balances. With as many
    # bases as pairs, every pair has independent noise, which a population this small can afford (results/families_*).
    # A quarter of the seeds never balances; of two starts the better one goes on.
    return TrainConfig.of(
        env_id,
        env_steps=2_000_000,
        starts=2,
        start_fraction=0.15,
        base="gaussian",
        bases=8,
        population_size=8,
        sigma=0.1,
        sigma_final=0.05,
        optimizer="sgd",
        momentum=0.0,
        learning_rate=0.04,
        learning_rate_final=0.002,
        hidden=(16,),
        activation="relu",
        output_gain=1.0,
        squash="tanh",
        score_every=100,
        checkpoint_every=100,
    )


def _acrobot(env_id: str) -> TrainConfig:
    return TrainConfig.of(
        env_id,
        env_steps=1_000_000,
        population_size=64,
        sigma=0.1,
        learning_rate=0.05,
        learning_rate_final=0.005,
        hidden=(32, 32),
        score_every=5,
    )


def _mountain_car(env_id: str) -> TrainConfig:
    return TrainConfig.of(
        env_id,
        env_steps=1_000_000,
        population_size=64,
        sigma=0.3,
        learning_rate=0.1,
        learning_rate_final=0.01,
        hidden=(16,),
        score_every=2,
    )


def _inverted_pendulum(env_id: str) -> TrainConfig:
    return TrainConfig.of(
        env_id,
        env_steps=1_000_000,
        population_size=64,
        sigma=0.05,
        learning_rate=0.03,
        learning_rate_final=0.003,
        score_every=5,
    )


def _inverted_double_pendulum(env_id: str) -> TrainConfig:
    # Almost the whole reward is the alive bonus: without it the policy learns to fall gently. Once no member falls,
    # ranks only reward moving less; a small sigma and small steps would then yield a policy that is not robust, so
    # sigma stays large.
    return TrainConfig.of(
        env_id,
        env_steps=1_000_000,
        policy="linear",
        population_size=64,
        sigma=0.05,
        learning_rate=0.02,
        learning_rate_final=0.01,
        remove_alive_bonus=False,
        score_episodes=64,  # falls are rare, so that 16 episodes do not tell the best policy
    )


def _swimmer(env_id: str) -> TrainConfig:
    # Of three starts the best one goes on: one seed in five learns to swim late.
    return TrainConfig.of(
        env_id,
        env_steps=1_500_000,
        starts=3,
        start_fraction=0.15,
        base="gaussian",
        bases=8,  # one per pair, as for Pendulum
        policy="linear",
        observation_norm=False,
        population_size=16,
        sigma=0.1,
        learning_rate=0.05,
        learning_rate_final=0.01,
    )


def _half_cheetah(env_id: str) -> TrainConfig:
    # Episodes do not end early here, so segments of them say as much as whole ones, and there are ten times as many
    # updates. Some seeds learn a slow gait at first that they never leave; it is unlikely that three starts all do.
    return TrainConfig.of(
        env_id,
        env_steps=10_000_000,
        horizon=100,
        shaping="differences",
        starts=3,
        policy="linear",
        squash="tanh",
        population_size=64,
        sigma=0.05,
        learning_rate=0.03,
        learning_rate_final=0.005,
        weight_decay=0.1,
        score_every=50,
        checkpoint_every=50,
    )


def _hopper(env_id: str) -> TrainConfig:
    return TrainConfig.of(env_id, env_steps=4_000_000, population_size=50, **_CLIPUP)


def _walker(env_id: str) -> TrainConfig:
    # Twice the step and half the population of pgpelib's recipe reached 2,500 after 0.85M steps instead of 3.2M.
    return TrainConfig.of(env_id, env_steps=10_000_000, population_size=50, **_LARGER_STEPS)


def _ant(env_id: str) -> TrainConfig:
    return TrainConfig.of(env_id, env_steps=20_000_000, population_size=32, score_every=5, **_LARGER_STEPS)


def _humanoid(env_id: str) -> TrainConfig:
    # Positions and velocities are the first 45 of 348 entries. Adam with larger perturbations and weights that are
    # differences had 430 after 0.4M steps, ClipUp with ranks 360 after 0.6M.
    return TrainConfig.of(
        env_id,
        env_steps=50_000_000,
        observed=tuple(range(45)),
        sigma=0.05,
        score_every=20,
        **_ADAM_DIFFERENCES,
    )


def _humanoid_standup(env_id: str) -> TrainConfig:
    # Episodes never end early: as for HalfCheetah.
    return _half_cheetah(env_id).replace(env_steps=2_000_000, starts=1, score_every=20, checkpoint_every=20)


def _reacher(env_id: str) -> TrainConfig:
    # Found by es-flipout tune: the score depends on precision, so steps and perturbations are small.
    return TrainConfig.of(
        env_id,
        env_steps=1_000_000,
        shaping="differences",
        population_size=64,
        sigma=0.0127,
        sigma_final=0.0075,
        learning_rate=0.0047,
        learning_rate_final=0.0009,
        weight_decay=0.1,
    )


def _pusher(env_id: str) -> TrainConfig:
    return _reacher(env_id).replace(env_steps=2_000_000)


def _lunar_lander(env_id: str) -> TrainConfig:
    return TrainConfig.of(
        env_id,
        env_steps=2_000_000,
        population_size=64,
        sigma=0.1,
        learning_rate=0.05,
        learning_rate_final=0.005,
        hidden=(16,),
        score_every=5,
    )


def _bipedal_walker(env_id: str) -> TrainConfig:
    # Falling costs so much that most runs learn to stand still. With large perturbations and short episodes at first, one
    # seed of three began to walk.
    return TrainConfig.of(
        env_id,
        env_steps=5_000_000,
        episode_cap=400,
        episode_cap_until=1.0,
        sigma=0.1,
        score_every=5,
        **_ADAM_DIFFERENCES,
    )


_PRESETS = {
    "CartPole-v1": _cartpole,
    "Pendulum-v1": _pendulum,
    "Acrobot-v1": _acrobot,
    "MountainCar-v0": _mountain_car,
    "MountainCarContinuous-v0": _mountain_car,
    "InvertedPendulum-v5": _inverted_pendulum,
    "InvertedDoublePendulum-v5": _inverted_double_pendulum,
    "Swimmer-v5": _swimmer,
    "Reacher-v5": _reacher,
    "Pusher-v5": _pusher,
    "HalfCheetah-v5": _half_cheetah,
    "Hopper-v5": _hopper,
    "Walker2d-v5": _walker,
    "Ant-v5": _ant,
    "Humanoid-v5": _humanoid,
    "HumanoidStandup-v5": _humanoid_standup,
    "LunarLander-v3": _lunar_lander,
    "BipedalWalker-v3": _bipedal_walker,
}
