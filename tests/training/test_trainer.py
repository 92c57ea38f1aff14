"""The training loop: what it counts, what must not affect it, and which failures it survives."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_envs import ToyEnv, lanes_of
from training_runs import CARTPOLE, HOPPER, TIMES, assert_same, rows, train, weights

from es_flipout.config import TrainConfig
from es_flipout.errors import UserError
from es_flipout.policies.observation_norm import ObservationNorm
from es_flipout.rollout.episodes import Rollout
from es_flipout.training.checkpoint import Progress, checkpoints, load_checkpoint, load_tensors
from es_flipout.training.run_directory import Which, load_agent
from es_flipout.training.setup import make_trainer
from es_flipout.training.trainer import Trainer

MakeToys = Callable[..., list[ToyEnv]]


class Pays(ToyEnv):
    """The reward of each step is 1."""

    def _move(self, seed: int, t: int, state: Tensor, action: Tensor) -> tuple[Tensor, float]:
        return super()._move(seed, t, state, action)[0], 1.0


class PaysForAction(ToyEnv):
    """The reward of each step is its action."""

    def _move(self, seed: int, t: int, state: Tensor, action: Tensor) -> tuple[Tensor, float]:
        return super()._move(seed, t, state, action)[0], float(action.sum())


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> MakeToys:
    """Make the trainer create toy environments: episodes are played in the last one."""

    def install(
        length: Callable[[int], int] = lambda seed: seed % 5 + 2, kind: type[ToyEnv] = ToyEnv, **settings: Any
    ) -> list[ToyEnv]:
        made: list[ToyEnv] = []

        def make_env(env_id: str, num_envs: int, **kwargs: Any) -> ToyEnv:
            made.append(kind(num_envs, length, **settings))
            return made[-1]

        monkeypatch.setattr("es_flipout.rollout.builder.make_env", make_env)
        return made

    return install


def toy_config(**settings: Any) -> TrainConfig:
    defaults: dict[str, Any] = {"generations": 3, "population_size": 6, "hidden": (4,), "score_episodes": 3}
    return TrainConfig.of("Toy-v0", **(defaults | settings))


# What is counted and written.


def test_env_steps_are_exactly_the_live_ones(tmp_path: Path, toys: MakeToys, monkeypatch: pytest.MonkeyPatch) -> None:
    made = toys()
    monkeypatch.setattr(Trainer, "score", lambda self: 0.5)
    trainer = train(toy_config(episodes=3, slots=5), tmp_path)
    played = len(made[-1].trace)
    assert played == sum(int(mask.sum()) for mask in made[-1].masks)
    assert played < sum(len(mask) for mask in made[-1].masks), "no slot was ever dead, so nothing is tested"
    assert trainer.progress.env_steps == played
    assert int(rows(tmp_path)[-1]["env_steps"]) == played


def test_steps_of_scoring_are_not_counted(tmp_path: Path, toys: MakeToys) -> None:
    made = toys()
    trainer = train(toy_config(score_every=1), tmp_path)
    scored = {int(seed) for seed in trainer._score_episodes.seeds.flatten()}
    assert trainer.progress.env_steps == sum(step.seed not in scored for step in made[-1].trace)
    assert sum(step.seed in scored for step in made[-1].trace) == 3 * sum(seed % 5 + 2 for seed in scored)


def test_observation_statistics_are_those_of_the_live_steps_of_training(
    toys: MakeToys, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = toys(obs_dim=3)
    monkeypatch.setattr(Trainer, "score", lambda self: 0.5)
    trainer = train(toy_config(slots=4))
    seen = torch.stack([step.obs for step in made[-1].trace])
    norm = trainer.agent.norm
    assert isinstance(norm, ObservationNorm)
    assert float(norm.count) == len(seen) == trainer.progress.env_steps
    torch.testing.assert_close(norm.mean, seen.mean(0))
    torch.testing.assert_close(norm.deviations / norm.count, seen.var(0, correction=0))


def test_rows_say_what_was_played(tmp_path: Path, toys: MakeToys, monkeypatch: pytest.MonkeyPatch) -> None:
    toys()
    rollouts = []
    generation = Trainer.generation
    monkeypatch.setattr(Trainer, "generation", lambda self: rollouts.append(generation(self)) or rollouts[-1])
    train(toy_config(), tmp_path)
    written = rows(tmp_path)
    assert [row["generation"] for row in written] == ["1", "2", "3"]
    steps = 0
    for row, rollout in zip(written, rollouts, strict=True):
        steps += rollout.env_steps
        assert int(row["env_steps"]) == steps
        assert float(row["mean_return"]) == float(rollout.returns.mean())
        assert float(row["best_return"]) == float(rollout.returns.max())
        assert float(row["mean_length"]) == pytest.approx(float(rollout.lengths.double().mean()))
    assert [row["score"] != "" for row in written] == [False, False, True], "the last generation is always scored"


def test_the_speed_is_steps_by_seconds(tmp_path: Path) -> None:
    train(CARTPOLE.replace(score_every=100), tmp_path)
    written = rows(tmp_path, without=())
    seconds = [float(row["wall_s"]) for row in written]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0
    steps = [int(row["env_steps"]) for row in written]
    for before, after, row in zip([0, *seconds], seconds, written, strict=False):
        index = written.index(row)
        played = steps[index] - (steps[index - 1] if index else 0)
        assert float(row["env_steps_per_s"]) >= 0.99 * played / (after - before)


def test_the_run_ends_with_the_generation_that_reaches_env_steps(toys: MakeToys) -> None:
    toys(length=lambda seed: 4)
    exactly = train(toy_config(generations=None, env_steps=48))
    assert (exactly.progress.generation, exactly.progress.env_steps) == (2, 48)
    assert exactly.finished
    more = train(toy_config(generations=None, env_steps=49))
    assert (more.progress.generation, more.progress.env_steps) == (3, 72)
    assert train(toy_config(generations=1, env_steps=49)).progress.generation == 1


def test_schedules_reach_the_strategy(tmp_path: Path, toys: MakeToys) -> None:
    toys()
    config = toy_config(generations=4, sigma=0.5, sigma_final=0.1, learning_rate=0.4, learning_rate_final=0.0)
    train(config, tmp_path)
    written = rows(tmp_path)
    assert [float(row["sigma"]) for row in written] == [config.strategy.sigma_at(k / 4) for k in range(4)]
    assert [float(row["learning_rate"]) for row in written] == [
        config.strategy.learning_rate_at(k / 4) for k in range(4)
    ]


def test_a_run_directory_holds_what_it_must(tmp_path: Path) -> None:
    run_dir = tmp_path / "new" / "run"
    trainer = train(CARTPOLE.replace(checkpoint_every=3, keep_checkpoints=2), run_dir)
    assert {path.name for path in run_dir.iterdir()} == {
        "config.json",
        "environment.json",
        "metrics.csv",
        "tensorboard",
        "checkpoints",
        "policy.safetensors",
        "best.safetensors",
    }
    assert TrainConfig.from_json((run_dir / "config.json").read_text(encoding="utf-8")) == trainer.config
    assert [path.stem for path in checkpoints(run_dir / "checkpoints")] == ["generation_000003", "generation_000004"]
    saved, progress = load_checkpoint(run_dir / "checkpoints")
    assert_same(saved, trainer.tensors())
    assert progress == trainer.progress
    names: dict[Which, str] = {"last": "policy", "best": "best"}
    for which, name in names.items():
        agent, config = load_agent(run_dir, which)
        assert config == trainer.config
        assert_same(agent.state_dict(), trainer.trained_agent(which).state_dict())
        assert_same(load_tensors(run_dir / f"{name}.safetensors"), agent.state_dict())


@pytest.mark.parametrize("scores", [[3.0, 9.0, 5.0, 7.0], [3.0, 5.0, 9.0, 9.0], [math.nan, 2.0, math.nan, 1.0]])
def test_the_best_policy_is_kept_the_newest_of_equals(
    tmp_path: Path, scores: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    left, seen = list(scores), []
    monkeypatch.setattr(Trainer, "score", lambda self: left.pop(0))
    trainer = make_trainer(CARTPOLE.replace(score_every=1, generations=4), tmp_path / "run")
    trainer.create()
    assert load_agent(tmp_path / "run")[0].state_dict().keys(), "before the first score the last one is the best"
    generation = trainer.generation

    def remembered() -> Rollout:
        seen.append(trainer.trained_agent("last").state_dict())
        return generation()

    trainer.generation = remembered
    trainer.train()
    seen.append(trainer.trained_agent("last").state_dict())
    best = max((score, number) for number, score in enumerate(scores, 1) if not math.isnan(score))
    assert (trainer.progress.best_score, trainer.progress.best_generation) == best
    assert_same(load_agent(tmp_path / "run", "best")[0].state_dict(), seen[best[1]])
    assert_same(load_agent(tmp_path / "run", "last")[0].state_dict(), seen[-1])


def test_a_checkpoint_is_there_from_the_start(tmp_path: Path) -> None:
    trainer = make_trainer(CARTPOLE, tmp_path)
    trainer.create()
    saved, progress = load_checkpoint(tmp_path / "checkpoints")
    assert progress == Progress(generation=0, env_steps=0, wall_s=0.0, score=None)
    assert_same(saved, trainer.tensors())


def test_the_player_is_closed_before_the_final_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its workers may die while the policies are scored, which needs none of them."""
    trainer, happened = make_trainer(CARTPOLE.replace(generations=1)), []
    monkeypatch.setattr(trainer.player, "close", lambda: happened.append("closed"))

    def score() -> dict[str, float]:
        happened.append("scored")
        return {}

    trainer.train(score)
    assert happened == ["closed", "scored"]


