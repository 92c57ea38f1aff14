"""The engine on Ray: every worker plays shares of the population, and sends back returns, lengths and moments only.

Down go, once a generation, the mean weights and the observation statistics (shared by the workers of a node); for every share its
first member, its size and 8 bytes of start seed an episode. A worker draws the members' perturbations itself, since they are
addressed by member. Up come 16 bytes an episode (return and length), and for every ``MOMENT_BLOCK`` episodes two sums over the
observations. The result is that of one process to the bit, whoever plays which share. On GPUs,
a worker each, that holds as far as the cards are alike, the kernels are used and the physics is deterministic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from es_flipout.agent import Agent
from es_flipout.arrangement import local_player
from es_flipout.cluster.connect import Connection
from es_flipout.cluster.pool import Pool
from es_flipout.config import TrainConfig
from es_flipout.errors import UserError
from es_flipout.observation_norm import Moments, ObservationNorm
from es_flipout.perturbations import Members, family_of
from es_flipout.player import LocalPlayer, Player, make_lanes, row_block_of, slots_for
from es_flipout.policies import ActionMap
from es_flipout.population import Population, Unperturbed, row_block_like
from es_flipout.rollout import MOMENT_BLOCK, MOMENT_JOBS, Rollout
from es_flipout.runinfo import versions

_FEWEST_MEMBERS = 32  # of a share: fewer rows make the policy's forward dear
_SHARES = 2  # that a worker plays in a generation, so that a fast one can take from a slow one

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Generation:
    """What is the same for all shares of a generation; see :func:`es_flipout.rollout.run`."""

    number: int
    sigma: float
    episodes: int
    max_episode_steps: int | None
    remove_alive_bonus: bool
    collect_moments: bool


@dataclass(frozen=True)
class Share:
    """Consecutive members: the number of the first, and the seeds of their start states ``(n, E)`` int64."""

    first: int
    seeds: NDArray[np.int64]
    moment_jobs: int


@dataclass(frozen=True)
class Outcome:
    """What of a share's rollout travels back."""

    returns: NDArray[np.float64]
    lengths: NDArray[np.int64]
    steps_observed: float
    total: NDArray[np.float64]
    squares: NDArray[np.float64]
    diverged: int
    alive_bonus: float


class ShardWorker:
    """Plays shares; the body of a Ray actor, and just as well an object of this process."""

    def __init__(self, config: TrainConfig, share: int, threads: int) -> None:
        """Make environments and a policy.

        Args:
            config: of the run.
            share: members of a share.
            threads: physics threads.
        """
        torch.set_num_threads(1)
        slots = min(share * config.episodes, slots_for(config))
        self._config = dataclasses.replace(config, slots=slots, threads=threads, overlap=False, backend="local")
        self._device = torch.device("cuda" if config.device == "cuda" else "cpu")
        self._player = player = local_player(self._config)
        self._agent = Agent(config, player.observation_space, player.action_space, player.observation_shape)
        module, size = self._agent.module, player.observation_space.shape[0]
        self._row_block = row_block_of(config, module)
        if self._device.type == "cpu":
            self._row_block = row_block_like(module, family_of(config), size, slots, self._row_block)
        module.to(self._device)

    def ready(self) -> dict[str, str]:
        """Versions of what computes here."""
        return versions()

    def play(self, generation: Generation, share: Share, weights: Arrays) -> Outcome:
        """Play all episodes of a share's members with the generation's mean weights and statistics."""
        config, agent = self._config, self._agent
        agent.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in weights.items()})
        size = len(share.seeds)
        members = Members(config.population_size, config.antithetic, self._device, size, share.first)
        population = Population(
            agent.module,
            family_of(config),
            members,
            generation.sigma,
            config.seed,
            generation.number,
            self._row_block,
            config.kernels,
            config.precision,
        )
        rollout = self._player.play(
            population,
            generation.episodes,
            observation_norm=agent.norm,
            action_map=agent.action_map,
            seeds=torch.from_numpy(share.seeds.copy()),
            max_episode_steps=generation.max_episode_steps,
            remove_alive_bonus=generation.remove_alive_bonus,
            collect_moments=generation.collect_moments,
            moment_jobs=share.moment_jobs,
        )
        blocks = rollout.moment_blocks
        return Outcome(
            rollout.episode_returns.numpy(),
            rollout.lengths.numpy(),
            blocks.count,
            blocks.total.numpy(),
            blocks.squares.numpy(),
            rollout.diverged,
            rollout.alive_bonus,
        )


