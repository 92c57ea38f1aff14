"""A policy with all that it needs to act: network, observation statistics and action map; saved as ``policy.safetensors``."""

from __future__ import annotations

from collections.abc import Mapping

import gymnasium
import torch
from torch import Tensor, nn

from es_flipout.config import TrainConfig
from es_flipout.errors import UserError
from es_flipout.observation_norm import Identity, ObservationNorm
from es_flipout.policies import MLP, ActionMap, Linear, check_observation_space


class Agent:
    """Observations in, actions out, deterministically.

    Attributes:
        module: the network, ``(n, O)`` to ``(n, outputs)``.
        norm: applied to observations before the network.
        action_map: turns outputs into actions.
    """

    def __init__(self, config: TrainConfig, observation_space: gymnasium.Space, action_space: gymnasium.Space) -> None:
        """An untrained agent of the configured kind.

        Raises:
            UserError: a space is not supported.
        """
        obs_dim = check_observation_space(observation_space)
        self.action_map = ActionMap(action_space, config.squash)
        self.norm = ObservationNorm(obs_dim) if config.observation_norm else Identity()
        self.module = _policy(config, obs_dim, self.action_map.size)

    @torch.no_grad()
    def __call__(self, obs: Tensor) -> Tensor:
        """``(n, O)`` observations to ``(n,)`` or ``(n, A)`` actions."""
        return self.action_map(self.module(self.norm(obs)))

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors, flat, by name."""
        state = {f"policy.{name}": value for name, value in self.module.state_dict().items()}
        if isinstance(self.norm, ObservationNorm):
            state |= {f"observation_norm.{name}": value for name, value in self.norm.state_dict().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over the tensors of :meth:`state_dict`.

        Raises:
            UserError: the tensors belong to another kind of agent.
        """
        try:
            self.module.load_state_dict(_under(state, "policy."))
            if isinstance(self.norm, ObservationNorm):
                self.norm.load_state_dict(_under(state, "observation_norm."))
        except (RuntimeError, KeyError) as error:
            raise UserError(
                f"the saved policy does not fit the configuration: {' '.join(str(error).split())}"
            ) from None


def _policy(config: TrainConfig, obs_dim: int, outputs: int) -> nn.Module:
    generator = torch.Generator().manual_seed(config.seed)
    match config.policy:
        case "mlp":
            return MLP(obs_dim, outputs, config.hidden, config.activation, config.output_gain, generator)
        case "linear":
            return Linear(obs_dim, outputs)


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
