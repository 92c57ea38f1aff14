"""Short constructors of populations and agents for tests."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from es_flipout.config import TrainConfig
from es_flipout.envs.base import BatchEnv
from es_flipout.perturbations import Family, Members
from es_flipout.policies.agent import Agent
from es_flipout.policies.observation_norm import Identity, Normalizer
from es_flipout.randomness import Address
from es_flipout.rollout.builder import Parts, Say, device_player, make_strategy
from es_flipout.strategy.population import ForwardSettings, Population


def population_of(
    module: nn.Module,
    family: Family,
    size: int,
    *,
    first: int = 0,
    of: int | None = None,
    antithetic: bool = True,
    sigma: float = 0.3,
    seed: int = 1,
    generation: int = 2,
    row_block: int | None = 32,
    **forward: Any,
) -> Population:
    """Create a population of ``module``; with ``of``, a shard, from ``first`` on, of a population of that size."""
    members = Members(of or size, antithetic, next(module.parameters()).device, size, first)
    return Population(module, family, members, sigma, Address(seed, generation), ForwardSettings(row_block, **forward))


def agent_of(env: BatchEnv, norm: Normalizer | None = None, squash: Literal["clip", "tanh"] = "clip") -> Agent:
    """Create an agent for an environment, with its action map and a normalization (none by default)."""
    config = TrainConfig.of("CartPole-v1", policy="linear", squash=squash)
    agent = Agent(config, env.observation_space, env.action_space)
    agent.norm = norm if norm is not None else Identity()
    return agent


def build_on_device(config: TrainConfig, say: Say) -> Parts:
    """Build the parts of a run as on a GPU, but on the CPU; for :func:`es_flipout.training.setup.make_trainer`."""
    agent, player = device_player(config, torch.device("cpu"), say)
    return Parts(agent, make_strategy(config, agent.module), player)
