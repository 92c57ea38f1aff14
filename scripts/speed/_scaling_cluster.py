"""A simulated cluster of ``scaling.py``: nodes that only sleep, but the training process and the messages of a real one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from es_flipout.cluster.connect import Connection
from es_flipout.cluster.sharded import ShardedPlayer, shard_size, workers_per_actor
from es_flipout.cluster.worker import Outcome, packed
from es_flipout.rollout.builder import local_player, make_strategy
from es_flipout.rollout.episodes import MOMENT_BLOCK, Episodes, start_seeds
from scripts.speed._scaling_measure import Task

MEMBERS_PER_WORKER = 64  # two shards of the smallest size


def simulate(task: Task, nodes: int, cores: int, generations: int, sleep_s: float) -> list[dict[str, Any]]:
    """Train on ``nodes`` simulated nodes with ``cores`` workers each; one row for every generation but the first.

    A simulated node is a Ray actor, as a real one's, in a process of this machine. For every message it sleeps instead of
    playing, and answers with an outcome of the right size, and with sums of the right size during the update. The training
    process does all it does on a real cluster. Its processor time is what it needs; on the clock the simulated nodes, which
    share the cores of this machine, are included.

    Args:
        task: environment and policy.
        nodes: number of simulated nodes.
        cores: workers per node.
        generations: generations that are measured.
        sleep_s: seconds that every message takes on a node.
    """
    members = nodes * cores * MEMBERS_PER_WORKER
    config = task.config(population_size=members, backend="ray", workers=nodes * cores, slots=1)
    agent, home = local_player(config, 1)
    strategy = make_strategy(config, agent.module)
    connection = Connection(None, 2)  # with more cores, Ray would start as many processes
    connection.nodes = [cores] * nodes
    player = _player(config, home, connection, agent, sleep_s)
    shards = members // player.size
    rows: list[dict[str, Any]] = []
    try:
        for generation in range(generations + 1):
            population = strategy.ask(draw=False)
            episodes = Episodes(start_seeds(population, 1))
            play: dict[str, Any] = {}
            rollout = _timed(play, "play", lambda p=population, e=episodes: player.play(p, e))
            rollout.fitness.copy_(torch.arange(members))  # of equal returns there would be nothing to sum
            _timed(play, "update", lambda r=rollout: strategy.tell(r.fitness, player.weighted_sum))
            fixed = {"nodes": nodes, "cores": cores, "members": members, "messages": shards // player.per_actor}
            rows.append({**fixed, "shards": shards, "sleep_s": sleep_s, "generation": generation, **play})
    finally:
        player.close()
    return rows[1:]


def _timed(into: dict[str, Any], name: str, call: Callable[[], Any]) -> Any:
    """Call, and note seconds on the clock, of this process and of this thread."""
    clocks = {"s": time.perf_counter, "cpu_s": time.process_time, "thread_s": time.thread_time}
    began = {unit: clock() for unit, clock in clocks.items()}
    result = call()
    into.update({f"{name}_{unit}": clock() - began[unit] for unit, clock in clocks.items()})
    return result


def _player(config: Any, home: Any, connection: Connection, agent: Any, sleep_s: float) -> ShardedPlayer:
    """A player whose actors are simulated."""
    workers, members = config.compute.workers, config.strategy.population_size
    size = shard_size(members, workers) * workers_per_actor(workers, 1, connection.nodes)
    moments = np.zeros((size // MOMENT_BLOCK, agent.obs_dim))  # in every message, although only the first have them
    returns, lengths = np.zeros((size, 1)), np.ones((size, 1), np.int64)
    outcome = packed(Outcome(returns, lengths, 1.0, moments, moments, 0, 0.0))
    sums = packed({name: value.detach().numpy() for name, value in agent.module.named_parameters()})

    class Node:  # local: Ray then sends it to its workers, which cannot import scripts, and need no torch
        def __init__(self, config: Any, size: int, threads: int, workers: int = 1) -> None:
            self.outcome = outcome

        def ready(self) -> dict[str, str]:
            return {}

        def play_packed(self, message: bytes, weights: Any) -> bytes:
            time.sleep(sleep_s)
            return self.outcome

        def sum_packed(self, message: bytes) -> bytes:
            return sums

    class Simulated(ShardedPlayer):
        WORKER = CREW = Node

    return Simulated(config, home, reserve_cores=False, connection=connection)
