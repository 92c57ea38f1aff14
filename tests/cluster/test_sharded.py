"""The sharded engine: bitwise identical to one process, for any assignment of shards and also if workers die."""

import dataclasses
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_runs import assert_same

from es_flipout.cluster import sharded
from es_flipout.cluster.connect import Connection
from es_flipout.cluster.crew import Crew
from es_flipout.cluster.pool import WorkersLostError
from es_flipout.cluster.sharded import ShardedPlayer, build_sharded, shard_size, workers_per_actor
from es_flipout.cluster.worker import Block, Generation, Shard, ShardWorker, packed, settings_like, unpacked
from es_flipout.config import TrainConfig
from es_flipout.envs.base import EnvironmentFailureError
from es_flipout.errors import UserError
from es_flipout.perturbations import Flipout, LowRank
from es_flipout.policies.networks import MLP, Linear, Recurrent
from es_flipout.rollout.builder import build, local_player
from es_flipout.rollout.episodes import MOMENT_BLOCK, MOMENT_JOBS, Episodes, Rollout, start_seeds
from es_flipout.rollout.placement import place
from es_flipout.strategy.population import ForwardSettings, Population
from es_flipout.strategy.selection import Selection
from es_flipout.training.checkpoint import load_checkpoint
from es_flipout.training.setup import make_trainer, resume_trainer
from es_flipout.training.trainer import Trainer

