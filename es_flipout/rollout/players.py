"""Players, which play the episodes of a generation: the base class, and one for environments in this process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from es_flipout.envs import BatchEnv
from es_flipout.policies.agent import Agent
from es_flipout.rollout.episodes import Episodes, Rollout, ShouldStop
from es_flipout.rollout.host import run
from es_flipout.strategy.population import Population
from es_flipout.strategy.unperturbed import Unperturbed


class Player(ABC):
    """Plays episodes of populations.

    Attributes:
        agent: its normalization and action map are applied around the members' networks.
        max_episode_steps: the environment's own limit, as in :class:`es_flipout.envs.BatchEnv`.
        warnings: warnings for the user.
        needs_noise: whether it uses the noise of a population in this process.
    """

    agent: Agent
    max_episode_steps: int | None
    warnings: Sequence[str] = ()
    needs_noise: bool = True

    @abstractmethod
    def play(
        self, population: Population | Unperturbed, episodes: Episodes, should_stop: ShouldStop | None = None
    ) -> Rollout:
        """Play episodes; the result does not depend on the player.

        Args:
            population: the members.
            episodes: the episodes of the members.
            should_stop: called repeatedly; if it returns true, :class:`es_flipout.rollout.episodes.RolloutInterrupted`
                is raised.

        Raises:
            ValueError: the request does not fit the population.
            EnvironmentFailureError: the environment's own code raised an exception.
        """

    def weighted_sum(
        self, population: Population, u: Tensor, should_stop: ShouldStop | None = None
    ) -> Mapping[str, Tensor]:
        """Compute :meth:`Population.weighted_sum` where the members are played; the result does not depend on the player.

        Args:
            population: the members.
            u: ``(P,)``, their weights.
            should_stop: see :meth:`play`.
        """
        return population.weighted_sum(u)

    def prepare(self, population: Population, episodes: Episodes) -> None:  # noqa: B027 (most players need not)
        """Compile what plays such populations and episodes, where it is compiled; nothing is played.

        Raises:
            es_flipout.rollout.compiled.CompilationError: that is not possible on this machine.
        """

    def draw_ahead(self, seeds: Callable[[], Tensor]) -> None:  # noqa: B027 (most players need not)
        """Begin to draw the start states of a later request, where that saves time.

        Args:
            seeds: returns the seeds of that request, ``(P, E)`` int64; only called where they are used.
        """

    def close(self) -> None:  # noqa: B027 (not every player holds resources)
        """Release environments, processes and connections."""


class LocalPlayer(Player):
    """Plays in environments in this process.

    Attributes:
        envs: one batch of environments, or two that are double-buffered.
    """

    def __init__(self, agent: Agent, envs: Sequence[BatchEnv]) -> None:
        self.agent = agent
        self.envs = tuple(envs)
        self.max_episode_steps = self.envs[0].max_episode_steps

    def play(
        self, population: Population | Unperturbed, episodes: Episodes, should_stop: ShouldStop | None = None
    ) -> Rollout:
        """See :meth:`Player.play`."""
        norm, action_map = self.agent.norm, self.agent.action_map
        return run(
            population, self.envs, episodes, observation_norm=norm, action_map=action_map, should_stop=should_stop
        )

    def close(self) -> None:
        """See :meth:`Player.close`."""
        for env in self.envs:
            env.close()
