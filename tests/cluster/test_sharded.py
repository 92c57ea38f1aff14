"""The sharded engine: the same bits as one process, whoever plays, also when workers die."""

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from es_flipout.agent import Agent
from es_flipout.checkpoint import load_checkpoint
from es_flipout.cluster import sharded
from es_flipout.cluster.connect import Connection
from es_flipout.cluster.pool import WorkersLostError
from es_flipout.cluster.sharded import Generation, ShardedPlayer, ShardWorker, Share, _arrangement, _share_size
from es_flipout.config import TrainConfig
from es_flipout.envs.base import EnvironmentFailureError
from es_flipout.errors import UserError
from es_flipout.perturbations import Flipout, LowRank
from es_flipout.policies import MLP, Linear, Recurrent
from es_flipout.population import Population, row_block_like
from es_flipout.rollout import MOMENT_BLOCK, Rollout
from es_flipout.trainer import Trainer

HOPPER = TrainConfig(
    env_id="Hopper-v5",
    generations=3,
    population_size=72,
    episodes=2,
    hidden=(16, 16),
    sigma=0.2,
    output_gain=1.0,
    score_every=2,
    score_episodes=3,
    checkpoint_every=1,
)


def trained(config: TrainConfig, run_dir: Path | None = None) -> tuple[dict[str, Tensor], Trainer]:
    trainer = Trainer(config, run_dir)
    trainer.create()
    try:
        trainer.train()
    finally:
        trainer.close()
    return trainer._tensors(), trainer


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def on_ray(config: TrainConfig, workers: int) -> TrainConfig:
    return dataclasses.replace(config, backend="ray", workers=workers, threads=1)