@pytest.mark.parametrize("taken", ["file in it", "file"])
def test_a_run_directory_that_exists_is_left_alone(tmp_path: Path, taken: str) -> None:
    run_dir = tmp_path / "run"
    if taken == "file":
        run_dir.write_text("precious", encoding="utf-8")
    else:
        run_dir.mkdir()
        (run_dir / "thesis.txt").write_text("precious", encoding="utf-8")
    with pytest.raises(UserError, match=rf"{run_dir} exists"):
        make_trainer(CARTPOLE, run_dir).create()
    kept = run_dir if taken == "file" else run_dir / "thesis.txt"
    assert kept.read_text(encoding="utf-8") == "precious"
    assert [path.name for path in tmp_path.rglob("*")] == (["run"] if taken == "file" else ["run", "thesis.txt"])


# What must not affect a run.


def test_the_same_seed_is_the_same_run_and_another_is_not(tmp_path: Path) -> None:
    first, again = train(CARTPOLE, tmp_path / "first"), train(CARTPOLE, tmp_path / "again")
    assert_same(first.tensors(), again.tensors())
    assert rows(tmp_path / "first") == rows(tmp_path / "again")
    other = train(CARTPOLE.replace(seed=1), tmp_path / "other")
    assert not torch.equal(weights(first), weights(other))