class ShardedPlayer(Player):
    """Plays on the workers of a Ray cluster.

    Attributes:
        workers: how many, and ``threads``, physics threads of each.
        warnings: what the user should know of the arrangement.
    """

    def __init__(self, config: TrainConfig, reserve_cores: bool = True) -> None:
        """Connect and start the workers.

        Args:
            config: of the run.
            reserve_cores: whether Ray shall keep the cores for these workers; else they may share them with others.

        Raises:
            UserError: no Ray, no cluster, no worker, or workers with other versions than here.
        """
        score_slots = min(config.score_episodes, slots_for(config))
        self._home = LocalPlayer(make_lanes(dataclasses.replace(config, overlap=False), score_slots))
        self._describe(self._home.envs[0])
        self._connection = connection = Connection(config.ray_address)
        self.workers, self.threads = _arrangement(config, connection)
        self.warnings = _warnings(self.workers * self.threads, connection)
        self.share = _share_size(config.population_size, self.workers)
        # More workers than cores share them.
        cores = min(self.threads, max(connection.cores / self.workers, 0.01)) if reserve_cores else 0
        gpus = 1 if config.device == "cuda" else 0
        actor = connection.ray.remote(num_cpus=cores, num_gpus=gpus, max_restarts=0)(ShardWorker)
        arguments = (config, self.share, self.threads)
        try:
            self.pool = Pool(connection, lambda: actor.remote(*arguments), self.workers)
            for answer in self.pool.answers:
                compare_versions(versions(), answer)
        except BaseException:
            self.close()
            raise

    def play(
        self,
        population: Population | Unperturbed,
        episodes: int = 1,
        *,
        observation_norm: Callable[[Tensor], Tensor],
        action_map: ActionMap,
        seeds: Tensor,
        max_episode_steps: int | None = None,
        remove_alive_bonus: bool = False,
        collect_moments: bool = True,
        moment_jobs: int = MOMENT_JOBS,
        should_stop: Callable[[], bool] | None = None,
    ) -> Rollout:
        """See :meth:`Player.play`; a population that is not perturbed is played in this process.

        Raises:
            WorkersLostError: no worker is left.
        """
        if not isinstance(population, Population):
            return self._home.play(
                population,
                episodes,
                observation_norm=observation_norm,
                action_map=action_map,
                seeds=seeds,
                max_episode_steps=max_episode_steps,
                remove_alive_bonus=remove_alive_bonus,
                collect_moments=collect_moments,
                moment_jobs=moment_jobs,
                should_stop=should_stop,
            )
        generation = Generation(
            population.generation, population.sigma, episodes, max_episode_steps, remove_alive_bonus, collect_moments
        )
        shares = [
            Share(first, part.numpy(), min(max(moment_jobs - first * episodes, 0), part.numel()))
            for first, part in zip(range(0, population.size, self.share), seeds.split(self.share), strict=True)
        ]
        weights = self._connection.ray.put(_weights(population, observation_norm))
        outcomes = self.pool.work(
            shares, lambda actor, share: actor.play.remote(generation, share, weights), should_stop
        )
        return Rollout.join([_rollout(outcome) for outcome in outcomes])

    def close(self) -> None:
        """See :meth:`Player.close`."""
        if hasattr(self, "pool"):
            self.pool.close()
        self._connection.close()
        self._home.close()


def _weights(population: Population, norm: Callable[[Tensor], Tensor]) -> Arrays:
    """Mean weights and observation statistics under the names of :meth:`Agent.state_dict`."""
    tensors = {f"policy.{name}": value for name, value in population.mean_state().items()}
    if isinstance(norm, ObservationNorm):
        tensors |= {f"observation_norm.{name}": value for name, value in norm.state_dict().items()}
    return {name: value.detach().cpu().numpy() for name, value in tensors.items()}


def _rollout(outcome: Outcome) -> Rollout:
    returns, lengths, total, squares = (
        torch.from_numpy(values.copy())  # what comes out of Ray's memory cannot be written to
        for values in (outcome.returns, outcome.lengths, outcome.total, outcome.squares)
    )
    return Rollout(
        returns, lengths, Moments(outcome.steps_observed, total, squares), outcome.diverged, outcome.alive_bonus
    )


def _arrangement(config: TrainConfig, connection: Connection) -> tuple[int, int]:
    """How many workers, with how many threads each: one for every GPU, or core, unless their shares would get too small.

    Raises:
        UserError: GPUs are wanted, and the cluster has none or too few.
    """
    if config.device == "cuda":
        workers = config.workers or connection.gpus
        if not 1 <= workers <= connection.gpus:
            raise UserError(
                f"backend ray gives every worker a GPU of its own, and the cluster has {connection.gpus}: use --device cpu, "
                f"or --workers with at most as many"
            )
        return workers, config.threads or max(connection.cores // workers, 1)
    if config.workers is not None:
        return config.workers, config.threads or 1
    most = max(config.population_size // _FEWEST_MEMBERS, 1)
    threads = config.threads or max(min(connection.cores // most, min(connection.nodes, default=1)), 1)
    return max(min(connection.cores // threads, most), 1), threads


def _share_size(population_size: int, workers: int) -> int:
    """Members of a share: whole blocks of moments, and so whole antithetic pairs."""
    even = -(-population_size // workers)
    wanted = max(-(-even // _SHARES), min(_FEWEST_MEMBERS, even))
    return -(-wanted // MOMENT_BLOCK) * MOMENT_BLOCK


def _warnings(threads: int, connection: Connection) -> list[str]:
    if threads <= connection.cores:
        return []
    return [
        f"warning: {threads} worker threads share {connection.cores} cores, so each gets only a part of one; "
        "a comparison of such workers with others says nothing about cores"
    ]


def compare_versions(here: dict[str, str], there: dict[str, str]) -> None:
    """Complain about a worker with other versions: its numbers may differ.

    Raises:
        UserError: they differ; the message names them.
    """
    both = here.keys() & there.keys()  # what a worker lacks and does not miss does not matter
    other = [f"{name} {there[name]} in place of {here[name]}" for name in sorted(both) if there[name] != here[name]]
    if other:
        raise UserError(
            f"a worker has other versions than this process: {', '.join(other)}; install the same everywhere"
        )
