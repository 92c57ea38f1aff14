"""A complete policy: network, observation normalization and action map; saved as ``policy.safetensors``."""

from __future__ import annotations

from collections.abc import Mapping

import gymnasium
import torch
from torch import Tensor, nn

from es_flipout.config import TrainConfig
from es_flipout.errors import UserError
from es_flipout.policies.action_map import ActionMap, check_observation_space
from es_flipout.policies.networks import MLP, ConvNet, Linear, Recurrent, initial_state
from es_flipout.policies.observation_norm import BoundsNorm, Identity, Normalizer, ObservationNorm


class Agent:
    """Maps observations to actions, deterministically.

    Attributes:
        obs_dim: size of an observation, ``O``.
        module: the network, ``(n, O)`` to ``(n, outputs)``; with memory, as :class:`es_flipout.policies.Recurrent`.
        norm: normalization of the network's inputs.
        action_map: maps outputs to actions.
    """

    def __init__(
        self,
        config: TrainConfig,
        observation_space: gymnasium.Space,
        action_space: gymnasium.Space,
        observation_shape: tuple[int, ...] | None = None,
    ) -> None:
        """Create an untrained agent.

        Args:
            config: configuration of the policy.
            observation_space: a one-dimensional ``Box``.
            action_space: ``Discrete``, or a one-dimensional ``Box``, ``MultiDiscrete`` or ``MultiBinary``.
            observation_shape: shape of the observations before flattening, required by a convolutional policy.

        Raises:
            UserError: a space is not supported.
        """
        self.obs_dim = obs_dim = check_observation_space(observation_space)
        self.action_map = ActionMap(action_space, config.policy.squash)
        generator = torch.Generator().manual_seed(config.schedule.seed)
        self.module = _policy(config, obs_dim, observation_shape or (obs_dim,), self.action_map.size, generator)
        if config.policy.kind == "convnet":
            assert isinstance(observation_space, gymnasium.spaces.Box)
            self.norm: Normalizer = BoundsNorm(observation_space)
        else:
            self.norm = ObservationNorm(obs_dim) if config.policy.observation_norm else Identity()

    def initial_state(self, rows: int) -> Tensor | None:
        """Return the recurrent state at the start of an episode, ``(rows, state_size)``; None without memory."""
        like = next(self.module.parameters())
        state = initial_state(self.module, rows, like.device)
        return None if state is None else state.to(like.dtype)

    def double(self) -> Agent:
        """Compute the network in float64 from now on, and return the agent; actions stay float32.

        Sums in float32 are rounded differently by every library and processor, and physics amplifies the difference.
        In float64 the differences are so small that they disappear when actions are rounded to float32.
        """
        self.module.double()
        return self

    @torch.no_grad()
    def act(self, obs: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Map observations ``(n, O)`` and the state to actions ``(n,)`` or ``(n, A)`` and the next state."""
        x = self.norm(obs).to(next(self.module.parameters()).dtype)
        output, state = (self.module(x), None) if state is None else self.module(x, state)
        action = self.action_map(output)
        return action.float() if action.is_floating_point() else action, state

    def state_dict(self) -> dict[str, Tensor]:
        """Return all tensors in a flat dictionary."""
        state = {f"policy.{name}": value for name, value in self.module.state_dict().items()}
        if isinstance(self.norm, ObservationNorm):
            state |= {f"observation_norm.{name}": value for name, value in self.norm.state_dict().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the tensors of :meth:`state_dict`.

        Raises:
            UserError: the tensors do not fit this agent.
        """
        try:
            check_fit(state, self.state_dict())
        except ValueError as error:
            raise UserError(f"the saved policy does not fit the configuration: {error}") from None
        self.module.load_state_dict(_under(state, "policy."))
        if isinstance(self.norm, ObservationNorm):
            self.norm.load_state_dict(_under(state, "observation_norm."))


def check_fit(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Check that tensors have the names, shapes and types of others.

    Raises:
        ValueError: they differ; the message names a tensor.
    """
    for name in [*wanted, *state]:
        if name not in state:
            raise ValueError(f"{name} is missing")
        if name not in wanted:
            raise ValueError(f"{name} is unknown")
        own, other = state[name], wanted[name]
        if (own.shape, own.dtype) != (other.shape, other.dtype):
            raise ValueError(
                f"{name} is of shape {tuple(own.shape)} and {own.dtype}, not of {tuple(other.shape)} and {other.dtype}"
            )


def parameter_shapes(
    config: TrainConfig,
    observation_space: gymnasium.Space,
    action_space: gymnasium.Space,
    observation_shape: tuple[int, ...] | None = None,
) -> list[torch.Size]:
    """Return the shapes of the parameters that an :class:`Agent` with these arguments has, without memory for them.

    Raises:
        UserError: a space is not supported, or a layer is larger than PyTorch can address.
    """
    obs_dim, outputs = check_observation_space(observation_space), ActionMap(action_space).size
    try:
        with torch.device("meta"):
            module = _policy(config, obs_dim, observation_shape or (obs_dim,), outputs, None)
    except RuntimeError as error:
        raise UserError(f"hidden {config.policy.hidden} is too large: {' '.join(str(error).split())}") from None
    return [parameter.shape for parameter in module.parameters()]


def _policy(
    config: TrainConfig, obs_dim: int, shape: tuple[int, ...], outputs: int, generator: torch.Generator | None
) -> nn.Module:
    policy, gain = config.policy, config.policy.output_gain
    match policy.kind:
        case "mlp":
            return MLP(obs_dim, outputs, policy.hidden, policy.activation, gain, generator)
        case "linear":
            return Linear(obs_dim, outputs)
        case "recurrent":
            return Recurrent(obs_dim, outputs, policy.hidden, policy.cell, gain, generator)
        case "convnet":
            return ConvNet(shape, outputs, policy.channels, policy.hidden, policy.activation, gain, generator)


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
