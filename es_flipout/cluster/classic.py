"""The classic strategy on Ray: OpenAI-ES as published (Salimans et al. 2017), as lean as we could make it.

Every worker has one core and plays one independently perturbed policy at a time in one Gymnasium environment. It knows the noise
table; per member it is told an offset into it, a sign and the seeds of the episodes, and it answers with returns, lengths and
sums of the observations. The mean weights travel down once in a generation, in :meth:`ClassicWorker.begin`.

Letters: ``P`` members, ``E`` episodes of each, ``D`` parameters, ``O`` observation size.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import override

from es_flipout.agent import Agent
from es_flipout.cluster.classic_worker import BLOCK, Center, ClassicWorker, Played, Task, WorkerSpec
from es_flipout.cluster.connect import Connection
from es_flipout.cluster.noise_table import noise_table, table_size
from es_flipout.cluster.pool import Pool
from es_flipout.cluster.sharded import compare_versions
from es_flipout.config import TrainConfig
from es_flipout.envs import EnvironmentFailureError, make_env
from es_flipout.envs.make import NAMESPACE
from es_flipout.errors import UserError
from es_flipout.observation_norm import CLIP, Moments, ObservationNorm
from es_flipout.perturbations import Dense, Members, Perturbation
from es_flipout.perturbations.independent import Independent, IndependentRows
from es_flipout.player import Player
from es_flipout.policies import MLP, ActionMap, Linear
from es_flipout.population import Population, Unperturbed
from es_flipout.randomness import Address, Stream, integers
from es_flipout.rollout import MOMENT_JOBS, Rollout
from es_flipout.runinfo import versions
from es_flipout.strategy import EvolutionStrategy

_GATHERED = 1 << 22  # numbers of windows that are laid side by side
_LEAST_S = 0.01  # a task should take at least this long, or messages cost as much as the work


class TablePopulation(Population):
    """A population whose members' noise comes from the noise table, one window for all parameters of a member.

    It can be played like any other population, which is what the tests do; a classic worker makes the same members from
    :attr:`offsets` and :attr:`signs` alone.

    Attributes:
        offsets: ``(P,)`` int64, where a member's window begins; antithetic partners have the same.
        signs: ``(P,)`` float32, +1 or -1.
        mean: ``(D,)`` float32, all parameters one after the other.
    """

    @override
    def _perturbed(self, family: object) -> dict[str, Perturbation[Any]]:
        parameters = {name: p.detach() for name, p in self._module.named_parameters()}
        self.mean = flat_parameters(self._module)
        everyone = torch.arange(self.size)
        source_of = self.members.source_of(everyone)
        drawn = integers(Address(self.seed, self.generation), Stream.WEIGHT, self.members.sources)[:, 0]
        size = table_size(len(self.mean))
        # Drawn from 2^31 equally likely numbers, spread over all places where a window fits.
        sources = (drawn * (size - len(self.mean) + 1) >> 31).numpy()
        self.offsets = sources[source_of.numpy()]
        self.signs = self.members.sign_of(everyone).to(torch.float32).numpy()
        table = noise_table(size)
        perturbations: dict[str, Perturbation[Any]] = {}
        start = 0
        for name, mean in parameters.items():
            windows = sliding_window_view(table[start : size - len(self.mean) + start + mean.numel()], mean.numel())
            perturbations[name] = _TableWindow(mean, self.sigma, self.members, windows, sources)
            start += mean.numel()
        return perturbations


class _TableWindow(Independent):
    """A parameter whose noise is a part of each member's window; gathered when it is wanted, never kept.

    Args:
        windows: ``(places, size)``, the parameter's part of the window at every offset.
        offsets: ``(num_sources,)``.
    """

    def __init__(
        self, mean: Tensor, sigma: float, members: Members, windows: NDArray[np.float32], offsets: NDArray[np.int64]
    ) -> None:
        Perturbation.__init__(self, mean, sigma, members, Address(0))
        self._windows = windows
        self._offsets = offsets

    def _noise_of(self, sources: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(self._windows[self._offsets[sources]]).view(-1, *self.mean.shape)

    @override
    def select(self, members: Tensor) -> IndependentRows:
        scale = self.sigma * self.members.sign_of(members).to(self.mean.dtype)
        noise = self._noise_of(self.members.source_of(members).numpy())
        return IndependentRows(torch.addcmul(self.mean, noise, scale.view(-1, *(1,) * self.mean.ndim)))

    @override
    def noise(self, member: int) -> Tensor:
        index = torch.tensor([member])
        return self._noise_of(self.members.source_of(index).numpy())[0] * self.members.sign_of(index)[0]

    @override
    def weighted_sum(self, u: Tensor) -> Tensor:
        v = self.members.per_source(u).to(self.mean.dtype).numpy()
        total = np.zeros(self.mean.numel(), np.float32)
        step = max(_GATHERED // max(self.mean.numel(), 1), 1)
        for start in range(0, len(v), step):
            total += v[start : start + step] @ self._windows[self._offsets[start : start + step]]
        return torch.from_numpy(total).view_as(self.mean)


class ClassicStrategy(EvolutionStrategy):
    """The same strategy with noise from a table; its family is not used."""

    @override
    def ask(self) -> TablePopulation:
        """See :meth:`EvolutionStrategy.ask`."""
        members = Members(self.population_size, self.antithetic, self.device, self.population_size)
        self._asked = population = TablePopulation(
            self._mean, Dense(), members, self.sigma, self.seed, self.generation, self.row_block, "torch"
        )
        return population


def flat_parameters(module: nn.Module) -> NDArray[np.float32]:
    """All parameters of a module one after the other, ``(D,)`` float32."""
    return torch.cat([p.detach().flatten() for p in module.parameters()]).cpu().numpy()


def worker_spec(config: TrainConfig, module: nn.Module) -> WorkerSpec:
    """What a worker needs to know of a run.

    Raises:
        UserError: the policy is none that classic workers compute.
    """
    if isinstance(module, MLP):
        linears, activation = [cast(nn.Linear, layer) for layer in module.layers], config.activation
    elif isinstance(module, Linear):
        linears, activation = [module.layer], "tanh"
    else:
        raise UserError(
            f"classic Ray workers compute the policies mlp and linear, not {config.policy}; "
            "use --worker-kind engine, which computes all of them"
        )
    numbers = sum(p.numel() for p in module.parameters())
    return WorkerSpec(
        env_id=config.env_id.removeprefix(NAMESPACE),
        env_kwargs=config.parsed_env_kwargs(),
        observed=config.observed,
        layers=tuple((layer.out_features, layer.in_features, layer.bias is not None) for layer in linears),
        activation=activation,
        squash=config.squash,
        table_size=table_size(numbers),
    )


def center_of(
    population: TablePopulation | Unperturbed,
    norm: Callable[[Tensor], Tensor],
    cap: int | None,
    moment_jobs: int,
) -> Center:
    """What workers must know of a generation; see :class:`Center`."""
    scaling = None
    if isinstance(norm, ObservationNorm):
        factor, offset = norm.factor.numpy(), norm.offset.numpy()
        scaling = factor, offset, np.full_like(offset, -CLIP), np.full_like(offset, CLIP)
    if isinstance(population, TablePopulation):
        return Center(population.mean, population.sigma, scaling, cap, moment_jobs)
    return Center(flat_parameters(population.module), 0.0, scaling, cap, moment_jobs)


@dataclass
class Times:
    """Where the seconds of one :meth:`ClassicPlayer.play` went.

    Attributes:
        wall: from the call to its return.
        busy: of all workers together, in their tasks.
        step, reset: the part of ``busy`` in the environment's own ``step`` and ``reset``, where the player profiles.
        tasks: that were handed out.
    """

    wall: float = 0.0
    busy: float = 0.0
    step: float = 0.0
    reset: float = 0.0
    tasks: int = 0


class ClassicPlayer(Player):
    """Plays on classic workers of a Ray cluster, one core each.

    Work is handed out in blocks of members, large ones first, so that no worker waits for a slow one at the end. What a worker
    had in hand when it died is played again elsewhere: noise and start states are addressed, so the result does not change.

    Attributes:
        workers: how many there are.
        cores: of the cluster.
        profile: measure the environments' own ``step`` and ``reset``, which costs a little.
        times: of the last call of :meth:`play`.
    """

    def __init__(self, config: TrainConfig) -> None:
        """Connect, start the workers and wait for them.

        Raises:
            UserError: no Ray, no cluster, no worker, workers with other versions than here, or a policy that classic workers
                do not compute.
        """
        env = make_env(config.env_id, 1, observed=config.observed, **config.parsed_env_kwargs())
        self._describe(env)
        self._alive_bonus = env.alive_bonus
        env.close()
        agent = Agent(config, self.observation_space, self.action_space, self.observation_shape)
        self._spec = worker_spec(config, agent.module)
        self._connection = connection = Connection(config.ray_address)
        self.cores = connection.cores
        self.workers = config.workers or self.cores
        self.warnings = [
            f"warning: {self.workers} classic workers share {connection.cores} cores, so each gets only a part of one; "
            "steps per second of a worker are then not those of a core, and a comparison with others flatters the others"
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
        """See :meth:`Player.play`; the population is a :class:`TablePopulation` or unperturbed.

        Raises:
            EnvironmentFailureError: the environment's own code raised.
            RolloutInterrupted: ``should_stop`` said so.
            WorkersLostError: no worker is left.
        """
        started = time.perf_counter()
        size, limit, cap = population.size, self.max_episode_steps, max_episode_steps
        if isinstance(population, TablePopulation):
            offsets, signs = population.offsets, population.signs
        else:
            assert isinstance(population, Unperturbed), "classic workers know only noise from the table"
            offsets, signs = np.zeros(size, np.int64), np.ones(size, np.float32)
        center = center_of(
            population,
            observation_norm,
            cap if cap is not None and (limit is None or cap < limit) else None,
            min(moment_jobs, size * episodes) if collect_moments else 0,
        )
        starts = seeds.numpy()
        tasks = [
            Task(part.start, offsets[part], signs[part], starts[part])
            for part in _parts(size, self.active, self._least())
        ]
        # In a list Ray leaves it where it is until the worker asks for it, once in a generation.
        place = [self._connection.ray.put(center)]
        profile = self.profile
        played: list[Played] = self.pool.work(
            tasks, lambda actor, task: actor.play_at.remote(task, place, profile), should_stop
        )
        failure = next((part.failure for part in played if part.failure is not None), None)
        if failure is not None:
            raise EnvironmentFailureError(f"{self._spec.env_id} failed: {failure}")
        rollout = Rollout(
            torch.from_numpy(np.concatenate([part.returns for part in played])),
            torch.from_numpy(np.concatenate([part.lengths for part in played])),
            Moments(
                float(sum(part.counts.sum() for part in played)),
                torch.from_numpy(np.concatenate([part.moments[:, 0] for part in played])),
                torch.from_numpy(np.concatenate([part.moments[:, 1] for part in played])),
            ),
            sum(part.diverged for part in played),
            self._alive_bonus if remove_alive_bonus else 0.0,
        )
        busy, step, reset = (
            sum(getattr(part, name) for part in played) for name in ("seconds", "step_seconds", "reset_seconds")
        )
        self._seconds_per_member = busy / size
        self.times = Times(time.perf_counter() - started, busy, step, reset, len(tasks))
        return rollout

    @override
    def close(self) -> None:
        """End the workers, and the Ray that was started for them."""
        if hasattr(self, "pool"):
            self.pool.close()
        self._connection.close()

    @property
    def active(self) -> int:
        """How many of the workers play."""
        return self.pool.active or self.workers

    @active.setter
    def active(self, count: int) -> None:
        self.pool.active = count

    def _least(self) -> int:
        """Members of a task, at least."""
        per_member = self._seconds_per_member
        return BLOCK if not per_member else max(round(_LEAST_S / per_member), 1)


def _parts(size: int, workers: int, least: int) -> list[slice]:
    """Consecutive parts of the members in whole blocks: each half of what is left for a worker, so they get smaller."""
    parts: list[slice] = []
    start = 0
    while start < size:
        wanted = max(-(-(size - start) // (2 * workers)), least)
        end = min(start + -(-wanted // BLOCK) * BLOCK, size)
        parts.append(slice(start, end))
        start = end
    return parts
