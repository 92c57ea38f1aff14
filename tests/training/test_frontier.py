"""The frontier: which of two partners is continued, and when an episode starts again."""

from __future__ import annotations

import pytest
import torch
from populations import population_of
from torch import nn

from es_flipout.config import TrainConfig
from es_flipout.errors import UserError
from es_flipout.perturbations import Flipout
from es_flipout.rollout.episodes import Ends, Segments
from es_flipout.training.frontier import Frontier
from es_flipout.training.setup import make_trainer

P, E, K = 400, 2, 3


def coded() -> torch.Tensor:
    """Return states that identify their episodes: member, episode, and their sum."""
    member, episode = torch.meshgrid(torch.arange(P), torch.arange(E), indexing="ij")
    return torch.stack([member, episode, member + episode], -1).double()


def updated(running: torch.Tensor, antithetic: bool = True, generation: int = 2) -> Segments:
    population = population_of(nn.Linear(2, 1), Flipout(), P, antithetic=antithetic, generation=generation)
    frontier = Frontier()
    segments = frontier.segments(population, E)
    assert not segments.elapsed.any(), "at first every episode starts from its seed"
    assert segments.begins
    frontier.update(population, segments, Ends(coded(), running), torch.full((P, E), 7))
    return frontier.segments(population, E)


def test_partners_continue_one_of_their_states() -> None:
    segments = updated(torch.ones(P, E, dtype=torch.bool))
    assert torch.equal(segments.states[0::2], segments.states[1::2])
    member, episode = segments.states[0::2, :, 0].long(), segments.states[0::2, :, 1].long()
    assert torch.equal(member // 2, torch.arange(P // 2)[:, None].expand(-1, E))
    assert torch.equal(episode, torch.arange(E).expand(P // 2, E))
    chosen = (member % 2).double()
    assert 0.4 < float(chosen.mean()) < 0.6
    assert abs(float(torch.corrcoef(chosen.T)[0, 1])) < 0.2, "episodes are drawn independently"
    assert (segments.elapsed == 7).all()
    assert not segments.begins


def test_the_choice_is_addressed_by_generation() -> None:
    everyone = torch.ones(P, E, dtype=torch.bool)
    assert torch.equal(updated(everyone).states, updated(everyone).states)
    assert not torch.equal(updated(everyone).states, updated(everyone, generation=3).states)


def test_a_partner_whose_episode_is_over_is_not_continued() -> None:
    running = torch.ones(P, E, dtype=torch.bool)
    running[0::2, 0] = False  # of episode 0, only the second partner continues
    running[:, 1] = False  # of episode 1, none
    segments = updated(running)
    assert (segments.states[:, 0, 0].long() % 2 == 1).all()
    assert (segments.elapsed[:, 0] == 7).all()
    assert (segments.elapsed[:, 1] == 0).all(), "it starts from its seed"
    assert segments.begins


def test_without_partners_every_member_goes_on_alone() -> None:
    running = torch.ones(P, E, dtype=torch.bool)
    running[5, 1] = False
    segments = updated(running, antithetic=False)
    assert torch.equal(segments.states, coded())
    assert segments.elapsed[5].tolist() == [7, 0]
    assert int((segments.elapsed == 7).sum()) == P * E - 1


def test_elapsed_steps_add_up_and_survive_a_state_dict() -> None:
    population, frontier = population_of(nn.Linear(2, 1), Flipout(), P), Frontier()
    for _ in range(3):
        segments = frontier.segments(population, E)
        lengths = torch.full((P, E), 10)
        frontier.update(population, segments, Ends(coded(), torch.ones(P, E, dtype=torch.bool)), lengths)
    again = Frontier()
    again.load_state_dict(frontier.state_dict())
    for found in (frontier, again):
        assert (found.segments(population, E).elapsed == 30).all()
    assert torch.equal(again.segments(population, E).states, frontier.segments(population, E).states)
    assert Frontier().state_dict() == {}


def test_a_generation_plays_the_horizon_and_the_next_one_goes_on() -> None:
    config = TrainConfig.of("Pendulum-v1", population_size=8, horizon=60, generations=9, hidden=(4,), score_every=99)
    trainer = make_trainer(config)
    elapsed = []
    for _ in range(5):
        rollout = trainer.generation()
        elapsed.append(trainer.frontier.state_dict()["elapsed"].unique().tolist())
        assert rollout.lengths.unique().tolist() == [60 if elapsed[-1] != [0] else 20]
    assert elapsed == [[60], [120], [180], [0], [60]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env_id": "Blackjack-v1"}, "horizon needs an environment whose state can be restored .*Blackjack-v1"),
        ({"policy": "recurrent"}, "policy must be mlp, linear or convnet with a horizon, got recurrent"),
        ({"episode_cap": 5}, "episode-cap must be unset with a horizon, got 5"),
        ({"start_states": "generation"}, "start-states must be pair with a horizon"),
        ({"backend": "ray", "worker_kind": "classic"}, "worker-kind must be engine with a horizon"),
        ({"horizon": 0}, "horizon must be at least 1, got 0"),
        ({"shaping": "differences", "antithetic": False}, "shaping must be ranks without antithetic pairs"),
    ],
)
def test_what_does_not_go_together_is_one_line(changes: dict, message: str) -> None:  # pyright: ignore[reportMissingTypeArgument]
    with pytest.raises(UserError, match=message):
        make_trainer(TrainConfig.of(**({"env_id": "Pendulum-v1", "horizon": 10, "generations": 1} | changes)))
