"""The measurements of ``scaling.py``: the constants of the model, and training to check it."""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from es_flipout.cluster.connect import Connection
from es_flipout.cluster.pool import Pool
from es_flipout.cluster.worker import Arrays, Generation, Outcome, Shard, ShardWorker
from es_flipout.config import TrainConfig
from es_flipout.rollout.builder import make_agent, make_one_env
from es_flipout.rollout.episodes import MOMENT_BLOCK, start_seeds
from es_flipout.rollout.memory import stored_bytes
from es_flipout.strategy.evolution_strategy import EvolutionStrategy
from es_flipout.strategy.population import Population
from es_flipout.strategy.shaping import centered_ranks
from es_flipout.training.setup import make_trainer
from scripts.speed._scaling_model import Constants


@dataclass(frozen=True)
class Task:
    """What is trained: one episode of ``episode_steps`` steps for each member; ``kwargs`` of the environment."""

    env_id: str
    hidden: tuple[int, ...]
    episode_steps: int
    kwargs: tuple[tuple[str, Any], ...] = ()

    def config(self, **changes: Any) -> TrainConfig:
        """Its configuration."""
        kwargs = json.dumps({"max_episode_steps": self.episode_steps} | dict(self.kwargs))
        fixed = {"population_size": 256, "generations": 1, "device": "cpu", "env_kwargs": kwargs, "threads": 1}
        return TrainConfig.of(self.env_id, hidden=self.hidden, **(fixed | changes))


# Episodes of equal length, as in the model: an untrained Humanoid falls at once, and a few live slots cost as much as many.
TASKS = (
    Task("HalfCheetah-v5", (64, 64), 1000),
    Task("Humanoid-v5", (256, 256), 1000, (("terminate_when_unhealthy", False),)),
)


def measure(task: Task, quick: bool = False) -> Constants:
    """The constants of a task on this machine."""
    config = task.config()
    env = make_one_env(config)
    agent = make_agent(config, env)
    env.close()
    weights = {name: value.numpy() for name, value in agent.state_dict().items()}
    handled = {members: handling(agent.obs_dim, members, weights, 8 if quick else 64) for members in (32, 512)}
    shard_member = slope(handled)
    total, part = torch.zeros(1 << 20), torch.ones(1 << 20)
    return Constants(
        **worker_constants(task, weights, 64 if quick else 256),
        **update_constants(config, agent.module, (256, 1024) if quick else (4096, 32_768)),
        shard_s=max(handled[32] - 32 * shard_member, 0.0),
        shard_member_s=shard_member,
        add_s=best(lambda: total.add_(part), 5) / len(total),
        weights_bytes=sum(value.nbytes for value in weights.values()),
        observations=agent.obs_dim,
        weights=sum(parameter.numel() for parameter in agent.module.parameters()),
    )


def worker_constants(task: Task, weights: Arrays, members: int) -> dict[str, Any]:
    """Of a worker in this process: from short and longer episodes, which differ in nothing but the number of steps."""
    config = task.config()
    worker = ShardWorker(config, members, 1)
    shard = Shard(0, torch.arange(members)[:, None].numpy(), members)
    seconds, lengths, overhead = [], [], 0
    for cap in (5, task.episode_steps):
        generation = Generation(0, config.strategy.sigma, cap, True)
        seconds.append(best(lambda g=generation: worker.play(g, shard, weights), 3) / members)
        outcome = worker.play(generation, shard, weights)
        lengths.append(float(outcome.lengths.mean()))
        grows = shard.seeds.nbytes + outcome.returns.nbytes + outcome.lengths.nbytes
        grows += outcome.total.nbytes + outcome.squares.nbytes
        overhead = len(pickle.dumps((generation, shard, outcome))) - grows
    step = (seconds[1] - seconds[0]) / (lengths[1] - lengths[0])
    return {
        "step_s": step,
        "worker_member_s": max(seconds[0] - lengths[0] * step, 0.0),
        "shard_bytes": overhead,
    }


def update_constants(config: TrainConfig, module: torch.nn.Module, sizes: tuple[int, int]) -> dict[str, Any]:
    """Of the training process, from a small and a large population."""
    asks, tells, ranks, member_bytes = {}, {}, {}, 0.0
    for members in sizes:
        strategy = EvolutionStrategy(module, members, config.strategy.sigma, config.strategy.perturbation)
        returns = torch.randn(members, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        asks[members] = best(lambda s=strategy: _ask(s), 3)
        tells[members] = min(_tell_seconds(strategy, returns) for _ in range(4))
        ranks[members] = best(lambda r=returns: centered_ranks(r), 3)
        member_bytes = stored_bytes(strategy.ask()) / members
    ask, tell = slope(asks), slope(tells)
    return {
        "ask_member_s": ask,
        "tell_member_s": tell,
        "rank_member_s": slope(ranks),
        "generation_s": max(asks[sizes[0]] + tells[sizes[0]] - sizes[0] * (ask + tell), 0.0),
        "member_bytes": member_bytes,
    }


def _ask(strategy: EvolutionStrategy) -> Population:
    population = strategy.ask()
    start_seeds(population, 1)
    return population


def _tell_seconds(strategy: EvolutionStrategy, returns: torch.Tensor) -> float:
    strategy.ask()
    started = time.perf_counter()
    strategy.tell(returns)
    return time.perf_counter() - started


def handling(observations: int, members: int, weights: Arrays, shards: int) -> float:
    """Seconds of the training process for a shard of ``members``: sent, answered at once, received."""
    blocks = torch.zeros(members // MOMENT_BLOCK, observations, dtype=torch.float64).numpy()
    returns = torch.zeros(members, 1, dtype=torch.float64).numpy()
    outcome = Outcome(returns, returns.astype("int64"), 1.0, blocks, blocks, 0, 0.0)

    class Echo:  # local: Ray then sends it to its workers, which cannot import scripts
        def __init__(self, outcome: Any) -> None:
            self.outcome = outcome

        def ready(self) -> None:
            pass

        def play(self, generation: Any, shard: Any, weights: Any) -> Any:
            return self.outcome

    connection = Connection(None, 2)
    try:
        actor = connection.ray.remote(num_cpus=0.5)(Echo)
        pool = Pool(connection, lambda: actor.remote(outcome), 2)
        generation = Generation(0, 0.1, None, True)
        work = [Shard(i, returns.astype("int64"), members) for i in range(shards)]

        def once() -> None:
            reference = connection.ray.put(weights)
            pool.work(work, lambda actor, shard: actor.play.remote(generation, shard, reference))

        return best(once, 5) / shards
    finally:
        connection.close()


def train(task: Task, workers: int, population: int, generations: int) -> list[tuple[int, float]]:
    """Environment steps and seconds of generations of training with Ray workers; the first, a warm-up, is left out."""
    config = task.config(
        population_size=population, generations=generations + 1, backend="ray", workers=workers, score_every=1 << 30
    )
    trainer = make_trainer(config)
    played = []
    try:
        for _ in range(generations + 1):
            started = time.perf_counter()
            env_steps = trainer.generation().env_steps
            played.append((env_steps, time.perf_counter() - started))
    finally:
        trainer.close()
    return played[1:]


def best(call: Callable[[], object], times: int) -> float:
    """The shortest of a few calls after a warm-up: what the work needs where nothing disturbs it."""
    call()
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def slope(seconds: dict[int, float]) -> float:
    """Seconds per additional member, between the smallest and the largest measured."""
    few, many = min(seconds), max(seconds)
    return max((seconds[many] - seconds[few]) / (many - few), 0.0)
