"""Several independent starts of a run, of which the best one goes on.

What a run learns in the end is often decided by its first generations. With ``--starts K``, the first ``K *
start_fraction`` of the run are ``K`` attempts from the initial weights, one after the other and with other random
numbers; each ends with a score of its mean policy, and training continues from the state of the one with the highest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from es_flipout.config import Schedule

Tensors = Mapping[str, Tensor]


class Starts:
    """The starts of a run: which one is under way, and the state of the best finished one.

    Attributes:
        finished: number of finished starts.
        score: score of the best finished start; -inf before the first one, or if no score was a number.
        best: tensors of the run when that start ended.
    """

    def __init__(self, schedule: Schedule, initial: Tensors) -> None:
        """Remember the state from which every start begins."""
        self._count, self._fraction = schedule.starts, schedule.start_fraction
        self._initial = _copied(initial) if self._count > 1 else {}
        self.finished = 0
        self.score = -math.inf
        self.best: dict[str, Tensor] = {}

    def due(self, fraction: float) -> bool:
        """Whether the current start is over, at a completed fraction of the run."""
        end = (self.finished + 1) * self._fraction - 1e-9  # three tenths are more than 3 / 10 in floating point
        return 1 < self._count > self.finished and fraction >= end

    def finish(self, score: float, tensors: Tensors) -> dict[str, Tensor]:
        """End a start, and return the tensors with which the run continues.

        Args:
            score: score of its mean policy; NaN is never the best.
            tensors: tensors of the run.
        """
        if not self.best or score > self.score:
            self.score, self.best = -math.inf if math.isnan(score) else score, _copied(tensors)
        self.finished += 1
        if self.finished < self._count:
            return _copied(self._initial)
        best, self.best = self.best, {}
        return best

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything but the initial state as tensors; nothing if there is a single start."""
        if self._count == 1:
            return {}
        numbers = {"finished": torch.tensor(self.finished), "score": torch.tensor(self.score, dtype=torch.float64)}
        return numbers | {f"best.{name}": value for name, value in self.best.items()}

    def load_state_dict(self, state: Tensors) -> None:
        """Load the tensors of :meth:`state_dict`.

        Raises:
            KeyError: tensors are missing.
        """
        if self._count > 1:
            self.finished, self.score = int(state["finished"]), float(state["score"])
            self.best = {name.removeprefix("best."): value for name, value in state.items() if name.startswith("best.")}

    def __str__(self) -> str:
        """Describe what comes next, for the user."""
        if self.finished < self._count:
            return f"start {self.finished + 1} of {self._count}"
        return f"continuing the best of {self._count} starts, with a score of {self.score:,.1f}"


def _copied(tensors: Tensors) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in tensors.items()}