CONFIGS = {
    "mlp": HOPPER,
    "recurrent": dataclasses.replace(HOPPER, env_id="CartPole-v1", policy="recurrent", hidden=(8,), episodes=1),
    "low rank, gymnasium": dataclasses.replace(
        HOPPER, env_id="MountainCar-v0", env_kwargs='{"max_episode_steps": 9}', perturbation="low_rank"
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_shares_join_to_what_one_process_plays_to_the_bit(name: str) -> None:
    """Without Ray: the workers are objects of this process."""
    config = dataclasses.replace(CONFIGS[name], generations=1)
    trainer = Trainer(config)
    alone: list[Rollout] = []
    play = trainer.player.play

    def spy(population: Population, *arguments: Any, **options: Any) -> Rollout:
        alone.append(play(population, *arguments, **options))
        population_seen.append((population, options))
        return alone[-1]

    population_seen: list[tuple[Population, dict[str, Any]]] = []
    trainer.player.play = spy  # pyright: ignore[reportAttributeAccessIssue]
    trainer.generation()
    population, options = population_seen[0]
    generation = Generation(population.generation, population.sigma, config.episodes, None, True, True)
    weights = sharded._weights(population, Agent(config, *_spaces(trainer)).norm)
    parts = []
    for first, seeds in zip((0, 32, 64), options["seeds"].split(32), strict=True):
        worker = ShardWorker(config, 32, 1)
        outcome = worker.play(generation, Share(first, seeds.numpy(), seeds.numel()), weights)
        parts.append(sharded._rollout(outcome))
    joined = Rollout.join(parts)
    assert torch.equal(joined.episode_returns, alone[0].episode_returns)
    assert torch.equal(joined.lengths, alone[0].lengths)
    assert torch.equal(joined.fitness, alone[0].fitness)
    assert torch.equal(joined.moments.total, alone[0].moments.total)
    assert torch.equal(joined.moments.squares, alone[0].moments.squares)
    assert joined.moments.count == alone[0].moments.count == joined.env_steps


def _spaces(trainer: Trainer) -> tuple[Any, Any, Any]:
    player = trainer.player
    return player.observation_space, player.action_space, player.observation_shape


@pytest.mark.usefixtures("connection")
def test_a_run_with_workers_that_are_killed_is_the_run_of_one_process_to_the_bit(tmp_path: Path) -> None:
    expected, alone = trained(HOPPER, tmp_path / "alone")
    trainer = Trainer(on_ray(HOPPER, 2), tmp_path / "ray")
    trainer.create()
    player = trainer.player
    assert isinstance(player, ShardedPlayer)
    ray = player._connection.ray
    pids = ray.get([member.actor.__ray_call__.remote(lambda self: os.getpid()) for member in player.pool._members])
    work = player.pool.work

    def work_and_kill(chunks: Any, give: Any, should_stop: Any = None) -> list[Any]:
        def give_and_kill(actor: Any, chunk: Any) -> Any:
            reference = give(actor, chunk)
            if pids and chunk.first == 32:
                os.kill(pids.pop(), signal.SIGKILL)
            return reference

        return work(chunks, give_and_kill, should_stop)

    player.pool.work = work_and_kill  # pyright: ignore[reportAttributeAccessIssue]
    trainer.train()
    trainer.close()
    assert player.pool.replaced == 2
    assert_same(trainer._tensors(), expected)
    assert trainer.progress.env_steps == alone.progress.env_steps
    assert trainer.progress.score == alone.progress.score
    for step in (1, 2):
        names = [tmp_path / run / "checkpoints" / f"generation_00000{step}.safetensors" for run in ("alone", "ray")]
        assert names[0].read_bytes() == names[1].read_bytes()


@pytest.mark.usefixtures("connection")
def test_a_run_goes_on_elsewhere_to_the_bit(tmp_path: Path) -> None:
    config = dataclasses.replace(HOPPER, generations=4, episodes=1)
    expected, _ = trained(config)
    begun = Trainer(on_ray(config, 1), tmp_path / "run")
    begun.create()
    begun.generation()
    begun._progress = dataclasses.replace(begun.progress, generation=1)
    begun.save()
    begun.close()
    here = Trainer.resume(tmp_path / "run", changes={"backend": "local"})
    here.generation()
    here._progress = dataclasses.replace(here.progress, generation=2)
    here.save()
    here.close()
    there = Trainer.resume(tmp_path / "run", changes={"workers": 2})
    assert there.config.backend == "ray"
    there.train()
    there.close()
    assert_same(there._tensors(), expected)


@pytest.mark.usefixtures("connection")
def test_no_worker_left_keeps_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(dataclasses.replace(on_ray(HOPPER, 1), checkpoint_every=100), tmp_path)
    trainer.create()
    player = trainer.player
    assert isinstance(player, ShardedPlayer)
    trainer.generation()
    trainer._progress = dataclasses.replace(trainer.progress, generation=1)

    def lost(*arguments: Any) -> None:
        raise WorkersLostError("no worker is left")

    monkeypatch.setattr(player.pool, "work", lost)
    with pytest.raises(WorkersLostError):
        trainer.train()
    trainer.close()
    assert load_checkpoint(tmp_path / "checkpoints")[1].generation == 1


@pytest.mark.usefixtures("connection")
def test_errors_of_an_environment_come_through() -> None:
    config = dataclasses.replace(on_ray(HOPPER, 1), env_id="MountainCar-v0", population_size=2)
    player = ShardedPlayer(config)
    try:
        actor = player.pool._members[0].actor

        def spoil(worker: Any) -> None:
            def fail(*arguments: Any) -> None:
                raise EnvironmentFailureError("MountainCar-v0: broken")

            worker._player.envs[0].step = fail

        player._connection.ray.get(actor.__ray_call__.remote(spoil))
        trainer = Trainer(dataclasses.replace(config, backend="local"))
        trainer.player = player
        with pytest.raises(EnvironmentFailureError, match="MountainCar-v0: broken"):
            trainer.generation()
    finally:
        player.close()


def test_other_versions_are_refused() -> None:
    here = {"torch": "2.13.0", "mujoco": "4.0.0", "ray": "1"}
    sharded.compare_versions(here, {"torch": "2.13.0", "mujoco": "4.0.0"})
    with pytest.raises(UserError, match=r"mujoco 3\.9 in place of 4\.0\.0; install the same"):
        sharded.compare_versions(here, {"torch": "2.13.0", "mujoco": "3.9", "ray": "1"})


@pytest.mark.parametrize("population", [2, 30, 64, 128, 510, 4096])
@pytest.mark.parametrize("workers", [1, 2, 3, 16])
def test_shares_are_whole_blocks(population: int, workers: int) -> None:
    share = _share_size(population, workers)
    assert share % MOMENT_BLOCK == 0
    shares = -(-population // share)
    assert shares >= min(workers, population // 32)  # nobody is idle, as long as there is enough to do
    assert share * (shares - 1) < population


def connection_with(*nodes: int, gpus: int = 0) -> Connection:
    made = Connection.__new__(Connection)
    made.nodes, made.gpus = list(nodes), gpus
    return made


def test_every_gpu_has_a_worker() -> None:
    config = dataclasses.replace(HOPPER, device="cuda")
    assert _arrangement(config, connection_with(16, 16, gpus=4)) == (4, 8)
    assert _arrangement(dataclasses.replace(config, workers=2), connection_with(16, gpus=4)) == (2, 8)
    for workers, gpus in ((None, 0), (3, 2)):
        with pytest.raises(UserError, match=rf"a GPU of its own, and the cluster has {gpus}: use --device cpu"):
            _arrangement(dataclasses.replace(config, workers=workers), connection_with(8, gpus=gpus))


def test_workers_and_threads() -> None:
    def found(population: int, *nodes: int, **options: Any) -> tuple[int, int]:
        config = dataclasses.replace(HOPPER, population_size=population, **options)
        return _arrangement(config, connection_with(*nodes))

    assert found(512, 2) == (2, 1)
    assert found(512, 64, 64) == (16, 8)
    assert found(16, 8) == (1, 8)
    assert found(16, 8, 4) == (1, 4)
    assert found(4096, 16, workers=5) == (5, 1)
    assert found(4096, 16, threads=4) == (4, 4)
    assert sharded._warnings(2, connection_with(2)) == []
    assert "5 worker threads share 4 cores" in sharded._warnings(5, connection_with(2, 2))[0]


@pytest.mark.parametrize("module", [MLP(17, 6), Linear(11, 3), Recurrent(5, 2, (16,))], ids=["mlp", "linear", "gru"])
@pytest.mark.parametrize("family", [Flipout(), LowRank()], ids=["flipout", "low_rank"])
def test_row_blocks_of_the_same_bits(module: torch.nn.Module, family: Any) -> None:
    size = {"MLP": 17, "Linear": 11, "Recurrent": 5}[type(module).__name__]
    for rows in (1, 30, 100, 512, 600):
        block = row_block_like(module, family, size, rows, 512)
        assert 16 <= block <= 512
        assert block >= min(rows, 512)


def test_a_row_block_with_other_bits_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    from es_flipout.population import Selection

    forward = Selection.__call__

    def rounds_otherwise(self: Selection, *inputs: Tensor) -> Tensor:
        return forward(self, *inputs) + (1e-7 if self._row_block < 128 else 0)

    monkeypatch.setattr(Selection, "__call__", rounds_otherwise)
    assert row_block_like(MLP(17, 6), Flipout(), 17, 30, 512) == 128
