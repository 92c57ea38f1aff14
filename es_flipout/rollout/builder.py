"""The one place that builds the parts of a run from its configuration: environments, agent, strategy and player.

Training, placement, plans, Ray workers and benchmarks all use it, so that each of them computes what a run computes. It
expects a configuration whose ``device`` and ``physics`` are decided (see :mod:`es_flipout.rollout.placement`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from es_flipout.config import TrainConfig
from es_flipout.envs import BatchEnv, make_env, native_env_ids
from es_flipout.envs.make import NAMESPACE
from es_flipout.envs.mujoco_cpu import usable_cores
from es_flipout.envs.native import NativeBatchEnv
from es_flipout.envs.observed import ObservedBatchEnv
from es_flipout.perturbations import Dense, Family, Flipout, LowRank
from es_flipout.policies.agent import Agent
from es_flipout.rollout.compiled import CompiledPlayer, tile_slots
from es_flipout.rollout.device import DeviceEnv, LaunchOptions
from es_flipout.rollout.device_player import DevicePlayer
from es_flipout.rollout.players import LocalPlayer, Player
from es_flipout.strategy.evolution_strategy import EvolutionStrategy
from es_flipout.strategy.population import ForwardSettings
from es_flipout.strategy.row_block import row_block_for

Say = Callable[[str], None]
WrapEnv = Callable[[BatchEnv], BatchEnv]

_SLOW_S = 3.0  # a step that takes longer is announced

_MOST_SLOTS = {"torch": 4096, "mujoco": 1024, "gymnasium": 32}


class Parts(NamedTuple):
    """The parts of a run."""

    agent: Agent
    strategy: EvolutionStrategy
    player: Player


def build(config: TrainConfig, say: Say | None = None, wrap_env: WrapEnv | None = None) -> Parts:
    """Build the parts of a run on this machine.

    Args:
        config: configuration of the run.
        say: called with one-line messages for the user.
        wrap_env: applied to every batch of environments on the CPU, for example to time it (not where the control
            step is compiled).

    Raises:
        UserError: a space, a policy or a value is not supported.
        UnsupportedEnvironmentError: the environment does not exist.
    """
    if config.compute.physics == "gpu":
        agent, player = device_player(config, torch.device("cuda"), say)
    else:
        agent, player = local_player(config, slots_for(config), wrap_env)
    return Parts(agent, make_strategy(config, agent.module), player)


def local_player(config: TrainConfig, slots: int, wrap_env: WrapEnv | None = None) -> tuple[Agent, LocalPlayer]:
    """Create an agent, and a player for it whose environments are stepped on the CPU."""
    compiled = steps_compiled(config)
    envs = _make_tiles(config, slots) if compiled else make_lanes(config, slots)
    try:
        agent = make_agent(config, envs[0])
    except BaseException:
        for env in envs:
            env.close()
        raise
    if compiled:
        return agent, CompiledPlayer(agent, envs, config.compute.threads or usable_cores())
    return agent, LocalPlayer(agent, envs if wrap_env is None else [wrap_env(env) for env in envs])


def device_player(config: TrainConfig, device: torch.device, say: Say | None = None) -> tuple[Agent, DevicePlayer]:
    """Create an agent, and a player for it whose environments are on ``device``."""
    task = config.task

    def make(slots: int) -> DeviceEnv:
        message = f"compiling the physics of {task.env_id} for the GPU; this takes up to a minute, once per machine"
        with _announced_if_slow(say, message):
            env = make_env(task.env_id, slots, device, observed=task.observed, **task.parsed_env_kwargs())
        assert isinstance(env, NativeBatchEnv | ObservedBatchEnv)
        return env

    # The spaces are the same on the CPU, where creating an environment is cheap.
    env = make_one_env(config)
    agent = make_agent(config, env)
    env.close()
    launch = LaunchOptions(compiled=config.compute.compile == "on")
    return agent, DevicePlayer(agent, make, slots_for(config), say, launch)


@contextmanager
def _announced_if_slow(say: Say | None, message: str) -> Iterator[None]:
    """Say what happens if it takes long, while it lasts: compiled kernels are cached, so usually it does not."""
    if say is None:
        yield
        return
    timer = threading.Timer(_SLOW_S, say, (message,))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def make_agent(config: TrainConfig, env: BatchEnv) -> Agent:
    """Create an untrained agent for an environment.

    Raises:
        UserError: a space is not supported.
    """
    return Agent(config, env.observation_space, env.action_space, env.observation_shape)


def make_strategy(
    config: TrainConfig,
    module: nn.Module,
    device: torch.device | str | None = None,
    kind: type[EvolutionStrategy] = EvolutionStrategy,
) -> EvolutionStrategy:
    """Create the strategy for a policy network; by default on the configured device."""
    strategy, forward = config.strategy, forward_settings(config, module)
    return kind(
        module,
        strategy.population_size,
        strategy.sigma,
        perturbation=family_of(config),
        learning_rate=strategy.learning_rate,
        optimizer=strategy.optimizer,
        momentum=strategy.momentum,
        weight_decay=strategy.weight_decay,
        antithetic=strategy.antithetic,
        seed=config.schedule.seed,
        device=config.compute.device if device is None else device,
        row_block=forward.row_block,
        kernels=forward.kernels,
        precision=forward.precision,
        shaping=strategy.shaping,
    )


def family_of(config: TrainConfig) -> Family:
    """Return the configured perturbation family."""
    strategy = config.strategy
    match strategy.perturbation:
        case "flipout":
            return Flipout(base=strategy.base, bases=strategy.bases)
        case "low_rank":
            return LowRank(rank=strategy.rank)
        case "dense":
            return Dense()


def forward_settings(config: TrainConfig, module: nn.Module) -> ForwardSettings:
    """Return how this run computes the forward of a policy network, for any player."""
    compute = config.compute
    return ForwardSettings(row_block_of(config, module), compute.kernels, compute.precision)


def row_block_of(config: TrainConfig, module: nn.Module) -> int | None:
    """Return the rows per forward, based on all slots so that lanes and machines do not matter; None for all rows."""
    compute = config.compute
    if compute.row_block is not None or compute.physics == "gpu":
        return compute.row_block
    slots = slots_for(config)
    if steps_compiled(config):
        return tile_slots(config.strategy.population_size * config.task.episodes)
    return slots if compute.device == "cuda" else row_block_for(module, slots)


def steps_compiled(config: TrainConfig) -> bool:
    """Return whether the control step is compiled on the CPU."""
    return config.compute.compile == "on" and config.compute.device == "cpu" and backend_of(config) == "torch"


def slots_for(config: TrainConfig) -> int:
    """Return the number of environments that one machine steps in parallel for this run."""
    if config.compute.slots is not None:
        return config.compute.slots
    return min(config.strategy.population_size * config.task.episodes, _MOST_SLOTS[backend_of(config)])


def backend_of(config: TrainConfig) -> str:
    """Return the backend of the environment: ``"torch"``, ``"mujoco"`` or ``"gymnasium"``."""
    return native_env_ids().get(config.task.env_id.removeprefix(NAMESPACE), "gymnasium")


def make_one_env(config: TrainConfig) -> BatchEnv:
    """Create one environment on the CPU."""
    task = config.task
    return make_env(task.env_id, 1, observed=task.observed, **task.parsed_env_kwargs())


def _make_tiles(config: TrainConfig, slots: int) -> list[BatchEnv]:
    """Create the environments of a compiled rollout: batches of one size, with at least ``slots`` slots together."""
    task = config.task
    size = tile_slots(config.strategy.population_size * task.episodes)
    return [
        make_env(task.env_id, size, observed=task.observed, **task.parsed_env_kwargs())
        for _ in range(-(-slots // size))
    ]


def make_lanes(config: TrainConfig, slots: int) -> list[BatchEnv]:
    """Create the environments: two halves if physics and policy are double-buffered, otherwise one batch."""
    task, compute = config.task, config.compute
    cores, backend = usable_cores(), backend_of(config)
    # With two cores and no GPU, overlap does not help: the policy slows the physics down as much (results/LOG.md).
    overlap = compute.overlap
    if overlap is None:
        overlap = compute.device == "cuda" or (cores > 2 and backend == "mujoco")

    def make(num_envs: int, threads: int | None) -> BatchEnv:
        return make_env(task.env_id, num_envs, threads=threads, observed=task.observed, **task.parsed_env_kwargs())

    if backend == "torch" or not overlap or slots < 2:
        return [make(slots, compute.threads)]
    # The halves split the threads: two batches that compete for all cores would wait for each other at every step.
    threads = compute.threads if compute.threads is not None else cores
    return [make(slots - slots // 2, threads - threads // 2), make(slots // 2, max(threads // 2, 1))]
