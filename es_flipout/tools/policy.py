"""A trained policy for robots, notebooks and other programs: :func:`load`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray

from es_flipout.config import TrainConfig
from es_flipout.envs.make import NAMESPACE
from es_flipout.errors import UserError
from es_flipout.policies.agent import Agent
from es_flipout.tools.source import find_run
from es_flipout.training.evaluate import in_space
from es_flipout.training.run_directory import Which, load_agent

# Activations that onnxruntime computes in float64, too.
_DOUBLE = ("tanh", "relu", "silu")


class TrainedPolicy:
    """A trained policy: observations of the Gymnasium environment in, actions for it out.

    Flattening, selection of entries, normalization, memory, and the scaling of actions are inside. The network is
    computed in float64 and its actions are rounded to float32, so that they do not depend on the machine (see
    :meth:`es_flipout.policies.agent.Agent.double`), unless it has convolutions, elu or gelu: those stay float32.

    Attributes:
        config: configuration of the run.
        agent: the policy as a batch of rows.
        observation_space, action_space: spaces of the Gymnasium environment.
    """

    def __init__(
        self, agent: Agent, config: TrainConfig, observation_space: gymnasium.Space, action_space: gymnasium.Space
    ) -> None:
        policy = config.policy
        double = policy.kind in ("linear", "recurrent") or (policy.kind == "mlp" and policy.activation in _DOUBLE)
        self.agent, self.config = agent.double() if double else agent, config
        self.observation_space, self.action_space = observation_space, action_space
        self.reset()

    def reset(self) -> None:
        """Forget the past. Call it at the start of every episode; it only matters for policies with memory."""
        self._state = self.agent.initial_state(1)

    def act(self, observation: Any) -> int | NDArray[Any]:
        """Return the action for one observation.

        Args:
            observation: an element of ``observation_space``, such as an array.

        Returns:
            An element of ``action_space``: an ``int`` (Discrete) or an array (Box).

        Raises:
            UserError: the observation does not have the shape of ``observation_space``.
        """
        row = torch.as_tensor(self.flat(observation))[None]
        action, self._state = self.agent.act(row, self._state)
        return in_space(action[0], self.action_space)

    def flat(self, observation: Any) -> NDArray[Any]:
        """Return an observation as the agent sees it, ``(O,)``: flattened, with the observed entries only."""
        space, observed = self.observation_space, self.config.task.observed
        if isinstance(space, gymnasium.spaces.Box) and np.shape(observation) != space.shape:
            raise UserError(
                f"observations of {self.config.task.env_id} have shape {space.shape}, got {np.shape(observation)}"
            )
        one_dimensional = isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 1
        row = np.asarray(observation if one_dimensional else gymnasium.spaces.flatten(space, observation))
        return row if observed is None else row[list(observed)]


def load(run: str | Path, which: Which = "best", trust: bool = False) -> TrainedPolicy:
    """Load the trained policy of a run.

    Example::

        policy = es_flipout.load("runs/HalfCheetah-v5_seed1")
        env = gymnasium.make("HalfCheetah-v5")
        observation, _ = env.reset()
        policy.reset()
        action = policy.act(observation)

    Args:
        run: its directory, ``zoo:ENV_ID`` or ``hub:USER/NAME`` (see :func:`es_flipout.tools.source.find_run`).
        which: the mean policy with the best score of training, or the last one.
        trust: allow the run to import the Python module of its environment.

    Raises:
        UserError: there is no such run, it is damaged, or it is not trusted.
        UnsupportedEnvironmentError: the environment of the run does not exist here.
    """
    return load_policy(find_run(run), which, trust)


def load_policy(
    run_dir: Path, which: Which = "best", trust: bool = False, generation: int | None = None
) -> TrainedPolicy:
    """Load the policy of a run directory; with ``generation``, that of a kept checkpoint.

    Raises:
        UserError: the directory or the checkpoint is missing or damaged.
    """
    agent, config = load_agent(run_dir, which, trust, generation)
    env = make_gymnasium_env(config)
    policy = TrainedPolicy(agent, config, env.observation_space, env.action_space)
    env.close()
    return policy


def make_gymnasium_env(config: TrainConfig, **kwargs: Any) -> gymnasium.Env:
    """Create the environment of a run with ``gymnasium.make``, unwrapped by this package.

    Args:
        config: configuration of the run.
        **kwargs: further keyword arguments of ``gymnasium.make``.
    """
    task = config.task
    return gymnasium.make(task.env_id.removeprefix(NAMESPACE), **{**task.parsed_env_kwargs(), **kwargs})
