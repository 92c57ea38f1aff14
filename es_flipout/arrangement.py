"""Where policies and physics are computed: what was asked for, or what a short measurement found faster.

There are three arrangements. All on the CPU; policies on a GPU and physics on the CPU, in two halves that take turns; and all
on the GPU, for the environments that this package has there (torch and MuJoCo's).
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch

from es_flipout.agent import Agent
from es_flipout.config import TrainConfig
from es_flipout.device_player import DevicePlayer
from es_flipout.device_rollout import DeviceEnv
from es_flipout.envs import UnsupportedEnvironmentError, make_env, native_env_ids
from es_flipout.envs.make import NAMESPACE
from es_flipout.envs.native import NativeBatchEnv
from es_flipout.envs.observed import ObservedBatchEnv
from es_flipout.errors import UserError
from es_flipout.perturbations import family_of
from es_flipout.plan import slots_that_fit
from es_flipout.player import LocalPlayer, Player, make_lanes, slots_for
from es_flipout.rollout import start_seeds
from es_flipout.strategy import EvolutionStrategy

_SECONDS = 1.5  # of one measurement, about
_TRIAL_STEPS = 16  # of every episode, in the trial that says how many steps fill that time


def _nobody(message: str) -> None:
    """Says nothing."""


class Arrangement(NamedTuple):
    """Device of the policies and of the physics."""

    device: str
    physics: str

    def __str__(self) -> str:
        if self.device == "cpu":
            return "CPU"
        return "GPU" if self.physics == "gpu" else "GPU with physics on the CPU"

    def of(self, config: TrainConfig) -> TrainConfig:
        """The configuration with this arrangement."""
        return dataclasses.replace(config, device=self.device, physics=self.physics)


def resolve(config: TrainConfig, say: Callable[[str], None] = _nobody) -> TrainConfig:
    """The configuration with device, physics and (for physics on the GPU) slots decided, so that a resumed run keeps them.

    Args:
        config: what was asked for.
        say: called with what was measured and chosen.

    Raises:
        UserError: what was asked for cannot be had here.
    """
    only_cpu = config.device == "cpu" or config.worker_kind == "classic"
    missing = "device cpu was asked for" if only_cpu else missing_cuda()
    if missing is not None:
        if config.device == "cuda":
            raise UserError(f"device cuda was asked for, but {missing}; use --device cpu")
        if config.physics == "gpu":
            raise UserError(f"physics gpu was asked for, but {missing}; use --physics cpu")
        return Arrangement("cpu", "cpu").of(config)
    options = _options(config)
    chosen = options[0] if len(options) == 1 else faster(options, lambda option: measured(option.of(config)), say)
    resolved = chosen.of(config)
    if chosen.physics == "gpu" and config.slots is None and config.backend == "local":
        resolved = dataclasses.replace(resolved, slots=slots_that_fit(resolved))
    return resolved


def planned(config: TrainConfig) -> TrainConfig:
    """As :func:`resolve`, without measuring anything and also where the GPU is not at hand: for a plan."""
    if config.device == "cpu" or (config.device == "auto" and missing_cuda() is not None):
        if config.physics == "gpu":
            raise UserError("physics gpu needs device cuda")
        return Arrangement("cpu", "cpu").of(config)
    return _options(dataclasses.replace(config, device="cuda"))[0].of(config)


def missing_cuda() -> str | None:
    """Why torch cannot use a GPU here, in words; None if it can."""
    if torch.version.cuda is None and torch.version.hip is None:
        return "torch sees no CUDA GPU here (this build of torch is for the CPU only)"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        return None
    reason = f" ({str(said[-1].message).partition('. ')[0]})" if said else ""
    return f"torch sees no CUDA GPU here{reason}"


def _options(config: TrainConfig) -> list[Arrangement]:
    """The arrangements that agree with the configuration, where there is a GPU."""
    backend = native_env_ids().get(config.env_id.removeprefix(NAMESPACE))
    if config.physics == "gpu" and backend is None:
        raise UserError(f"{config.env_id} has no physics for the GPU; use --physics cpu")
    everywhere = [Arrangement("cpu", "cpu"), Arrangement("cuda", "cpu")]
    if backend is not None:
        everywhere.append(Arrangement("cuda", "gpu"))
    options = [option for option in everywhere if config.physics in ("auto", option.physics)]
    if config.device == "cuda":
        return [option for option in options if option.device == "cuda"][-1:]  # with the physics, if it may
    if config.backend == "ray":
        return options[:1]
    if backend == "torch" and config.physics == "auto":
        options.remove(Arrangement("cuda", "cpu"))  # environments in torch are not what should wait for the bus
    return options


def faster(
    options: list[Arrangement], measure: Callable[[Arrangement], float], say: Callable[[str], None]
) -> Arrangement:
    """The option with the most environment steps per second; one that does not work here is left out.

    Raises:
        UserError: none works.
    """
    rates: dict[Arrangement, float] = {}
    failed: list[str] = []
    for option in options:
        try:
            rates[option] = measure(option)
        except (UserError, UnsupportedEnvironmentError, torch.OutOfMemoryError) as error:
            failed.append(f"{option}: {' '.join(str(error).split())}")
    for line in failed:
        say(f"not possible on the {line}")
    if not rates:
        raise UserError(f"no device can be used: {'; '.join(failed)}")
    best = max(rates, key=lambda option: rates[option])
    shown = ", ".join(f"{option} {rate:,.0f}" for option, rate in rates.items())
    say(f"device: {best} (environment steps per second measured: {shown})")
    return best


def measured(config: TrainConfig, seconds: float = _SECONDS) -> float:
    """Live environment steps per second of rollouts as this configuration would play them, from the start of a run."""
    if config.physics == "gpu" and config.slots is None:
        config = dataclasses.replace(config, slots=slots_that_fit(config))
    # No more members than play at the same time: more would only take longer.
    share = 2 if config.antithetic else 1
    members = max(min(config.population_size, slots_for(config)) // share * share, 2)
    config = dataclasses.replace(config, population_size=members, episodes=1)
    player = local_player(config)
    try:
        agent = Agent(config, player.observation_space, player.action_space, player.observation_shape)
        population = EvolutionStrategy(
            agent.module,
            members,
            config.sigma,
            perturbation=family_of(config),
            antithetic=config.antithetic,
            seed=config.seed,
            device=config.device,
            row_block=config.row_block,
            kernels=config.kernels,
            precision=config.precision,
        ).ask()
        seeds = start_seeds(population, 1)

        def play(steps: int) -> tuple[int, float]:
            started = time.perf_counter()
            rollout = player.play(
                population,
                observation_norm=agent.norm,
                action_map=agent.action_map,
                seeds=seeds,
                max_episode_steps=steps,
            )
            return rollout.env_steps, time.perf_counter() - started

        play(1)  # compiles and captures
        steps, took = play(_TRIAL_STEPS)
        if took < seconds:
            longer = round(_TRIAL_STEPS * seconds / took)
            steps, took = play(min(longer, player.max_episode_steps or longer))
        return steps / took
    finally:
        player.close()


def local_player(config: TrainConfig, say: Callable[[str], None] = _nobody) -> Player:
    """Who plays the episodes of a run on this machine; device and physics are those of :func:`resolve`."""
    if config.physics == "gpu":
        return device_player(config, torch.device("cuda"), say)
    return LocalPlayer(make_lanes(config, slots_for(config)))


def device_player(config: TrainConfig, device: torch.device, say: Callable[[str], None] = _nobody) -> DevicePlayer:
    """A player whose environments live on ``device``."""

    def make(slots: int) -> DeviceEnv:
        env = make_env(config.env_id, slots, device, observed=config.observed, **config.parsed_env_kwargs())
        assert isinstance(env, NativeBatchEnv | ObservedBatchEnv)
        return env

    return DevicePlayer(make, slots_for(config), say)
