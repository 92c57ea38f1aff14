"""The scaling model: its sums, and that its bytes are those of the engine's messages."""

import argparse
import dataclasses
import json
import math
import pickle
from pathlib import Path

import pytest
import torch

from es_flipout.cluster.worker import Generation, Shard, ShardWorker
from es_flipout.rollout.builder import make_agent, make_one_env
from scripts import report
from scripts.speed import scaling
from scripts.speed._scaling_measure import Task, worker_constants
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
    p = predict(CONSTANTS, 4096, 100, Cluster(4, 8, 1.0))
    assert (p.workers, p.shards) == (32, 64)
    assert p.play_s == pytest.approx(128 * (100 * 1e-4 + 1e-3))
    assert p.head_s == pytest.approx(0.01 + 4096 * 5e-6)
    assert p.shard_s == pytest.approx(64 * 1e-3 + 4096e-7)
    down = 4 * 20_000 + 8 * 4096 + 64 * 500
    up = 16 * 4096 + 4096 // 16 * 16 * 17 + 64 * 500
    assert (p.bytes_down, p.bytes_up) == (down, up)
    assert p.network_s == pytest.approx((down + up) * 8 / 1e9)
    assert p.seconds == pytest.approx(p.play_s + p.head_s + p.network_s)
    assert p.next_bottleneck == "handling of shards"


def test_handling_of_shards_takes_the_time_when_there_are_too_many() -> None:
    p = predict(CONSTANTS, 1_000_000, 10, Cluster(1000, 16, 10.0))
    assert p.shard_s > p.play_s
    assert p.seconds == pytest.approx(p.head_s + p.network_s + p.shard_s)
    with_remedies = predict(CONSTANTS, 1_000_000, 10, Cluster(1000, 16, 10.0), remedies=True)
    assert with_remedies.seconds < p.seconds
    assert with_remedies.play_s > p.play_s  # the nodes then sum their part of the gradient


def test_bytes_are_those_of_the_messages() -> None:
    task = Task("CartPole-v1", (8,), 20)
    config = task.config()
    env = make_one_env(config)
    agent = make_agent(config, env)
    env.close()
    weights = {name: value.numpy() for name, value in agent.state_dict().items()}
    measured = worker_constants(task, weights, 32)
    assert measured["step_s"] > 0
    for members in (64, 256):
        shard = Shard(0, torch.arange(members)[:, None].numpy(), members)
        generation = Generation(0, 0.1, 20, True)
        outcome = ShardWorker(config, members, 1).play(generation, shard, weights)
        real = len(pickle.dumps((generation, shard, outcome)))
        predicted = 24 * members + members // 16 * 16 * 4 + measured["shard_bytes"]
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
    assert row.endswith("| 1.50 |")
    assert text.count("| HalfCheetah-v5 | 1,000,000 | 1,000 |") == 2
