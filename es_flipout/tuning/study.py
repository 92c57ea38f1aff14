"""The study of a search: an Optuna study in one file, which one process at a time may continue."""

from __future__ import annotations

import contextlib
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from es_flipout.errors import UserError
from es_flipout.training.lock import LOCK, locked

JOURNAL = "study.journal"
PrunerName = Literal["median", "halving", "none"]

_NAME = "es_flipout"
_SETTINGS = "settings"
_SCORES = "scores"
_ATTEMPT = "attempt"
_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True)
class Plan:
    """What a study is about; a study can only be continued with the same plan.

    Attributes:
        settings: everything that makes trials comparable, as JSON values: the configuration, the space, the seeds.
        start: values of the first trial.
        pruner: when trials are stopped early.
        trials: how many trials there will be, so that the sampler knows how many of them to draw at random.
        seed: seed of the sampler.
    """

    settings: Mapping[str, Any]
    start: Mapping[str, Any]
    pruner: PrunerName
    trials: int
    seed: int


@contextlib.contextmanager
def open_study(folder: Path, plan: Plan) -> Iterator[optuna.Study]:
    """Open the study in a folder, or create it.

    Trials that were running when the last process ended are marked as failed, and enqueued again.

    Raises:
        UserError: the folder holds something else, a study with another plan, or one that another process has open.
    """
    path = folder / JOURNAL
    if folder.is_dir() and not path.exists() and any(file.name != LOCK for file in folder.iterdir()):
        raise UserError(f"{folder} holds other files and no study; choose another --output")
    if path.exists():
        _check_journal(path)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if path.exists():
            _repair(path)
        study = _load(path, plan)
        _check_settings(folder, study, plan.settings)
        retry_unfinished(study)
        yield study


def _check_journal(path: Path) -> None:
    """Refuse a file that is no journal, before anything is written to it."""
    try:
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            json.loads(line)["op_code"]
        else:
            return
        if path.read_bytes().startswith(b'{"op_code"'):
            return  # the process was killed while it wrote the last line
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path} is not the journal of a study; choose another --output")


def _repair(path: Path) -> None:
    """Remove what a killed process may leave: a line that it did not complete, and the lock of a line."""
    data = path.read_bytes()
    if not data.endswith(b"\n"):
        with path.open("rb+") as file:
            file.truncate(data.rfind(b"\n") + 1)
    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)


def _load(path: Path, plan: Plan) -> optuna.Study:
    try:
        storage = JournalStorage(JournalFileBackend(str(path)))
        names = [study.study_name for study in storage.get_all_studies()]
        if names not in ([], [_NAME]):
            raise UserError(f"{path} holds another study ({', '.join(names)}); choose another --output")
        pruner = _pruner(plan.pruner)
        if names:
            study = optuna.load_study(study_name=_NAME, storage=storage, pruner=pruner)
        else:
            study = optuna.create_study(study_name=_NAME, storage=storage, pruner=pruner, direction="maximize")
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); choose another --output") from None
    # The seed must not be that of an earlier process, whose values would be drawn again.
    seed = (plan.seed + len(study.get_trials(deepcopy=False))) % 2**32
    startup = max(min(10, plan.trials // 3), 1)
    study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)
    if _SETTINGS not in study.user_attrs:
        if study.get_trials(deepcopy=False):
            raise UserError(f"{path} holds a study that es-flipout tune did not make; choose another --output")
        study.enqueue_trial(dict(plan.start))
        study.set_user_attr(_SETTINGS, dict(plan.settings))
    return study


def _pruner(name: PrunerName) -> optuna.pruners.BasePruner:
    match name:
        case "median":
            return optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=3)  # from the third report on
        case "halving":
            return optuna.pruners.SuccessiveHalvingPruner(min_resource=2, reduction_factor=2)
        case "none":
            return optuna.pruners.NopPruner()


def _check_settings(folder: Path, study: optuna.Study, settings: Mapping[str, Any]) -> None:
    """Refuse to mix trials that cannot be compared."""
    before, now = study.user_attrs[_SETTINGS], json.loads(json.dumps(settings))
    for name in {**now, **before}:
        if before.get(name) != now.get(name):
            raise UserError(
                f"{folder} holds a study with {name} {_shown(before.get(name))}, and this one has {_shown(now.get(name))}: "
                f"repeat the command that started it, or choose another --output"
            )


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def retry_unfinished(study: optuna.Study) -> None:
    """Mark trials that are running as failed, and enqueue their values again."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        fail_and_retry(study, trial)


def fail_and_retry(study: optuna.Study, trial: FrozenTrial, attempt: int = 1) -> None:
    """Mark a trial as failed, and enqueue its values again as a new trial."""
    values = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    study.tell(trial.number, state=TrialState.FAIL)
    study.enqueue_trial(values, user_attrs={_ATTEMPT: attempt})


def attempt_of(trial: FrozenTrial) -> int:
    """Return how many trials with the same values have failed before, because their process ended on its own."""
    return trial.user_attrs.get(_ATTEMPT, 1)


def ask(study: optuna.Study) -> optuna.Trial:
    """Start the next trial: an enqueued one if there is any."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return study.ask()


def report(study: optuna.Study, trial: optuna.Trial, rung: int, scores: Sequence[float], last: int) -> bool:
    """Report the scores of a trial's runs; return whether it is still running.

    The value of a trial is the mean of the runs' last scores. A trial whose scores are not finite is pruned.

    Args:
        study: the study of the trial.
        trial: a trial that :func:`ask` returned.
        rung: 1 to ``last``.
        scores: a score for each seed.
        last: the rung at which trials end.
    """
    value = math.fsum(scores) / len(scores)
    if math.isfinite(value):
        trial.report(value, rung)
        trial.set_user_attr(_SCORES, list(scores))
    if rung == last and math.isfinite(value):
        study.tell(trial, value)
        return False
    if not math.isfinite(value) or trial.should_prune():
        study.tell(trial, state=TrialState.PRUNED)
        return False
    return True


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials that came to an end or were pruned."""
    return study.get_trials(deepcopy=False, states=_FINISHED)


def best_first(study: optuna.Study) -> list[FrozenTrial]:
    """Return the complete trials, best first; of equally good ones, the one with the better curve."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))

    def rank(trial: FrozenTrial) -> tuple[float, float]:
        curve = trial.intermediate_values.values()
        return trial.value or 0.0, math.fsum(curve) / max(len(curve), 1)

    return sorted(complete, key=rank, reverse=True)


def scores_of(trial: FrozenTrial) -> list[float]:
    """Return the newest scores of a trial's runs."""
    return trial.user_attrs.get(_SCORES, [])
