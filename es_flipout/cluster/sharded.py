"""The engine on Ray: every worker plays shards of the population, and sends back only returns, lengths and moments.

Workers receive the mean weights and observation statistics once per generation (one copy per node), and for every shard
its first member, its size and a start seed of 8 bytes per episode. A worker draws the perturbations of the members
itself, since they are addressed by member. It sends back 16 bytes per episode (return and length), and two sums over
observations for every ``MOMENT_BLOCK`` episodes.

If the population has several blocks of noise sources (:attr:`es_flipout.perturbations.Members.blocks`), the workers also
sum their weighted noise for the update: one receives the weights of a block's members, 4 bytes each, and sends back the
sum, 4 bytes per parameter; the training process adds the sums in order. A single block is summed there.

The result is bitwise identical to that of one process, for any assignment of shards and blocks to workers. On GPUs, one
per worker, this requires identical GPUs, the Triton kernels and deterministic physics, which mujoco-warp's is not as it
is set here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from es_flipout.cluster.connect import Connection
from es_flipout.cluster.crew import Crew
from es_flipout.cluster.pool import START_S, Pool
from es_flipout.cluster.worker import Arrays, Block, Generation, Outcome, Shard, ShardWorker, packed, unpacked
from es_flipout.config import TrainConfig
from es_flipout.errors import UserError
from es_flipout.policies.agent import Agent
from es_flipout.policies.observation_norm import Moments, ObservationNorm
from es_flipout.rollout.builder import Parts, local_player, make_strategy, slots_for
from es_flipout.rollout.episodes import MOMENT_BLOCK, Ends, Episodes, Rollout, ShouldStop
from es_flipout.rollout.players import LocalPlayer, Player
from es_flipout.runinfo import versions
from es_flipout.strategy.population import Population
from es_flipout.strategy.unperturbed import Unperturbed

_FEWEST_MEMBERS = 32  # minimum size of a shard: a row costs more in a forward with fewer rows
_SHARDS_PER_WORKER = 2  # per generation, so that a fast worker can relieve a slow one
_MOST_ACTORS = 16  # if there are more workers, those of a node share an actor
_GPU_START_S = 900.0  # time limit for a worker that first compiles kernels, beside others that compile them, too


def build_sharded(config: TrainConfig, reserve_cores: bool = True) -> Parts:
    """Build the parts of a run whose episodes are played on a Ray cluster; see :class:`ShardedPlayer`."""
    score_slots = min(config.logging.score_episodes, slots_for(config))
    agent, home = local_player(config.replace(overlap=False), score_slots)
    return Parts(agent, make_strategy(config, agent.module), ShardedPlayer(config, home, reserve_cores))


class ShardedPlayer(Player):
    """Plays on the workers of a Ray cluster.

    Attributes:
        workers: number of workers.
        threads: number of physics threads per worker.
        per_actor: number of workers that share an actor.
        size: members per shard of a worker; an actor receives shards of ``per_actor`` times as many.
        warnings: warnings for the user about the use of the cluster.
        connection: connection to Ray.
        WORKER: class of the actors of one worker.
        CREW: class of the actors that several workers share.
    """

    WORKER: ClassVar[type[Any]] = ShardWorker
    CREW: ClassVar[type[Any]] = Crew
    needs_noise = False

    def __init__(
        self,
        config: TrainConfig,
        home: LocalPlayer,
        reserve_cores: bool = True,
        connection: Connection | None = None,
    ) -> None:
        """Connect and start the workers.

        Args:
            config: configuration of the run.
            home: plays unperturbed policies in this process.
            reserve_cores: whether Ray reserves cores for these workers; otherwise they may share them with others.
            connection: connection to Ray; by default one to the configured address.

        Raises:
            UserError: Ray is not installed, no cluster answers, no worker starts, or workers have other package
                versions than this process.
        """
        self.agent, self.max_episode_steps, self._home = home.agent, home.max_episode_steps, home
        self.connection = connection = connection or Connection(config.compute.ray_address)
        self.workers, self.threads = _workers_and_threads(config, connection)
        self.warnings = _warnings(self.workers * self.threads, connection)
        gpus, per_worker, start_s = 0, _SHARDS_PER_WORKER, START_S
        if config.compute.device == "cuda":  # a GPU plays a whole share at once, no slower than half of it
            gpus, per_worker, start_s = 1, 1, _GPU_START_S
        self.size = shard_size(config.strategy.population_size, self.workers, per_worker)
        self.per_actor = 1 if gpus else workers_per_actor(self.workers, self.threads, connection.nodes)
        # With more workers than cores, each reserves a fraction of a core.
        cores = min(self.threads, max(connection.cores / self.workers, 0.01)) * self.per_actor if reserve_cores else 0
        options: dict[str, Any] = {"num_cpus": cores, "num_gpus": gpus, "max_restarts": 0}
        arguments: tuple[Any, ...] = config, self.size, self.threads
        if self.per_actor == 1:
            actor = connection.ray.remote(**options)(self.WORKER)
        else:
            actor = connection.ray.remote(**options, max_concurrency=2)(self.CREW)
            arguments = *arguments, self.per_actor
        try:
            self.pool = Pool(connection, lambda: actor.remote(*arguments), self.workers // self.per_actor, start_s)
            for answer in self.pool.answers:
                compare_versions(versions(), answer)
        except BaseException:
            self.close()
            raise

    def play(
        self, population: Population | Unperturbed, episodes: Episodes, should_stop: ShouldStop | None = None
    ) -> Rollout:
        """See :meth:`Player.play`; unperturbed populations are played in this process.

        Raises:
            WorkersLostError: no worker is left.
        """
        if not isinstance(population, Population):
            return self._home.play(population, episodes, should_stop)
        episodes.check(population.size)
        generation = Generation(population.generation, population.sigma, episodes.step_cap, episodes.remove_alive_bonus)
        shards = _shard(episodes).split(self.size * self.per_actor)
        weights = self.connection.ray.put(_weights(population, self.agent))
        outcomes = self.pool.work(
            shards, lambda actor, shard: actor.play_packed.remote(packed((generation, shard)), weights), should_stop
        )
        return Rollout.join([rollout_of(unpacked(outcome)) for outcome in outcomes])

    def weighted_sum(
        self, population: Population, u: Tensor, should_stop: ShouldStop | None = None
    ) -> Mapping[str, Tensor]:
        """See :meth:`Player.weighted_sum`; a population of a single block is summed in this process.

        Raises:
            WorkersLostError: no worker is left.
        """
        members = population.members
        if len(members.blocks) == 1:
            return population.weighted_sum(u)
        generation = Generation(population.generation, population.sigma, None, False)
        spans = (slice(*(end * members.per_source for end in (own.start, own.stop))) for own in members.blocks)
        blocks = [Block(span.start, u[span].numpy()) for span in spans]
        sums = self.pool.work(
            blocks, lambda actor, block: actor.sum_packed.remote(packed((generation, block))), should_stop
        )
        totals: Arrays = unpacked(sums[0])
        for message in sums[1:]:
            for name, part in unpacked(message).items():
                totals[name] += part
        return {name: torch.from_numpy(total) for name, total in totals.items()}

    def close(self) -> None:
        """See :meth:`Player.close`."""
        if hasattr(self, "pool"):
            self.pool.close()
        self.connection.close()
        self._home.close()


def _shard(episodes: Episodes) -> Shard:
    """Return all episodes as one shard."""
    segments = episodes.segments
    parts = None if segments is None else (segments.states.numpy(), segments.elapsed.numpy())
    return Shard(0, episodes.seeds.numpy(), episodes.observed_jobs, parts)


def _weights(population: Population, agent: Agent) -> Arrays:
    """Return mean weights and observation statistics under the names of :meth:`Agent.state_dict`."""
    tensors = {f"policy.{name}": value for name, value in population.mean_state().items()}
    if isinstance(agent.norm, ObservationNorm):
        tensors |= {f"observation_norm.{name}": value for name, value in agent.norm.state_dict().items()}
    return {name: value.detach().cpu().numpy() for name, value in tensors.items()}


def rollout_of(outcome: Outcome) -> Rollout:
    """Return the outcome of a shard as a rollout."""
    returns, lengths, total, squares = (
        torch.from_numpy(values) for values in (outcome.returns, outcome.lengths, outcome.total, outcome.squares)
    )
    ends = None if outcome.ends is None else Ends(*(torch.from_numpy(values) for values in outcome.ends))
    moments = Moments(outcome.steps_observed, total, squares)
    return Rollout(returns, lengths, moments, outcome.diverged, outcome.alive_bonus, ends)


def _workers_and_threads(config: TrainConfig, connection: Connection) -> tuple[int, int]:
    """Return the numbers of workers and threads per worker: one worker per GPU or core, unless shards are too small.

    Raises:
        UserError: GPUs are requested, but the cluster has none or too few.
    """
    compute = config.compute
    if compute.device == "cuda":
        workers = compute.workers or connection.gpus
        if not 1 <= workers <= connection.gpus:
            raise UserError(
                f"backend ray needs one GPU per worker, and the cluster has {connection.gpus}: use --device cpu, "
                f"or at most that many --workers"
            )
        return workers, compute.threads or max(connection.cores // workers, 1)
    if compute.workers is not None:
        return compute.workers, compute.threads or 1
    most = max(config.strategy.population_size // _FEWEST_MEMBERS, 1)
    threads = compute.threads or max(min(connection.cores // most, min(connection.nodes, default=1)), 1)
    return max(min(connection.cores // threads, most), 1), threads


def workers_per_actor(workers: int, threads: int, nodes: Sequence[int]) -> int:
    """Return the number of workers that share an actor: if there are many, as many as fit on a node.

    Args:
        workers: number of workers.
        threads: cores that each needs.
        nodes: cores of every node.
    """
    if workers > _MOST_ACTORS:
        for size in range(max(nodes) // threads, 1, -1):
            if workers % size == 0 and sum(cores // (size * threads) for cores in nodes) >= workers // size:
                return size
    return 1


def shard_size(population_size: int, workers: int, per_worker: int = _SHARDS_PER_WORKER) -> int:
    """Return the members per shard: whole blocks of moments, and therefore whole antithetic pairs.

    Args:
        population_size: members of all shards.
        workers: number of workers.
        per_worker: shards per worker and generation, unless they are too small.
    """
    even = -(-population_size // workers)
    wanted = max(-(-even // per_worker), min(_FEWEST_MEMBERS, even))
    return -(-wanted // MOMENT_BLOCK) * MOMENT_BLOCK


def _warnings(threads: int, connection: Connection) -> list[str]:
    if threads <= connection.cores:
        return []
    return [
        f"warning: {threads} worker threads share {connection.cores} cores, so each has only a fraction of a core; "
        "do not draw conclusions about speed per core"
    ]


def compare_versions(here: dict[str, str], there: dict[str, str]) -> None:
    """Check that a worker has the same package versions as this process: with others, results may differ.

    Raises:
        UserError: versions differ; the message names them.
    """
    both = here.keys() & there.keys()  # a package that the worker works without does not matter
    other = [f"{name} {there[name]} in place of {here[name]}" for name in sorted(both) if there[name] != here[name]]
    if other:
        raise UserError(
            f"a worker has other versions than this process: {', '.join(other)}; install the same versions everywhere"
        )