@pytest.mark.parametrize("config", [CARTPOLE, HOPPER], ids=lambda config: config.task.env_id)
def test_scoring_does_not_change_training(config: TrainConfig) -> None:
    often = train(config.replace(score_every=1, score_episodes=7))
    seldom = train(config.replace(score_every=1000, score_episodes=1))
    assert_same(often.tensors(), seldom.tensors())
    assert often.progress.env_steps == seldom.progress.env_steps


@pytest.mark.parametrize("config", [CARTPOLE, HOPPER], ids=lambda config: config.task.env_id)
def test_slots_do_not_change_a_run(tmp_path: Path, config: TrainConfig) -> None:
    config = config.replace(generations=3, row_block=16)
    runs = {slots: train(config.replace(slots=slots), tmp_path / str(slots)) for slots in (6, 8, 32)}
    assert sum(env.num_envs for env in lanes_of(runs[6])) == 6
    for slots in (6, 8):
        assert_same(runs[slots].tensors(), runs[32].tensors())
        assert rows(tmp_path / str(slots), (*TIMES, "score")) == rows(tmp_path / "32", (*TIMES, "score"))


@pytest.mark.parametrize("config", [CARTPOLE, HOPPER], ids=lambda config: config.task.env_id)
def test_slots_do_not_change_the_score(config: TrainConfig) -> None:
    scores = {}
    for slots in (1, 6, 32):
        trainer = make_trainer(config.replace(slots=slots, row_block=16, score_episodes=16))
        scores[slots] = trainer.score()
    assert len(set(scores.values())) == 1, scores


def test_threads_and_overlap_do_not_change_a_run(tmp_path: Path) -> None:
    config = HOPPER.replace(row_block=16, overlap=True)
    plain = train(config.replace(overlap=False), tmp_path / "plain")
    overlapped = train(config, tmp_path / "overlapped")
    threads = train(config.replace(threads=2), tmp_path / "threads")
    assert [len(lanes_of(trainer)) for trainer in (plain, overlapped, threads)] == [1, 2, 2]
    for trainer, name in ((overlapped, "overlapped"), (threads, "threads")):
        assert_same(trainer.tensors(), plain.tensors())
        assert rows(tmp_path / name) == rows(tmp_path / "plain")


# What must and must not move the mean.


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "clipup"])
def test_equal_returns_leave_the_parameters_alone(toys: MakeToys, optimizer: Any) -> None:
    toys(kind=Pays, length=lambda seed: 3)
    config = toy_config(optimizer=optimizer, observation_norm=False)
    start = weights(make_trainer(config))
    assert torch.equal(weights(train(config)), start)
    toys(kind=PaysForAction, length=lambda seed: 3)
    assert not torch.equal(weights(train(config)), start)


