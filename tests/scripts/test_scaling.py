"""The scaling model: its sums, and that its bytes are those of the engine's messages."""

import argparse
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from es_flipout.cluster.worker import Generation, Shard, ShardWorker, packed
from es_flipout.rollout.builder import make_agent, make_one_env
from scripts import report
from scripts.speed import scaling
from scripts.speed._scaling_cluster import simulate
from scripts.speed._scaling_measure import Task, shard_bytes
from scripts.speed._scaling_model import Cluster, Constants, predict

CONSTANTS = Constants(
    step_s=1e-4,
    worker_member_s=1e-3,
    ask_member_s=2e-6,
    tell_member_s=3e-6,
    rank_member_s=1e-6,
    generation_s=0.01,
    shard_s=1e-3,
    shard_member_s=1e-7,
    add_s=1e-9,
    member_bytes=200.0,
    weights_bytes=20_000,
    shard_bytes=1_000,
    observations=17,
    weights=5_000,
    seeds_member_s=5e-7,
)
FREE = dataclasses.replace(CONSTANTS, **{f.name: 0 for f in dataclasses.fields(CONSTANTS) if f.name != "step_s"})


def test_workers_that_only_step_scale_without_loss() -> None:
    one = predict(FREE, 4096, 1000, Cluster(1, 1, math.inf))
    many = predict(FREE, 4096, 1000, Cluster(4, 16, math.inf))
    assert one.seconds == pytest.approx(4096 * 1000 * 1e-4)
    assert many.workers == 64
    assert one.seconds / many.seconds == pytest.approx(64)
    assert many.at_play == 1


def test_small_populations_have_fewer_workers_than_cores() -> None:
    assert predict(FREE, 512, 10, Cluster(4, 16, math.inf)).workers == 16


def test_parts_add_up() -> None:
    p = predict(CONSTANTS, 4096, 100, Cluster(4, 8, 1.0), remedies=False)
    assert (p.workers, p.shards, p.messages) == (32, 64, 64)
    assert p.play_s == pytest.approx(128 * (100 * 1e-4 + 1e-3))
    assert p.head_s == pytest.approx(0.01 + 4096 * 5e-6)
    assert p.shard_s == pytest.approx(64 * 1e-3 + 4096e-7)
    down = 4 * 20_000 + 8 * 4096 + 64 * 500
    up = 16 * 4096 + 4096 // 16 * 16 * 17 + 64 * 500
    assert (p.bytes_down, p.bytes_up) == (down, up)
    assert p.network_s == pytest.approx((down + up) * 8 / 1e9)
    assert p.seconds == pytest.approx(p.play_s + p.head_s + p.network_s)
    assert p.next_bottleneck == "handling of messages"
    in_crews = predict(CONSTANTS, 4096, 100, Cluster(4, 8, 1.0))
    assert (in_crews.shards, in_crews.messages) == (64, 8)
    assert in_crews.shard_s == pytest.approx(8 * 1e-3 + 4096e-7)
    assert in_crews.bytes_up == p.bytes_up - 56 * 500
    assert in_crews.head_s == p.head_s  # a single block, which the training process sums


def test_handling_of_shards_takes_the_time_when_there_are_too_many() -> None:
    p = predict(CONSTANTS, 1_000_000, 10, Cluster(1000, 16, 10.0), remedies=False)
    assert p.shard_s > p.play_s
    assert p.seconds == pytest.approx(p.head_s + p.network_s + p.shard_s)
    with_remedies = predict(CONSTANTS, 1_000_000, 10, Cluster(1000, 16, 10.0))
    assert with_remedies.messages * 16 >= with_remedies.shards > with_remedies.messages * 15
    blocks = 123  # of 8,192 members, each summed by a node of its own
    one_block = 8192 * (2e-6 - 5e-7 + 3e-6 - 1e-6)
    head = 0.01 + 1_000_000 * (5e-7 + 1e-6) + blocks * (1e-3 + 5_000 * 1e-9)
    assert with_remedies.head_s == pytest.approx(head + one_block)
    assert with_remedies.bytes_up - 16_000_000 > 4 * blocks * 5_000
    assert with_remedies.seconds < p.seconds


