"""The scaling model: bytes, time and bottleneck of a generation on a cluster, from constants measured on one machine.

A shard is a number of consecutive members that a worker plays together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from es_flipout.cluster.sharded import shard_size, workers_per_actor
from es_flipout.perturbations.base import SOURCES_PER_BLOCK
from es_flipout.rollout.episodes import MOMENT_BLOCK, MOMENT_JOBS

FEWEST_MEMBERS = 32  # of a shard, as in es_flipout/cluster/sharded.py


@dataclass(frozen=True)
class Constants:
    """Seconds and bytes, all measured on one machine, with one thread."""

    step_s: float  # of a worker, for one environment step with its policy, while all cores do the same
    worker_member_s: float  # of a worker, for drawing a member's signs and starting its episode, in the same way
    ask_member_s: float  # of the training process, for a member's signs and start state
    tell_member_s: float  # of the training process, for a member's rank and part of the gradient
    rank_member_s: float  # the part of tell_member_s that is ranks
    generation_s: float  # of the training process, for a generation, whatever its members
    shard_s: float  # of the training process, for sending a message and receiving its answer
    shard_member_s: float  # the same for each member of the message's shard
    add_s: float  # of the training process, for adding one number to a sum
    member_bytes: float  # memory of a member's signs
    weights_bytes: int  # mean weights and observation statistics
    shard_bytes: int  # of a shard and its outcome, without what grows with its members
    observations: int
    weights: int
    seeds_member_s: float = 0.0  # the part of ask_member_s that is start states; it was not always measured


@dataclass(frozen=True)
class Cluster:
    """Nodes with one worker for each core; ``gbit`` is the network of the machine that trains."""

    nodes: int
    cores: int
    gbit: float


@dataclass(frozen=True)
class Prediction:
    """One generation: seconds of its parts (``play_s``: of the worker with most to do), and bytes of the training process."""

    workers: int
    shards: int
    messages: int
    play_s: float
    head_s: float
    shard_s: float
    network_s: float
    bytes_down: int
    bytes_up: int
    env_steps: int

    @property
    def seconds(self) -> float:
        """Of the generation: shards are handled while others play, all else waits."""
        return self.head_s + self.network_s + max(self.play_s, self.shard_s)

    @property
    def at_play(self) -> float:
        """Part of the time in which the workers play."""
        return self.play_s / self.seconds

    @property
    def next_bottleneck(self) -> str:
        """What costs most, apart from playing."""
        parts = {"update": self.head_s, "handling of messages": self.shard_s, "network": self.network_s}
        return max(parts, key=lambda name: parts[name])


def predict(c: Constants, members: int, episode_steps: float, cluster: Cluster, remedies: bool = True) -> Prediction:
    """A generation of ``members`` with one episode each.

    Args:
        c: what was measured.
        members: ``P``.
        episode_steps: of every episode.
        cluster: where.
        remedies: whether many workers of a node share an actor, and workers sum the blocks of a large population's update;
            otherwise the training process deals with every core, and sums all.
    """
    workers = max(min(cluster.nodes * cluster.cores, members // FEWEST_MEMBERS), 1)
    size = shard_size(members, workers)
    shards = math.ceil(members / size)
    turns = math.ceil(shards / workers)
    play = turns * size * (episode_steps * c.step_s + c.worker_member_s)
    observed = math.ceil(min(members, MOMENT_JOBS) / MOMENT_BLOCK) * 16 * c.observations
    down, up = cluster.nodes * c.weights_bytes + 8 * members, 16 * members + observed
    per_actor = workers_per_actor(workers, 1, [cluster.cores] * cluster.nodes) if remedies else 1
    messages = math.ceil(shards / per_actor)
    blocks = math.ceil(members / (2 * SOURCES_PER_BLOCK))
    if remedies and blocks > 1:
        head = c.generation_s + members * (c.seeds_member_s + c.rank_member_s)
        head += blocks * (c.shard_s + c.weights * c.add_s)
        # The workers draw their blocks again, and sum them.
        of_block = c.ask_member_s - c.seeds_member_s + c.tell_member_s - c.rank_member_s
        head += math.ceil(blocks * per_actor / workers) * 2 * SOURCES_PER_BLOCK * of_block
        down += 4 * members
        up += 4 * blocks * c.weights
    else:
        head = c.generation_s + members * (c.ask_member_s + c.tell_member_s)
    traffic = down + up + messages * c.shard_bytes
    return Prediction(
        workers=workers,
        shards=shards,
        messages=messages,
        play_s=play,
        head_s=head,
        shard_s=messages * c.shard_s + members * c.shard_member_s,
        network_s=traffic * 8 / (cluster.gbit * 1e9),
        bytes_down=down + messages * c.shard_bytes // 2,
        bytes_up=up + messages * c.shard_bytes // 2,
        env_steps=round(members * episode_steps),
    )
