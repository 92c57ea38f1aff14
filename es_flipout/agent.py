"""A policy with all that it needs to act: network, observation statistics and action map; saved as ``policy.safetensors``."""

from __future__ import annotations

from collections.abc import Mapping

import gymnasium
import torch
from torch import Tensor, nn

from es_flipout.config import TrainConfig
from es_flipout.errors import UserError
from es_flipout.observation_norm import BoundsNorm, Identity, ObservationNorm
from es_flipout.policies import MLP, ActionMap, ConvNet, Linear, Recurrent, check_observation_space, initial_state


class Agent:
    """Observations in, actions out, deterministically.

    Attributes:
        module: the network, ``(n, O)`` to ``(n, outputs)``; with memory, as :class:`es_flipout.policies.Recurrent`.
        norm: applied to observations before the network.
        action_map: turns outputs into actions.
    """

    def __init__(
        self,
        config: TrainConfig,
        observation_space: gymnasium.Space,
        action_space: gymnasium.Space,
        observation_shape: tuple[int, ...] | None = None,
    ) -> None:
        """An untrained agent of the configured kind.

        Args:
            config: says which kind.
            observation_space: one-dimensional.
            action_space: ``Discrete`` or a one-dimensional ``Box``.
            observation_shape: the observations' shape before they were flattened, which a convolutional policy needs.

        Raises:
            UserError: a space is not supported.
        """
        obs_dim = check_observation_space(observation_space)
        self.action_map = ActionMap(action_space, config.squash)
        self.module = _policy(config, obs_dim, observation_shape or (obs_dim,), self.action_map.size)
        if config.policy == "convnet":
            assert isinstance(observation_space, gymnasium.spaces.Box)
            self.norm = BoundsNorm(observation_space)
        else:
            self.norm = ObservationNorm(obs_dim) if config.observation_norm else Identity()

    def initial_state(self, rows: int) -> Tensor | None:
        """What the policy remembers at the start of an episode, ``(rows, state size)``; None without memory."""
        return initial_state(self.module, rows, next(self.module.parameters()).device)

    @torch.no_grad()
    def act(self, obs: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``(n, O)`` observations and the state to ``(n,)`` or ``(n, A)`` actions and the next state."""
        x = self.norm(obs)
        output, state = (self.module(x), None) if state is None else self.module(x, state)
        return self.action_map(output), state

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


def _policy(config: TrainConfig, obs_dim: int, shape: tuple[int, ...], outputs: int) -> nn.Module:
    generator = torch.Generator().manual_seed(config.seed)
    gain = config.output_gain
    match config.policy:
        case "mlp":
            return MLP(obs_dim, outputs, config.hidden, config.activation, gain, generator)
        case "linear":
            return Linear(obs_dim, outputs)
        case "recurrent":
            return Recurrent(obs_dim, outputs, config.hidden, config.cell, gain, generator)
        case "convnet":
            return ConvNet(shape, outputs, config.channels, config.hidden, config.activation, gain, generator)


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