HOPPER = TrainConfig.of(
    "Hopper-v5",
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
    trainer = make_trainer(config, run_dir)
    trainer.create()
    try:
        trainer.train()
    finally:
        trainer.close()
    return trainer.tensors(), trainer


def on_ray(config: TrainConfig, workers: int) -> TrainConfig:
    return config.replace(backend="ray", workers=workers, threads=1)


CONFIGS = {
    "mlp": HOPPER,
    "recurrent": HOPPER.replace(env_id="CartPole-v1", policy="recurrent", hidden=(8,), episodes=1),
    "low rank, gymnasium": HOPPER.replace(
        env_id="MountainCar-v0", env_kwargs='{"max_episode_steps": 9}', perturbation="low_rank"
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_shards_join_to_what_one_process_plays_to_the_bit(name: str) -> None:
    """Without Ray: the workers are objects in this process."""
    config = place(CONFIGS[name].replace(generations=1))
    agent, strategy, player = build(config)
    population = strategy.ask()
    seeds = start_seeds(population, config.task.episodes)
    alone = player.play(population, Episodes(seeds, remove_alive_bonus=True, moment_jobs=MOMENT_JOBS))
    generation = Generation(population.generation, population.sigma, None, True)
    weights = sharded._weights(population, agent)
    parts = []
    for first, part in zip((0, 32, 64), seeds.split(32), strict=True):
        worker = ShardWorker(config, 32, 1)
        outcome = worker.play(generation, Shard(first, part.numpy(), part.numel()), weights)
        parts.append(sharded.rollout_of(outcome))
    joined = Rollout.join(parts)
    assert torch.equal(joined.episode_returns, alone.episode_returns)
    assert torch.equal(joined.lengths, alone.lengths)
    assert torch.equal(joined.fitness, alone.fitness)
    assert torch.equal(joined.moments.total, alone.moments.total)
    assert torch.equal(joined.moments.squares, alone.moments.squares)
    assert joined.moments.count == alone.moments.count == joined.env_steps


def test_a_crew_of_processes_is_one_worker_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    config = place(HOPPER)
    agent, strategy, _ = build(config)
    population = strategy.ask()
    seeds = start_seeds(population, config.task.episodes).numpy()
    generation, weights = Generation(0, population.sigma, None, True), sharded._weights(population, agent)
    message = packed((generation, Shard(0, seeds, 100)))
    block = packed((generation, Block(0, torch.randn(72).numpy())))
    alone, crew = ShardWorker(config, 72, 1), Crew(config, 32, 1, 2)
    try:
        assert crew.ready() == alone.ready()
        found, expected = unpacked(crew.play_packed(message, weights)), unpacked(alone.play_packed(message, weights))
        for field in dataclasses.fields(expected):
            torch.testing.assert_close(getattr(found, field.name), getattr(expected, field.name), rtol=0, atol=0)
        assert crew.sum_packed(block) == alone.sum_packed(block)
        monkeypatch.setattr(os, "_exit", sys.exit)
        os.kill(next(iter(crew._processes._processes)), signal.SIGKILL)
        with pytest.raises(SystemExit):
            crew.play_packed(message, weights)
    finally:
        crew._processes.shutdown()


@pytest.mark.usefixtures("connection")
@pytest.mark.parametrize("in_crews", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_with_workers_that_are_killed_is_the_run_of_one_process_to_the_bit(
    in_crews: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is killed while it plays, the other while it sums its part of the update."""
    if in_crews:
        monkeypatch.setattr(sharded, "_MOST_ACTORS", 1)
    monkeypatch.setattr("es_flipout.perturbations.base.SOURCES_PER_BLOCK", 16)
    expected, alone = trained(HOPPER, tmp_path / "alone")
    monkeypatch.delattr(Population, "_draw")  # the training process draws nothing
    trainer = make_trainer(on_ray(HOPPER, 2), tmp_path / "ray")
    trainer.create()
    player = trainer.player
    assert isinstance(player, ShardedPlayer)
    ray = player.connection.ray
    pids = ray.get([worker.actor.__ray_call__.remote(lambda self: os.getpid()) for worker in player.pool._workers])
    if in_crews:
        (worker,) = player.pool._workers
        pids = ray.get(worker.actor.__ray_call__.remote(lambda crew: [*crew._processes._processes, os.getpid()]))[-2:]
    work, during = player.pool.work, [Shard, Block]

    def work_and_kill(chunks: Any, give: Any, should_stop: Any = None) -> list[Any]:
        def give_and_kill(actor: Any, chunk: Any) -> Any:
            reference = give(actor, chunk)
            if during and (type(chunk), chunk.first) == (during[0], 0 if in_crews else 32):
                del during[0]
                own = pids.pop()
                if in_crews and not during:  # the actor of that process is gone, too: another one of the new crew's
                    own = ray.get(actor.__ray_call__.remote(lambda crew: next(iter(crew._processes._processes))))
                os.kill(own, signal.SIGKILL)
            return reference

        return work(chunks, give_and_kill, should_stop)

    player.pool.work = work_and_kill  # pyright: ignore[reportAttributeAccessIssue]
    trainer.train()
    trainer.close()
    assert player.pool.replaced == 2
    assert not during
    assert_same(trainer.tensors(), expected)
    assert trainer.progress.env_steps == alone.progress.env_steps
    assert trainer.progress.score == alone.progress.score
    for step in (1, 2):
        names = [tmp_path / run / "checkpoints" / f"generation_00000{step}.safetensors" for run in ("alone", "ray")]
        assert names[0].read_bytes() == names[1].read_bytes()


@pytest.mark.usefixtures("connection")
def test_a_run_goes_on_elsewhere_to_the_bit(tmp_path: Path) -> None:
    config = HOPPER.replace(generations=4, episodes=1)
    expected, _ = trained(config)
    begun = make_trainer(on_ray(config, 1), tmp_path / "run")
    begun.create()
    begun.generation()
    begun.progress = dataclasses.replace(begun.progress, generation=1)
    begun.save()
    begun.close()
    here = resume_trainer(tmp_path / "run", changes={"backend": "local"})
    here.generation()
    here.progress = dataclasses.replace(here.progress, generation=2)
    here.save()
    here.close()
    there = resume_trainer(tmp_path / "run", changes={"workers": 2})
    assert there.config.compute.backend == "ray"
    there.train()
    there.close()
    assert_same(there.tensors(), expected)


@pytest.mark.usefixtures("connection")
def test_no_worker_left_keeps_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(on_ray(HOPPER, 1).replace(checkpoint_every=100), tmp_path)
    trainer.create()
    player = trainer.player
    assert isinstance(player, ShardedPlayer)
    trainer.generation()
    trainer.progress = dataclasses.replace(trainer.progress, generation=1)

    def lost(*arguments: Any) -> None:
        raise WorkersLostError("no worker is left")

    monkeypatch.setattr(player.pool, "work", lost)
    with pytest.raises(WorkersLostError):
        trainer.train()
    trainer.close()
    assert load_checkpoint(tmp_path / "checkpoints")[1].generation == 1


@pytest.mark.usefixtures("connection")
def test_errors_of_an_environment_come_through() -> None:
    config = place(on_ray(HOPPER, 1).replace(env_id="MountainCar-v0", population_size=2))
    player = build_sharded(config).player
    assert isinstance(player, ShardedPlayer)
    try:
        actor = player.pool._workers[0].actor

        def spoil(worker: Any) -> None:
            def fail(*arguments: Any) -> None:
                raise EnvironmentFailureError("MountainCar-v0: broken")

            worker._player.envs[0].step = fail

        player.connection.ray.get(actor.__ray_call__.remote(spoil))
        trainer = make_trainer(config, build=lambda config, say: build(config)._replace(player=player))
        with pytest.raises(EnvironmentFailureError, match="MountainCar-v0: broken"):
            trainer.generation()
    finally:
        player.close()


def on_a_card_of(free: int) -> type[ShardWorker]:
    """A worker that plays as on a GPU with ``free`` bytes, but on the CPU; defined here, as workers cannot import it."""

    class Worker(ShardWorker):
        def __init__(self, config: TrainConfig, size: int, threads: int) -> None:
            from es_flipout.cluster import worker
            from es_flipout.rollout import builder, plan

            def build(config: TrainConfig) -> builder.Parts:
                agent, player = builder.device_player(config, torch.device("cpu"))
                return builder.Parts(agent, builder.make_strategy(config, agent.module, "cpu"), player)

            worker.build = build  # pyright: ignore[reportAttributeAccessIssue, reportPrivateImportUsage]
            plan.free_bytes = lambda device: free
            super().__init__(config, size, threads)

        def seen(self) -> tuple[str, int, list[int], int]:
            """Return card, slots, members of the layouts in memory, and the number of launches that were captured."""
            rollouts = list(self._player._rollouts.values())  # pyright: ignore[reportAttributeAccessIssue]
            sizes = [rollout._population.size for rollout in rollouts]
            card, slots = os.environ["CUDA_VISIBLE_DEVICES"], self._player.slots  # pyright: ignore[reportAttributeAccessIssue]
            return card, slots, sizes, id(rollouts[0])

    return Worker


@pytest.mark.usefixtures("connection")
def test_several_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray counts two GPUs that do not exist; the workers' code is that of a GPU, on the CPU."""
    monkeypatch.setattr(ShardedPlayer, "WORKER", on_a_card_of(110_000))
    config = HOPPER.replace(env_id="CartPole-v1", device="cuda", physics="gpu", kernels="torch", row_block=8)
    here = config.replace(device="cpu", physics="cpu", slots=20)
    _, strategy, alone = build(here)
    _, home = local_player(here, 1)
    player = ShardedPlayer(config, home)
    ray = player.connection.ray
    try:
        assert (player.workers, player.size) == (2, 48)
        seen = []
        for _ in range(3):
            population = strategy.ask()
            episodes = Episodes(start_seeds(population, 2), moment_jobs=MOMENT_JOBS)
            expected, found = alone.play(population, episodes), player.play(population, episodes)
            assert torch.equal(found.episode_returns, expected.episode_returns)
            assert torch.equal(found.moments.squares, expected.moments.squares)
            seen.append(ray.get([worker.actor.seen.remote() for worker in player.pool._workers]))
            strategy.tell(found.fitness)
        assert seen[0] == seen[1] == seen[2]  # one share each, always of the same size: nothing is captured again
        cards, slots, sizes, _ = zip(*seen[0], strict=True)
        assert sorted(cards) == ["0", "1"]
        assert sorted(sizes) == [[24], [48]]
        assert 1 < slots[0] == slots[1] < 48 * 2  # the memory is not enough for one per episode
    finally:
        player.close()


def test_other_versions_are_refused() -> None:
    here = {"torch": "2.13.0", "mujoco": "4.0.0", "ray": "1"}
    sharded.compare_versions(here, {"torch": "2.13.0", "mujoco": "4.0.0"})
    with pytest.raises(UserError, match=r"mujoco 3\.9 in place of 4\.0\.0; install the same versions"):
        sharded.compare_versions(here, {"torch": "2.13.0", "mujoco": "3.9", "ray": "1"})


@pytest.mark.parametrize("population", [2, 30, 64, 128, 510, 4096])
@pytest.mark.parametrize("workers", [1, 2, 3, 16])
def test_shards_are_whole_blocks(population: int, workers: int) -> None:
    size = shard_size(population, workers)
    assert size % MOMENT_BLOCK == 0
    shards = -(-population // size)
    assert shards >= min(workers, population // 32)  # no worker is idle as long as there is enough to do
    assert size * (shards - 1) < population
    whole = shard_size(population, workers, per_worker=1)
    assert whole % MOMENT_BLOCK == 0
    assert 0 <= whole - population / workers < MOMENT_BLOCK


@pytest.mark.parametrize(
    ("workers", "threads", "nodes", "expected"),
    [
        (16, 1, [16], 1),
        (32, 1, [16, 16], 16),
        (40, 1, [16, 8, 16], 8),
        (20, 1, [16, 16], 10),
        (32, 2, [32, 32], 16),
        (31, 1, [16, 15], 1),
        (100, 1, [2, 2], 1),
    ],
)
def test_many_workers_of_a_node_share_an_actor(workers: int, threads: int, nodes: list[int], expected: int) -> None:
    assert workers_per_actor(workers, threads, nodes) == expected


def connection_with(*nodes: int, gpus: int = 0) -> Connection:
    made = Connection.__new__(Connection)
    made.nodes, made.gpus = list(nodes), gpus
    return made


def test_every_gpu_has_a_worker() -> None:
    config = HOPPER.replace(device="cuda")
    assert sharded._workers_and_threads(config, connection_with(16, 16, gpus=4)) == (4, 8)
    assert sharded._workers_and_threads(config.replace(workers=2), connection_with(16, gpus=4)) == (2, 8)
    for workers, gpus in ((None, 0), (3, 2)):
        with pytest.raises(UserError, match=rf"one GPU per worker, and the cluster has {gpus}: use --device cpu"):
            sharded._workers_and_threads(config.replace(workers=workers), connection_with(8, gpus=gpus))


def test_workers_and_threads() -> None:
    def found(population: int, *nodes: int, **options: Any) -> tuple[int, int]:
        config = HOPPER.replace(population_size=population, **options)
        return sharded._workers_and_threads(config, connection_with(*nodes))

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
        block = settings_like(ForwardSettings(512), module, family, size, rows).row_block
        assert block is not None
        assert 16 <= block <= 512
        assert block >= min(rows, 512)


def test_a_row_block_with_other_bits_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Selection.__call__

    def rounds_otherwise(self: Selection, *inputs: Tensor) -> Tensor:
        return forward(self, *inputs) + (1e-7 if self._row_block < 128 else 0)

    monkeypatch.setattr(Selection, "__call__", rounds_otherwise)
    assert settings_like(ForwardSettings(512), MLP(17, 6), Flipout(), 17, 30).row_block == 128