def test_higher_returns_attract(toys: MakeToys) -> None:
    toys(kind=PaysForAction, length=lambda seed: 3)
    config = toy_config(generations=20, population_size=16, sigma=0.1, learning_rate=0.1, observation_norm=False)
    start = make_trainer(config).score()
    assert train(config).score() > start + 1


def test_the_alive_bonus_is_not_trained_on(tmp_path: Path, toys: MakeToys) -> None:
    toys(kind=Pays, alive_bonus=1.0)
    config = toy_config(antithetic=False)
    start = weights(make_trainer(config))
    removed = train(config, tmp_path / "removed")
    kept = train(config.replace(remove_alive_bonus=False), tmp_path / "kept")
    assert torch.equal(weights(removed), start), "without the bonus all returns are 0"
    assert not torch.equal(weights(kept), start)
    assert float(rows(tmp_path / "removed")[0]["mean_return"]) >= 2, "reported returns keep the bonus"
    assert rows(tmp_path / "removed")[0] == rows(tmp_path / "kept")[0]


def test_partners_share_start_states(toys: MakeToys) -> None:
    made = toys(length=lambda seed: 2)
    trainer = make_trainer(toy_config(episodes=2, start_states="pair"))
    generations = []
    for _ in range(2):
        made[-1].reset_seeds.clear()
        trainer.generation()
        generations.append(torch.tensor(made[-1].reset_seeds).view(6, 2))
    for seeds in generations:
        pair_of = trainer.strategy.ask().members.source_of(torch.arange(6))
        for pair in pair_of.unique():
            first, second = seeds[pair_of == pair]
            assert torch.equal(first, second)
        assert len(seeds.unique()) == 6, "three pairs of two episodes each"
    assert not set(generations[0].flatten().tolist()) & set(generations[1].flatten().tolist())


def test_a_generation_can_share_start_states(toys: MakeToys) -> None:
    made = toys(length=lambda seed: 2)
    trainer = make_trainer(toy_config(episodes=2, start_states="generation"))
    trainer.generation()
    seeds = torch.tensor(made[-1].reset_seeds).view(6, 2)
    assert torch.equal(seeds, seeds[:1].expand(6, 2))
    assert seeds[0, 0] != seeds[0, 1]
    made[-1].reset_seeds.clear()
    trainer.generation()
    assert made[-1].reset_seeds[0] not in seeds


def test_start_states_of_scoring_stay(toys: MakeToys) -> None:
    made = toys(length=lambda seed: 2)
    trainer = make_trainer(toy_config())
    trainer.score()
    first = made[-1].reset_seeds.copy()
    assert len(set(first)) == 3
    trainer.generation()
    made[-1].reset_seeds.clear()
    trainer.score()
    assert made[-1].reset_seeds == first


def test_the_episode_cap_grows_and_never_touches_the_score(tmp_path: Path) -> None:
    # A car that always pushes in the same direction never leaves the valley, so episodes have the maximum length.
    config = TrainConfig.of(
        "MountainCar-v0",
        generations=6,
        population_size=2,
        sigma=1e-9,
        learning_rate=1e-9,
        hidden=(2,),
        observation_norm=False,
        episode_cap=10,
        episode_cap_until=0.6,
        score_every=1,
        score_episodes=1,
    )
    train(config, tmp_path)
    expected = [config.task.episode_cap_at(k / 6, 200) or 200 for k in range(6)]
    assert expected == [10, 63, 116, 168, 200, 200]
    written = rows(tmp_path)
    assert [float(row["mean_length"]) for row in written] == expected
    assert [float(row["mean_return"]) for row in written] == [-length for length in expected]
    assert [int(row["env_steps"]) for row in written] == [2 * sum(expected[: k + 1]) for k in range(6)]
    assert {float(row["score"]) for row in written} == {-200.0}


# What is drawn ahead.


def test_seeds_of_the_next_generation_are_drawn_only_where_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from es_flipout.training import trainer as module

    drawn: list[int] = []

    def start_seeds(*args: Any, ahead: int = 0, **kwargs: Any) -> Tensor:
        drawn.append(ahead)
        return module_start_seeds(*args, ahead=ahead, **kwargs)

    module_start_seeds = module.start_seeds
    monkeypatch.setattr(module, "start_seeds", start_seeds)
    trainer = make_trainer(CARTPOLE)
    trainer.generation()
    assert drawn == [0]
    asked: list[Tensor] = []
    monkeypatch.setattr(trainer.player, "draw_ahead", lambda seeds: asked.append(seeds()))
    trainer.generation()
    assert drawn == [0, 0, 1]
    trainer.generation()
    assert drawn == [0, 0, 1, 0, 1]
    assert asked[0].shape == (32, 1)
    trainer.close()