def test_bytes_are_those_of_the_messages() -> None:
    task = Task("CartPole-v1", (8,), 20)
    config = task.config()
    env = make_one_env(config)
    agent = make_agent(config, env)
    env.close()
    weights = {name: value.numpy() for name, value in agent.state_dict().items()}
    overhead = shard_bytes(task, weights)
    for members in (64, 256):
        shard = Shard(0, torch.arange(members)[:, None].numpy(), members)
        generation = Generation(0, 0.1, 20, True)
        outcome = ShardWorker(config, members, 1).play(generation, shard, weights)
        real = len(packed((generation, shard))) + len(packed(outcome))
        predicted = 24 * members + members // 16 * 16 * 4 + overhead
        assert real == pytest.approx(predicted, abs=32)


def test_table_compares_with_training(tmp_path: Path) -> None:
    (tmp_path / "constants.json").write_text(json.dumps({"HalfCheetah-v5": dataclasses.asdict(CONSTANTS)}))
    seconds = predict(CONSTANTS, 512, 200, Cluster(1, 2, math.inf)).seconds
    played = {
        "task": "HalfCheetah-v5",
        "workers": 2,
        "population": 512,
        "env_steps": 512 * 200,
        "seconds": 1.5 * seconds,
    }
    report.append_csv(tmp_path / "runs.csv", [{**played, "generation": i} for i in range(3)])
    options = argparse.Namespace(out=tmp_path, node_cores=16, gbit=10.0, price_core_hour=0.04)
    text = scaling.table(options)
    (row,) = [line for line in text.splitlines() if line.startswith("| HalfCheetah-v5 | 2 | 512 | 200 |")]
    assert row.endswith("| 1.50 (1.50 to 1.50) |")
    # Constants of the workers that were measured together with the training, here half as long as those of the table.
    c = CONSTANTS
    shards = {"task": "HalfCheetah-v5", "workers": 2, "members": 100, "short_steps": 10, "whole_steps": 20}
    for generation, factor in enumerate((0.3, 0.5, 0.6)):
        for worker, slower in enumerate((0.5, 1.0)):  # the slowest worker counts
            times = {
                f"{name}_s": 100 * factor * slower * (c.worker_member_s + steps * c.step_s)
                for name, steps in (("short", 10), ("whole", 20))
            }
            report.append_csv(
                tmp_path / "shards.csv", [{**shards, "generation": generation, "worker": worker, **times}]
            )
    (row,) = scaling.check(tmp_path, {"HalfCheetah-v5": CONSTANTS})
    ratios = []
    for factor in (0.5, 0.3, 0.6):
        here = dataclasses.replace(c, step_s=c.step_s * factor, worker_member_s=c.worker_member_s * factor)
        ratios.append(f"{1.5 * seconds / predict(here, 512, 200, Cluster(1, 2, math.inf)).seconds:.2f}")
    assert row[-1] == f"{ratios[0]} ({ratios[2]} to {ratios[1]})"
    assert text.count("| HalfCheetah-v5 | 1,000,000 | 1,000 |") == 2


@pytest.mark.usefixtures("connection")
def test_simulated_nodes_get_the_messages_of_real_ones() -> None:
    (row,) = simulate(Task("CartPole-v1", (8,), 20), nodes=2, cores=9, generations=1, sleep_s=0.1)
    assert [row[name] for name in ("members", "shards", "messages")] == [2 * 9 * 64, 36, 4]
    assert row["play_s"] >= 0.1  # both messages of a node at a time
    assert 0 < row["play_cpu_s"] / row["shards"] < row["play_s"]
