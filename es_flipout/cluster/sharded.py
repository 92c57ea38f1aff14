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

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from es_flipout.cluster.connect import Connection
from es_flipout.cluster.pool import START_S, Pool
from es_flipout.config import TrainConfig
from es_flipout.errors import UserError
from es_flipout.perturbations import Family, Members
from es_flipout.policies.agent import Agent
from es_flipout.policies.networks import initial_state
from es_flipout.policies.observation_norm import Moments, ObservationNorm
from es_flipout.randomness import Address
from es_flipout.rollout.builder import Parts, build, family_of, forward_settings, local_player, make_strategy, slots_for
from es_flipout.rollout.episodes import MOMENT_BLOCK, Ends, Episodes, Rollout, Segments, ShouldStop
from es_flipout.rollout.plan import device_slots
from es_flipout.rollout.players import LocalPlayer, Player
from es_flipout.runinfo import versions
from es_flipout.strategy.population import ForwardSettings, Population
from es_flipout.strategy.row_block import tensors_in
from es_flipout.strategy.unperturbed import Unperturbed

_FEWEST_MEMBERS = 32  # minimum size of a shard: a row costs more in a forward with fewer rows
_SHARDS_PER_WORKER = 2  # per generation, so that a fast worker can relieve a slow one
_GPU_START_S = 900.0  # time limit for a worker that first compiles kernels, beside others that compile them, too
_FEWEST_LIKE = 16  # every BLAS has special kernels for fewer rows

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Generation:
    """What all shards of a generation have in common; see :class:`es_flipout.rollout.episodes.Episodes`."""

    number: int
    sigma: float
    step_cap: int | None
    remove_alive_bonus: bool


@dataclass(frozen=True)
class Shard:
    """Consecutive members: the number of the first, and their episodes.

    Attributes:
        first: number of the first member.
        seeds: ``(n, E)`` int64.
        moment_jobs: the number of first jobs of the shard whose observations are summed.
        segments: states ``(n, E, K)`` and elapsed steps ``(n, E)`` of episodes that continue, see
            :class:`es_flipout.rollout.episodes.Segments`; None to play from the start.
    """

    first: int
    seeds: NDArray[np.int64]
    moment_jobs: int
    segments: tuple[NDArray[np.float64], NDArray[np.int64]] | None = None


@dataclass(frozen=True)
class Outcome:
    """The parts of a shard's rollout that are sent back."""

    returns: NDArray[np.float64]
    lengths: NDArray[np.int64]
    steps_observed: float
    total: NDArray[np.float64]
    squares: NDArray[np.float64]
    diverged: int
    alive_bonus: float
    ends: tuple[NDArray[np.float64], NDArray[np.bool_]] | None = None


@dataclass(frozen=True)
class Block:
    """Consecutive members whose weighted noise is summed: the number of the first, and the weights ``(n,)`` float32."""

    first: int
    weights: NDArray[np.float32]


class ShardWorker:
    """Plays shards; used as a Ray actor, and in tests as an ordinary object."""

    def __init__(self, config: TrainConfig, size: int, threads: int) -> None:
        """Create environments and a policy.

        Args:
            config: configuration of the run.
            size: members per shard.
            threads: number of physics threads.
        """
        torch.set_num_threads(1)
        own = config.replace(threads=threads, overlap=False, backend="local")
        if config.compute.physics == "gpu" and config.compute.slots is None:
            slots = device_slots(own.replace(population_size=size))  # from the memory of this worker's GPU
        else:
            slots = min(size * config.task.episodes, slots_for(config))
        self._agent, strategy, self._player = build(own.replace(slots=slots))
        self._config, module, self._device = config, self._agent.module, strategy.device
        self._forward = forward_settings(config, module)
        if self._device.type == "cpu":
            self._forward = settings_like(self._forward, module, family_of(config), self._agent.obs_dim, slots)
        module.to(self._device)

    def ready(self) -> dict[str, str]:
        """Return the worker's package versions."""
        return versions()

    def play(self, generation: Generation, shard: Shard, weights: Arrays) -> Outcome:
        """Play all episodes of a shard's members with the generation's mean weights and statistics."""
        self._agent.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in weights.items()})
        population = self._population(generation, shard.first, len(shard.seeds))
        seeds, segments = torch.from_numpy(shard.seeds.copy()), None
        if shard.segments is not None:
            segments = Segments(*(torch.from_numpy(values.copy()) for values in shard.segments))
        episodes = Episodes(seeds, generation.step_cap, generation.remove_alive_bonus, shard.moment_jobs, segments)
        rollout = self._player.play(population, episodes)
        blocks = rollout.moment_blocks
        return Outcome(
            rollout.episode_returns.numpy(),
            rollout.lengths.numpy(),
            blocks.count,
            blocks.total.numpy(),
            blocks.squares.numpy(),
            rollout.diverged,
            rollout.alive_bonus,
            None if rollout.ends is None else (rollout.ends.states.numpy(), rollout.ends.running.numpy()),
        )

    @torch.no_grad()
    def weighted_sum(self, generation: Generation, block: Block) -> Arrays:
        """Return the sum of the weights of a block's members times their noise, by the names of the parameters."""
        population = self._population(generation, block.first, len(block.weights))
        sums = population.weighted_sum(torch.from_numpy(block.weights.copy()))
        return {name: total.numpy() for name, total in sums.items()}

    def _population(self, generation: Generation, first: int, size: int) -> Population:
        strategy = self._config.strategy
        members = Members(strategy.population_size, strategy.antithetic, self._device, size, first)
        address = Address(self._config.schedule.seed, generation.number)
        family = family_of(self._config)
        return Population(self._agent.module, family, members, generation.sigma, address, self._forward)


