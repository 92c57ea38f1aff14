"""The states from which the episodes of a run continue: those in which the segments of the last generation ended.

With ``--horizon``, a generation plays only that many steps of every episode, and the next one continues the episodes
with other members. Antithetic partners continue from the same state, that of a random one of them. The mean policy is
therefore updated much more often per environment step than with whole episodes, and start states are states that the
policy visits. (Related: truncated and persistent evolution strategies, Vicol et al. 2021, arXiv 2112.13835;
noise-reuse evolution strategies, Li et al. 2023, arXiv 2304.12180. These keep a member's noise over the segments of an
episode to remove the bias of truncation; here every segment has new noise.)

Letters: ``N`` noise sources, ``E`` episodes per member, ``K`` numbers that describe a state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from es_flipout.randomness import Address, Stream, integers
from es_flipout.rollout.episodes import Ends, Segments
from es_flipout.strategy.population import Population


class Frontier:
    """The states from which the next generation's episodes start; initially none: all start from their seeds."""

    def __init__(self) -> None:
        self._states: Tensor | None = None  # (N, E, K) float64
        self._elapsed: Tensor | None = None  # (N, E) int64; 0 if an episode starts from its seed

    def segments(self, population: Population, episodes: int) -> Segments:
        """Return the states from which every member continues.

        Args:
            population: the members; antithetic partners continue from the same states.
            episodes: ``E``.
        """
        source = population.members.source_of(torch.arange(population.size))
        if self._states is None or self._elapsed is None:
            shape = population.size, episodes
            return Segments(torch.zeros(*shape, 1, dtype=torch.float64), torch.zeros(shape, dtype=torch.int64))
        elapsed = self._elapsed[source]
        return Segments(self._states[source], elapsed, begins=bool((elapsed == 0).any()))

    def update(self, population: Population, segments: Segments, ends: Ends, lengths: Tensor) -> None:
        """Store the states in which a generation's segments ended.

        Of two antithetic partners a random one is chosen, or the other one if its episode is over.

        Args:
            population: the members that played.
            segments: the segments that were played.
            ends: how they ended.
            lengths: ``(P, E)`` int64, steps of this generation.
        """
        per_source, count = population.members.per_source, ends.running.shape[1]
        states = ends.states.unflatten(0, (-1, per_source))  # (N, per source, E, K)
        running = ends.running.unflatten(0, (-1, per_source))
        elapsed = (segments.elapsed + lengths).unflatten(0, (-1, per_source))
        address = Address(population.seed, population.generation)
        drawn = integers(address, Stream.CONTINUATION, population.members.sources.cpu(), count)  # (N, E)
        chosen = (drawn % per_source)[:, None]  # (N, 1, E)
        if per_source > 1:
            chosen = torch.where(running.gather(1, chosen), chosen, 1 - chosen)
        goes_on = running.gather(1, chosen)[:, 0]
        self._states = states.gather(1, chosen[..., None].expand(-1, -1, -1, states.shape[-1]))[:, 0]
        self._elapsed = torch.where(goes_on, elapsed.gather(1, chosen)[:, 0], 0)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the states and elapsed steps, for :meth:`load_state_dict`."""
        if self._states is None or self._elapsed is None:
            return {}
        return {"states": self._states, "elapsed": self._elapsed}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load the states and elapsed steps of :meth:`state_dict`."""
        self._states, self._elapsed = state.get("states"), state.get("elapsed")
