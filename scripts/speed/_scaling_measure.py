"""The measurements of ``scaling.py``: the constants of the model, and training to check it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from es_flipout.cluster.connect import Connection
from es_flipout.cluster.pool import Pool
from es_flipout.cluster.sharded import ShardedPlayer, rollout_of
from es_flipout.cluster.worker import Arrays, Generation, Outcome, Shard, ShardWorker, packed, unpacked
from es_flipout.config import TrainConfig
from es_flipout.rollout.builder import make_agent, make_one_env
from es_flipout.rollout.episodes import MOMENT_BLOCK, Rollout, start_seeds
from es_flipout.rollout.memory import stored_bytes
from es_flipout.strategy.evolution_strategy import EvolutionStrategy
from es_flipout.strategy.population import Population
from es_flipout.strategy.shaping import centered_ranks
from es_flipout.training.setup import make_trainer
from scripts import report


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


# Episodes of equal length, as in the model: an untrained policy falls at once, and a few live slots cost as much as many.
LYING = (("terminate_when_unhealthy", False),)
TASKS = (
    Task("HalfCheetah-v5", (64, 64), 1000),
    Task("Hopper-v5", (64, 64), 1000, LYING),
    Task("Humanoid-v5", (256, 256), 1000, LYING),
)


def measure(task: Task, quick: bool = False) -> dict[str, Any]:
    """The constants of a task on this machine, without those of its workers."""
    config = task.config()
    env = make_one_env(config)
    agent = make_agent(config, env)
    env.close()
    weights = {name: value.numpy() for name, value in agent.state_dict().items()}
    handled = {members: handling(agent.obs_dim, members, weights, 8 if quick else 64) for members in (32, 512)}
    shard_member = slope(handled)
    total, part = torch.zeros(1 << 20), torch.ones(1 << 20)
    return {
        **update_constants(config, agent.module, (256, 1024) if quick else (4096, 32_768)),
        "shard_s": max(handled[32] - 32 * shard_member, 0.0),
        "shard_member_s": shard_member,
        "shard_bytes": shard_bytes(task, weights),
        "add_s": best(lambda: total.add_(part), 5) / len(total),
        "weights_bytes": sum(value.nbytes for value in weights.values()),
        "observations": agent.obs_dim,
        "weights": sum(parameter.numel() for parameter in agent.module.parameters()),
    }


def shard_bytes(task: Task, weights: Arrays) -> int:
    """Bytes of a shard and its outcome, without what grows with its members."""
    config, members = task.config(), 64
    shard = Shard(0, torch.arange(members)[:, None].numpy(), members)
    generation = Generation(0, config.strategy.sigma, 5, True)
    outcome = ShardWorker(config, members, 1).play(generation, shard, weights)
    grows = shard.seeds.nbytes + outcome.returns.nbytes + outcome.lengths.nbytes
    grows += outcome.total.nbytes + outcome.squares.nbytes
    return len(packed((generation, shard))) + len(packed(outcome)) - grows


def update_constants(config: TrainConfig, module: torch.nn.Module, sizes: tuple[int, int]) -> dict[str, Any]:
    """Of the training process, from a small and a large population."""
    asks, tells, ranks, seeds, member_bytes = {}, {}, {}, {}, 0.0
    for members in sizes:
        strategy = EvolutionStrategy(module, members, config.strategy.sigma, config.strategy.perturbation)
        returns = torch.randn(members, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        asks[members] = best(lambda s=strategy: _ask(s), 3)
        tells[members] = min(_tell_seconds(strategy, returns) for _ in range(4))
        ranks[members] = best(lambda r=returns: centered_ranks(r), 3)
        population = strategy.ask()
        seeds[members] = best(lambda p=population: start_seeds(p, 1), 3)
        member_bytes = stored_bytes(population) / members
    ask, tell = slope(asks), slope(tells)
    return {
        "ask_member_s": ask,
        "seeds_member_s": slope(seeds),
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
    """Processor time of the training process for a shard of ``members``: sent, answered at once, received."""
    blocks = torch.zeros(members // MOMENT_BLOCK, observations, dtype=torch.float64).numpy()
    returns = torch.zeros(members, 1, dtype=torch.float64).numpy()
    answer = packed(Outcome(returns, returns.astype("int64"), 1.0, blocks, blocks, 0, 0.0))

    class Echo:  # local: Ray then sends it to its workers, which cannot import scripts
        def __init__(self, answer: bytes) -> None:
            self.answer = answer

        def ready(self) -> None:
            pass

        def play_packed(self, message: bytes, weights: Any) -> bytes:
            return self.answer

    connection = Connection(None, 2)
    try:
        actor = connection.ray.remote(num_cpus=0.5)(Echo)
        pool = Pool(connection, lambda: actor.remote(answer), 2)
        generation = Generation(0, 0.1, None, True)
        work = [Shard(i, returns.astype("int64"), members) for i in range(shards)]

        def once() -> None:
            reference = connection.ray.put(weights)
            outcomes = pool.work(
                work, lambda actor, shard: actor.play_packed.remote(packed((generation, shard)), reference)
            )
            Rollout.join([rollout_of(unpacked(outcome)) for outcome in outcomes])

        return best(once, 5, time.process_time) / shards
    finally:
        connection.close()


def train(task: Task, workers: int, population: int, generations: int) -> tuple[report.Rows, report.Rows]:
    """Train with Ray workers, and measure in turn with every generation how long the same workers need for one shard.

    While that is measured, all workers play at the same time, as they do in training; nothing else is measured.

    Returns:
        Generations: environment steps and seconds. Shards: of every worker seconds and mean steps of short episodes, and of
        whole ones. The first generation, a warm-up, is left out.
    """
    config = task.config(
        population_size=population, generations=generations + 1, backend="ray", workers=workers, score_every=1 << 30
    )
    trainer = make_trainer(config)
    player = trainer.player
    assert isinstance(player, ShardedPlayer)
    get = player.connection.ray.get
    weights = {name: value.numpy() for name, value in trainer.agent.state_dict().items()}
    size, caps, sigma = player.size, (5, task.episode_steps), config.strategy.sigma

    def play(worker: Any) -> dict[str, float]:  # local, as above
        import time

        import numpy as np

        from es_flipout.cluster.worker import Generation, Shard

        found: dict[str, float] = {"members": size}
        for name, cap in zip(("short", "whole"), caps, strict=True):
            shard = Shard(0, np.arange(size)[:, None], size)
            started = time.perf_counter()
            outcome = worker.play(Generation(0, sigma, cap, True), shard, weights)
            found |= {f"{name}_s": time.perf_counter() - started, f"{name}_steps": float(outcome.lengths.mean())}
        return found

    played: report.Rows = []
    shards: report.Rows = []
    try:
        for number in range(generations + 1):
            found = get([actor.__ray_call__.remote(play) for actor in player.pool.actors])
            shards += [{"generation": number, "worker": i, **one} for i, one in enumerate(found)]
            started = time.perf_counter()
            env_steps = trainer.generation().env_steps
            played.append({"generation": number, "env_steps": env_steps, "seconds": time.perf_counter() - started})
    finally:
        trainer.close()
    return played[1:], shards[workers:]


def best(call: Callable[[], object], times: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """The shortest of a few calls after a warm-up: what the work needs where nothing disturbs it."""
    call()
    seconds = []
    for _ in range(times):
        started = clock()
        call()
        seconds.append(clock() - started)
    return min(seconds)


def slope(seconds: dict[int, float]) -> float:
    """Seconds per additional member, between the smallest and the largest measured."""
    few, many = min(seconds), max(seconds)
    return max((seconds[many] - seconds[few]) / (many - few), 0.0)
