"""Several starts: each begins like the run, and the best one goes on."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from training_runs import assert_same

from es_flipout.config import TrainConfig
from es_flipout.errors import UserError
from es_flipout.rollout.episodes import Rollout
from es_flipout.training.setup import make_trainer, resume_trainer
from es_flipout.training.trainer import Trainer

CONFIG = TrainConfig.of(
    "Pendulum-v1",
    hidden=(4,),
    population_size=4,
    horizon=5,
    generations=20,
    starts=3,
    start_fraction=0.1,  # two generations each
    score_every=7,
    score_episodes=2,
    checkpoint_every=1,
    keep_checkpoints=20,
    device="cpu",
    threads=1,
)


def of_the_run(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if name.partition(".")[0] not in ("best", "starts")}


class Seen:
    """A trainer whose scores are given, and the tensors that it scored."""

    def __init__(self, trainer: Trainer, scores: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
        self.scored: list[tuple[int, dict[str, Tensor]]] = []
        self.continued: list[dict[str, Tensor]] = []

        def score() -> float:
            tensors = {name: value.clone() for name, value in of_the_run(trainer.tensors()).items()}
            self.scored.append((trainer.progress.generation, tensors))
            return scores[len(self.scored) - 1]

        monkeypatch.setattr(trainer, "score", score)
        generation = trainer.generation

        def watched() -> Rollout:
            before = of_the_run(trainer.tensors())
            self.continued.append({name: value.clone() for name, value in before.items()})
            return generation()

        monkeypatch.setattr(trainer, "generation", watched)


@pytest.mark.parametrize(("scores", "best"), [([1.0, 3.0, 2.0], 1), ([3.0, 1.0, 2.0], 0), ([math.nan, 1.0, 2.0], 2)])
def test_the_best_start_goes_on(scores: list[float], best: int, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(CONFIG)
    initial = {name: value.clone() for name, value in of_the_run(trainer.tensors()).items()}
    seen = Seen(trainer, [*scores, 0.0, 0.0, 0.0], monkeypatch)
    trainer.train()
    assert [generation for generation, _ in seen.scored] == [2, 4, 6, 7, 14, 20]
    for start in (0, 1, 2):
        assert_same(seen.continued[2 * start], initial)
    ends = [tensors for _, tensors in seen.scored[:3]]
    assert_same(seen.continued[6], ends[best])
    weights = [end["module.layers.0.weight"] for end in ends]
    assert not torch.equal(weights[0], weights[1]), "starts have other random numbers"


@pytest.mark.parametrize("generation", [1, 2, 3, 5, 6, 9])
def test_resume_is_bitwise_identical(generation: int, tmp_path: Path) -> None:
    whole, parts = make_trainer(CONFIG), make_trainer(CONFIG, tmp_path / "run")
    whole.train()
    parts.create()
    parts.train()
    for path in (tmp_path / "run" / "checkpoints").glob("generation_*"):
        if int(path.stem.removeprefix("generation_")) > generation:
            path.unlink()
    resumed = resume_trainer(tmp_path / "run")
    assert resumed.progress.generation == generation
    resumed.train()
    assert_same(resumed.tensors(), whole.tensors())


def test_starts_must_leave_a_rest() -> None:
    with pytest.raises(UserError, match=r"start-fraction must be in \(0, 0.25\), so that 4 starts leave a rest"):
        CONFIG.replace(starts=4, start_fraction=0.25)