def settings_like(
    settings: ForwardSettings, module: nn.Module, family: Family, obs_dim: int, rows: int
) -> ForwardSettings:
    """Find the smallest row block for ``rows`` rows at a time that rounds like the row block of ``settings``.

    How a BLAS rounds a row depends only on the shapes, so a trial with random numbers is enough: another order of
    operations would change some of the thousands of outputs.
    """
    reference = settings.row_block
    assert reference is not None, "CPU settings always have a row block"
    members = Members(reference + reference % 2, True, torch.device("cpu"), reference + reference % 2)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(reference, obs_dim, generator=generator)]
    state = initial_state(module, reference, members.device)
    if state is not None:
        inputs.append(torch.randn(state.shape, generator=generator))

    def outputs(row_block: int) -> list[Tensor]:
        population = Population(module, family, members, 0.1, Address(0), ForwardSettings(row_block))
        return tensors_in((population.select(torch.arange(reference))(*inputs),))

    expected = outputs(reference)
    block = min(max(1 << max(rows - 1, 0).bit_length(), _FEWEST_LIKE), reference)
    while block < reference:
        if all(torch.equal(a, b) for a, b in zip(outputs(block), expected, strict=True)):
            return dataclasses.replace(settings, row_block=block)
        block *= 2
    return settings


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
        size: members per shard.
        warnings: warnings for the user about the use of the cluster.
        WORKER: class of the actors.
    """

    WORKER: ClassVar[type[ShardWorker]] = ShardWorker
    needs_noise = False

    def __init__(self, config: TrainConfig, home: LocalPlayer, reserve_cores: bool = True) -> None:
        """Connect and start the workers.

        Args:
            config: configuration of the run.
            home: plays unperturbed policies in this process.
            reserve_cores: whether Ray reserves cores for these workers; otherwise they may share them with others.

        Raises:
            UserError: Ray is not installed, no cluster answers, no worker starts, or workers have other package
                versions than this process.
        """
        self.agent, self.max_episode_steps, self._home = home.agent, home.max_episode_steps, home
        self._connection = connection = Connection(config.compute.ray_address)
        self.workers, self.threads = _workers_and_threads(config, connection)
        self.warnings = _warnings(self.workers * self.threads, connection)
        gpus, per_worker, start_s = 0, _SHARDS_PER_WORKER, START_S
        if config.compute.device == "cuda":  # a GPU plays a whole share at once, no slower than half of it
            gpus, per_worker, start_s = 1, 1, _GPU_START_S
        self.size = shard_size(config.strategy.population_size, self.workers, per_worker)
        # With more workers than cores, each reserves a fraction of a core.
        cores = min(self.threads, max(connection.cores / self.workers, 0.01)) if reserve_cores else 0
        actor = connection.ray.remote(num_cpus=cores, num_gpus=gpus, max_restarts=0)(self.WORKER)
        arguments = (config, self.size, self.threads)
        try:
            self.pool = Pool(connection, lambda: actor.remote(*arguments), self.workers, start_s)
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
        shards = [_shard(episodes, first, self.size) for first in range(0, population.size, self.size)]
        weights = self._connection.ray.put(_weights(population, self.agent))
        outcomes = self.pool.work(
            shards, lambda actor, shard: actor.play.remote(generation, shard, weights), should_stop
        )
        return Rollout.join([_rollout(outcome) for outcome in outcomes])

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
        sums = self.pool.work(blocks, lambda actor, block: actor.weighted_sum.remote(generation, block), should_stop)
        totals = {name: torch.from_numpy(part.copy()) for name, part in sums[0].items()}
        for parts in sums[1:]:
            for name, total in totals.items():
                total += torch.from_numpy(parts[name].copy())
        return totals

    def close(self) -> None:
        """See :meth:`Player.close`."""
        if hasattr(self, "pool"):
            self.pool.close()
        self._connection.close()
        self._home.close()


def _shard(episodes: Episodes, first: int, size: int) -> Shard:
    """Return the episodes of at most ``size`` members from ``first`` on."""
    here, segments = slice(first, first + size), episodes.segments
    seeds = episodes.seeds[here]
    moment_jobs = min(max(episodes.moment_jobs - first * episodes.count, 0), seeds.numel())
    parts = None if segments is None else (segments.states[here].numpy(), segments.elapsed[here].numpy())
    return Shard(first, seeds.numpy(), moment_jobs, parts)


def _weights(population: Population, agent: Agent) -> Arrays:
    """Return mean weights and observation statistics under the names of :meth:`Agent.state_dict`."""
    tensors = {f"policy.{name}": value for name, value in population.mean_state().items()}
    if isinstance(agent.norm, ObservationNorm):
        tensors |= {f"observation_norm.{name}": value for name, value in agent.norm.state_dict().items()}
    return {name: value.detach().cpu().numpy() for name, value in tensors.items()}


def _rollout(outcome: Outcome) -> Rollout:
    returns, lengths, total, squares = (
        torch.from_numpy(values.copy())  # arrays from Ray's object store are read-only
        for values in (outcome.returns, outcome.lengths, outcome.total, outcome.squares)
    )
    ends = None if outcome.ends is None else Ends(*(torch.from_numpy(values.copy()) for values in outcome.ends))
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
