"""The confirmation: the best configurations of a search, trained again with seeds that the search has not used.

The best of many trials is partly the luckiest one. So the best few, and the configuration from which the search started,
are compared as ``es-flipout train`` would report them: the best mean policy of a run, in the single Gymnasium environment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import optuna

from es_flipout.config import TrainConfig
from es_flipout.errors import UserError
from es_flipout.tuning.processes import Died, Pool
from es_flipout.tuning.show import View
from es_flipout.tuning.worker import Done, Failed, Job, Report

_CONFIRMED = "confirmed"
_MOST_DEATHS = 3


@dataclass(frozen=True)
class Candidate:
    """A configuration that may become the preset.

    Attributes:
        name: unique in the study.
        config: what to train, without a seed.
    """

    name: str
    config: TrainConfig


@dataclass(frozen=True)
class Confirmed:
    """A candidate, and its mean return in Gymnasium with each fresh seed."""

    candidate: Candidate
    scores: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over the seeds; NaN counts as the worst."""
        value = math.fsum(self.scores) / len(self.scores)
        return value if math.isfinite(value) else -math.inf


def confirmed(study: optuna.Study, candidates: Sequence[Candidate], seeds: Sequence[int]) -> list[Confirmed]:
    """Return the candidates that were trained with all seeds, best first."""
    found = {name: study.user_attrs.get(f"{_CONFIRMED} {name}", {}) for name in (each.name for each in candidates)}
    done = [
        Confirmed(each, tuple(found[each.name][str(seed)] for seed in seeds))
        for each in candidates
        if all(str(seed) in found[each.name] for seed in seeds)
    ]
    return sorted(done, key=lambda each: each.mean, reverse=True)


def confirm(
    study: optuna.Study,
    candidates: Sequence[Candidate],
    seeds: Sequence[int],
    pool: Pool,
    view: View,
    runs_of: Callable[[TrainConfig, Sequence[int]], tuple[TrainConfig, ...]],
    stopped: Callable[[], bool],
) -> None:
    """Train every candidate with every seed, and keep the results in the study.

    Args:
        study: what is already in it is not repeated.
        candidates: what to train.
        seeds: the fresh seeds.
        pool: the processes.
        view: shows the progress.
        runs_of: returns the runs of a configuration with some seeds.
        stopped: whether the user wants to stop.

    Raises:
        UserError: a run cannot be trained.
    """
    keys = {
        f"{each.name}, seed {seed}": (each, seed)
        for each in candidates
        for seed in seeds
        if str(seed) not in study.user_attrs.get(f"{_CONFIRMED} {each.name}", {})
    }
    waiting, deaths = list(keys), 0
    while (waiting or pool.busy) and not stopped():
        while waiting and pool.has_room:
            key = waiting.pop(0)
            candidate, seed = keys[key]
            pool.submit(key, Job(runs_of(candidate.config, (seed,)), evaluate=True))
            view.started(key)
        for key, what in pool.events(0.5):
            candidate, seed = keys[key]
            match what:
                case Report():
                    view.reported(key, what)
                    pool.answer(key, True)
                case Done():
                    name = f"{_CONFIRMED} {candidate.name}"
                    study.set_user_attr(name, {**study.user_attrs.get(name, {}), str(seed): what.evaluations[0]})
                    view.ended(key, f"{key}: {what.evaluations[0]:,.1f}")
                case Failed():
                    raise UserError(what.message)
                case Died():
                    deaths += 1
                    if deaths == _MOST_DEATHS:
                        raise UserError(died(key, what))
                    waiting.append(key)
                    view.ended(key, f"{died(key, what)}; trying again")


def died(key: str, what: Died) -> str:
    """Return a message for the end of a process."""
    return f"the process of {key} ended with exit code {what.exit_code} (-9: killed, for example for lack of memory)"
