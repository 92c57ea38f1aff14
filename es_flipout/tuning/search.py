"""The search: trials in parallel, each with several seeds, pruned by the mean of their scores; then the confirmation.

This process alone writes the study; worker processes only train. Everything that has been learned is in the study's
file, so the search can be killed at any time and continued.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import gymnasium
import optuna
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from es_flipout.config import PLACES, TrainConfig
from es_flipout.errors import UserError
from es_flipout.rollout.builder import backend_of, make_one_env
from es_flipout.training.signals import stop_on_signals
from es_flipout.tuning import study as studies
from es_flipout.tuning.confirm import Candidate, Confirmed, confirm, confirmed, died
from es_flipout.tuning.plots import write_plots
from es_flipout.tuning.processes import Died, Pool
from es_flipout.tuning.show import Row, View, score_texts, value_text
from es_flipout.tuning.space import Space, Traits, configured, make_space, start_of, suggest
from es_flipout.tuning.worker import RUNGS, Done, Failed, Job, Report

_FRESH = 1000  # distance of the confirmation's seeds from those of the trials
_SHOWN = 5
_MOST_ATTEMPTS = 3
_NOT_COMPARED = frozenset({"checkpoint_every", "keep_checkpoints"})
_NEVER = 2**62


@dataclass(frozen=True)
class Search:
    """What to search.

    Attributes:
        config: the configuration from which the search starts, and all options that are not searched; its seed is the
            first seed of every trial.
        folder: the study, and everything else that is written.
        trials: how many trials to finish.
        seeds: runs per trial.
        jobs: trials at a time.
        names: what to search; empty for what makes sense.
        fixed: what not to search by default.
        pruner: when to stop trials early.
        confirm: how many of the best trials are trained with fresh seeds.
        confirm_seeds: how many fresh seeds.
    """

    config: TrainConfig
    folder: Path
    trials: int
    seeds: int
    jobs: int
    names: Collection[str]
    fixed: Collection[str]
    pruner: studies.PrunerName
    confirm: int
    confirm_seeds: int


@dataclass(frozen=True)
class Outcome:
    """The end of a search.

    Attributes:
        finished: finished trials in the study.
        best: the best complete trials, as they are shown.
        confirmed: the confirmed candidates, best first.
        chosen: the candidate to use; None if the search was stopped before it was known.
    """

    finished: int
    best: list[Row]
    confirmed: list[Confirmed]
    chosen: Candidate | None


def search(what: Search, console: Console) -> Outcome:
    """Run a search to its end, or until it is stopped by Ctrl-C or SIGTERM.

    Raises:
        UserError: the configuration or the folder cannot be used.
    """
    space = make_space(what.config, _traits(what.config), what.names, what.fixed)
    with studies.open_study(
        what.folder,
        _plan(what, space),
    ) as study:
        return _Session(what, space, study, console).run()


def _traits(config: TrainConfig) -> Traits:
    env = make_one_env(config)
    try:
        box = isinstance(env.action_space, gymnasium.spaces.Box)
        return Traits(box, env.alive_bonus != 0, backend_of(config) != "gymnasium", env.max_episode_steps)
    finally:
        env.close()


def _plan(what: Search, space: Space) -> studies.Plan:
    compared = {
        name: value
        for name, value in what.config.flat().items()
        if PLACES[name][0] != "compute" and name not in _NOT_COMPARED
    }
    domains = {name: asdict(domain) for name, domain in space.items()}
    settings = {**compared, "seeds": what.seeds, "rungs": RUNGS, "search": domains}
    return studies.Plan(settings, start_of(space), what.pruner, what.trials, what.config.schedule.seed)


class _Session:
    """A search that is going on."""

    def __init__(self, what: Search, space: Space, study: optuna.Study, console: Console) -> None:
        self._what, self._space, self._study, self._console = what, space, study, console
        self._stopped = False
        self._trials: dict[str, optuna.Trial] = {}  # those that run, by the keys of their jobs

    def run(self) -> Outcome:
        """Run all trials and the confirmation."""
        what, study = self._what, self._study
        chosen, ranking = None, []
        view = View(self._console, self._heading, self._best_rows)
        with stop_on_signals(lambda _: self._stop()), Pool(what.jobs) as pool, view:
            try:
                self._run_trials(pool, view)
            finally:
                studies.retry_unfinished(study)
            write_plots(study, what.folder)
            if not self._stopped:
                candidates, seeds = (
                    self._candidates(),
                    range(first := what.config.schedule.seed + _FRESH, first + what.confirm_seeds),
                )
                if what.confirm:
                    view.heading, view.best = self._confirming, lambda: _rows(confirmed(study, candidates, seeds))
                    confirm(study, candidates, seeds, pool, view, runs_of, lambda: self._stopped)
                    ranking = confirmed(study, candidates, seeds)
                if not self._stopped:
                    chosen = ranking[0].candidate if ranking else candidates[0]
        return Outcome(len(studies.finished(study)), self._best_rows(), ranking, chosen)

    def _stop(self) -> None:
        self._stopped = True

    def _run_trials(self, pool: Pool, view: View) -> None:
        study, what = self._study, self._what
        while not self._stopped:
            while pool.has_room and len(studies.finished(study)) + pool.busy < what.trials:
                trial = studies.ask(study)
                config = suggest(trial, self._space, what.config)
                key = f"trial {trial.number}"
                self._trials[key] = trial
                seeds = range(config.schedule.seed, config.schedule.seed + what.seeds)
                runs = runs_of(config.replace(score_every=_NEVER), seeds)
                pool.submit(key, Job(runs))
                view.started(key, trial.params)
            if not pool.busy:
                return
            for key, event in pool.events(0.5):
                self._handle(pool, view, key, event)

    def _handle(self, pool: Pool, view: View, key: str, event: Report | Done | Failed | Died) -> None:
        study, trial = self._study, self._trials[key]
        match event:
            case Report():
                view.reported(key, event)
                goes_on = studies.report(study, trial, event.rung, event.scores, RUNGS)
                pool.answer(key, goes_on)
                if not goes_on:
                    score, spread = score_texts(event.scores)
                    state = "score" if event.rung == RUNGS else f"pruned at {event.rung}/{RUNGS} of the run, score"
                    view.ended(key, f"{key}: {state} {score} (seeds {spread}) {value_text(trial.params)}")
            case Failed():
                raise UserError(event.message)
            case Died():
                frozen = study.trials[trial.number]
                attempt = studies.attempt_of(frozen)
                if attempt == _MOST_ATTEMPTS:
                    raise UserError(died(key, event))
                studies.fail_and_retry(study, frozen, attempt + 1)
                view.ended(key, f"{died(key, event)}; trying again")
            case Done():
                raise AssertionError("a trial ends with its last report")

    def _candidates(self) -> list[Candidate]:
        """Return what may become the preset: the best trials, and the start of the search."""
        what, start = self._what, Candidate("start", self._what.config)
        best = studies.best_first(self._study)
        if not best:
            raise UserError("no trial was completed: all scores were NaN or infinite")
        count = max(what.confirm, 1)
        candidates: list[Candidate] = []
        for trial in best:
            config = configured(what.config, trial.params)
            if len(candidates) < count and config not in (each.config for each in candidates):
                candidates.append(Candidate(f"trial {trial.number}", config))
        if what.confirm and what.config not in (each.config for each in candidates):
            candidates.append(start)
        return candidates

    def _heading(self) -> str:
        done = studies.finished(self._study)
        pruned = sum(trial.state == TrialState.PRUNED for trial in done)
        env_id, what = self._what.config.task.env_id, self._what
        return f"[bold]{env_id}[/bold]: {len(done)} of {what.trials} trials ({pruned} pruned), {what.seeds} seeds each"

    def _confirming(self) -> str:
        return (
            f"[bold]{self._what.config.task.env_id}[/bold]: the best trials with {self._what.confirm_seeds} fresh seeds"
        )

    def _best_rows(self) -> list[Row]:
        return [_row(trial) for trial in studies.best_first(self._study)[:_SHOWN]]


def runs_of(config: TrainConfig, seeds: Sequence[int]) -> tuple[TrainConfig, ...]:
    """Return a run for each seed, on one core: parallel trials share the machine."""
    compute = config.compute
    device = "cpu" if compute.device == "auto" else compute.device
    threads = 1 if compute.threads is None else compute.threads
    overlap = False if compute.overlap is None and device == "cpu" else compute.overlap
    return tuple(config.replace(seed=seed, device=device, threads=threads, overlap=overlap) for seed in seeds)


def _row(trial: FrozenTrial) -> Row:
    return Row(f"trial {trial.number}", "complete", studies.scores_of(trial), trial.params)


def _rows(results: Sequence[Confirmed]) -> list[Row]:
    return [Row(each.candidate.name, "confirmed", each.scores) for each in results]
