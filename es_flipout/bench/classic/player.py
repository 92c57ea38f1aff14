"""The classic strategy on Ray: OpenAI-ES as published (Salimans et al. 2017), with minimal overhead.

Every worker has one core and plays one independently perturbed policy at a time in one Gymnasium environment. It holds
the noise table. For each member it receives an offset into the table, a sign and the seeds of the episodes, and it
returns returns, lengths and sums over observations. The mean weights are sent once per generation, in
:meth:`ClassicWorker.begin`.

Letters: ``P`` members, ``E`` episodes per member, ``D`` parameters, ``O`` observation size.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import nn
from typing_extensions import override

from es_flipout.bench.classic.noise_table import table_size
from es_flipout.bench.classic.strategy import ClassicStrategy, TablePopulation, flat_parameters
from es_flipout.bench.classic.worker import BLOCK, Center, ClassicWorker, Played, Task, WorkerSpec
from es_flipout.cluster.connect import Connection
from es_flipout.cluster.pool import Pool
from es_flipout.cluster.sharded import compare_versions
from es_flipout.config import TrainConfig
from es_flipout.envs import BatchEnv, EnvironmentFailureError
from es_flipout.envs.make import NAMESPACE
from es_flipout.errors import UserError
from es_flipout.policies.agent import Agent
from es_flipout.policies.networks import MLP, Linear
from es_flipout.policies.observation_norm import CLIP, Moments, Normalizer, ObservationNorm
from es_flipout.rollout.builder import Parts, Say, make_agent, make_one_env, make_strategy
from es_flipout.rollout.episodes import Episodes, Rollout, ShouldStop
from es_flipout.rollout.players import Player
from es_flipout.runinfo import versions
from es_flipout.strategy.population import Population
from es_flipout.strategy.unperturbed import Unperturbed

_LEAST_S = 0.01  # a task should take at least this long; otherwise messages cost as much as the work


def build_classic(config: TrainConfig, say: Say | None = None) -> Parts:
    """Build the parts of a run whose episodes are played by classic workers."""
    del say
    env = make_one_env(config)
    agent = make_agent(config, env)
    env.close()
    return Parts(agent, make_strategy(config, agent.module, kind=ClassicStrategy), ClassicPlayer(config, agent, env))


def worker_spec(config: TrainConfig, module: nn.Module) -> WorkerSpec:
    """Return what a worker needs to know about a run.

    Raises:
        UserError: classic workers do not support the policy.
    """
    if isinstance(module, MLP):
        linears, activation = [cast(nn.Linear, layer) for layer in module.layers], config.policy.activation
    elif isinstance(module, Linear):
        linears, activation = [module.layer], "tanh"
    else:
        raise UserError(
            f"classic Ray workers support the policies mlp and linear, not {config.policy.kind}; "
            "use --worker-kind engine, which supports all policies"
        )
    numbers = sum(p.numel() for p in module.parameters())
    return WorkerSpec(
        env_id=config.task.env_id.removeprefix(NAMESPACE),
        env_kwargs=config.task.parsed_env_kwargs(),
        observed=config.task.observed,
        layers=tuple((layer.out_features, layer.in_features, layer.bias is not None) for layer in linears),
        activation=activation,
        squash=config.policy.squash,
        table_size=table_size(numbers),
    )


def center_of(population: TablePopulation | Unperturbed, norm: Normalizer, cap: int | None, moment_jobs: int) -> Center:
    """Return what workers need to know about a generation; see :class:`Center`."""
    scaling = None
    if isinstance(norm, ObservationNorm):
        factor, offset = norm.factor.numpy(), norm.offset.numpy()
        scaling = factor, offset, np.full_like(offset, -CLIP), np.full_like(offset, CLIP)
    if isinstance(population, TablePopulation):
        return Center(population.mean, population.sigma, scaling, cap, moment_jobs)
    return Center(flat_parameters(population.module), 0.0, scaling, cap, moment_jobs)


@dataclass
class Times:
    """Time spent in one call of :meth:`ClassicPlayer.play`, in seconds.

    Attributes:
        wall: from the call to its return.
        busy: in tasks, summed over all workers.
        step, reset: the part of ``busy`` in the environment's own ``step`` and ``reset``; zero unless profiling is on.
        tasks: number of tasks that were handed out.
    """

    wall: float = 0.0
    busy: float = 0.0
    step: float = 0.0
    reset: float = 0.0
    tasks: int = 0


class ClassicPlayer(Player):
    """Plays on classic workers of a Ray cluster, one core each.

    Work is handed out in blocks of members, large ones first, so that no worker waits long for a slow one at the end.
    If a worker dies, another one repeats its task: noise and start states are addressed, so the result does not change.

    Attributes:
        workers: number of workers.
        cores: number of cores of the cluster.
        profile: whether to time the environments' own ``step`` and ``reset``, which adds a little overhead.
        times: times of the last call of :meth:`play`.
    """

    def __init__(self, config: TrainConfig, agent: Agent, env: BatchEnv) -> None:
        """Connect, start the workers and wait for them.

        Args:
            config: configuration of the run.
            agent: see :class:`es_flipout.rollout.players.Player`.
            env: one environment of the task; only its time limit and alive bonus are read.

        Raises:
            UserError: Ray is not installed, no cluster answers, no worker starts, workers have other package versions
                than this process, or classic workers do not support the policy.
        """
        self.agent, self.max_episode_steps, self._alive_bonus = agent, env.max_episode_steps, env.alive_bonus
        self._spec = worker_spec(config, agent.module)
        self._connection = connection = Connection(config.compute.ray_address)
        self.cores = connection.cores
        self.workers = config.compute.workers or self.cores
        self.warnings = [
            f"warning: {self.workers} classic workers share {connection.cores} cores, so each has a fraction of one; "
            "steps per second of a worker are then less than those of a core, which biases comparisons against them"
        ] * (self.workers > connection.cores)
        self.profile, self.times = False, Times()
        self._seconds_per_member: float | None = None
        cores = min(1.0, connection.cores / self.workers)
        actor = connection.ray.remote(num_cpus=cores, max_restarts=0)(ClassicWorker)
        try:
            self.pool = Pool(connection, lambda: actor.remote(self._spec), self.workers)
            for answer in self.pool.answers:
                compare_versions(versions(), answer)
        except BaseException:
            self.close()
            raise

    @override
    def play(
        self, population: Population | Unperturbed, episodes: Episodes, should_stop: ShouldStop | None = None
    ) -> Rollout:
        """See :meth:`Player.play`; the population is a :class:`TablePopulation` or unperturbed.

        Raises:
            EnvironmentFailureError: the environment's own code raised an exception.
            RolloutInterrupted: ``should_stop`` returned true.
            WorkersLostError: no worker is left.
        """
        started = time.perf_counter()
        size = population.size
        episodes.check(size)
        if isinstance(population, TablePopulation):
            offsets, signs = population.offsets, population.signs
        else:
            assert isinstance(population, Unperturbed), "classic workers only support noise from the table"
            offsets, signs = np.zeros(size, np.int64), np.ones(size, np.float32)
        cap = episodes.cap_below(self.max_episode_steps)
        center = center_of(population, self.agent.norm, cap, episodes.observed_jobs)
        starts = episodes.seeds.numpy()
        tasks = [
            Task(part.start, offsets[part], signs[part], starts[part])
            for part in _parts(size, self.active, self._least())
        ]
        # Ray does not resolve references inside a list, so the worker fetches the object itself, once per generation.
        place = [self._connection.ray.put(center)]
        profile = self.profile
        played: list[Played] = self.pool.work(
            tasks, lambda actor, task: actor.play_at.remote(task, place, profile), should_stop
        )
        failure = next((part.failure for part in played if part.failure is not None), None)
        if failure is not None:
            raise EnvironmentFailureError(f"{self._spec.env_id} failed: {failure}")
        moments = torch.from_numpy(np.concatenate([part.moments for part in played])).sum(0, keepdim=True)
        rollout = Rollout(
            torch.from_numpy(np.concatenate([part.returns for part in played])),
            torch.from_numpy(np.concatenate([part.lengths for part in played])),
            Moments(float(sum(part.counts.sum() for part in played)), moments[:, 0], moments[:, 1]),
            sum(part.diverged for part in played),
            self._alive_bonus if episodes.remove_alive_bonus else 0.0,
        )
        busy, step, reset = (
            sum(getattr(part, name) for part in played) for name in ("seconds", "step_seconds", "reset_seconds")
        )
        self._seconds_per_member = busy / size
        self.times = Times(time.perf_counter() - started, busy, step, reset, len(tasks))
        return rollout

    @override
    def close(self) -> None:
        """Stop the workers, and Ray if it was started for them."""
        if hasattr(self, "pool"):
            self.pool.close()
        self._connection.close()

    @property
    def active(self) -> int:
        """Number of workers that play."""
        return self.pool.active or self.workers

    @active.setter
    def active(self, count: int) -> None:
        self.pool.active = count

    def _least(self) -> int:
        """Return the minimum number of members per task."""
        per_member = self._seconds_per_member
        return BLOCK if not per_member else max(round(_LEAST_S / per_member), 1)


def _parts(size: int, workers: int, least: int) -> list[slice]:
    """Split members into consecutive parts of whole blocks; each is half of the rest per worker, so parts shrink."""
    parts: list[slice] = []
    start = 0
    while start < size:
        wanted = max(-(-(size - start) // (2 * workers)), least)
        end = min(start + -(-wanted // BLOCK) * BLOCK, size)
        parts.append(slice(start, end))
        start = end
    return parts
