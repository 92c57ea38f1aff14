"""The search space: which options of a configuration are searched, in which ranges, and what their values mean."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from es_flipout.config import TrainConfig
from es_flipout.errors import UserError

if TYPE_CHECKING:
    from optuna import Trial

NAMES = (
    "learning_rate",
    "learning_rate_final",
    "sigma",
    "sigma_final",
    "population_size",
    "policy",
    "weight_decay",
    "antithetic",
    "shaping",
    "horizon",
    "episode_cap",
    "episode_cap_until",
    "episodes",
    "squash",
    "optimizer",
    "observation_norm",
    "remove_alive_bonus",
)
"""What can be searched: flat names of options. ``policy`` stands for the kind of network and its hidden sizes."""

_ONLY_ON_REQUEST = frozenset({"antithetic", "episodes", "optimizer", "observation_norm"})
_FEWEST_GENERATIONS = 5  # of whole episodes
_LONG_EPISODES = 400  # steps; from here on, shorter episodes or segments may help


@dataclass(frozen=True)
class Traits:
    """What the space depends on.

    Attributes:
        box_actions: whether actions are continuous.
        alive_bonus: whether the environment gives a reward for being alive.
        restorable: whether episodes can be continued from any state, which a horizon needs.
        max_episode_steps: the environment's time limit, if it has one.
    """

    box_actions: bool
    alive_bonus: bool
    restorable: bool
    max_episode_steps: int | None


@dataclass(frozen=True)
class Choice:
    """One of some values; ``start`` is that of the configuration from which the search starts."""

    start: Any
    values: tuple[Any, ...]


@dataclass(frozen=True)
class LogRange:
    """A number between ``low`` and ``high``, searched on a logarithmic scale, with three significant digits."""

    start: float
    low: float
    high: float


Domain = Choice | LogRange
Space = Mapping[str, Domain]


def make_space(config: TrainConfig, traits: Traits, search: Collection[str] = (), fixed: Collection[str] = ()) -> Space:
    """Return the domains of the options to search.

    Args:
        config: the configuration from which the search starts; its values are in all domains.
        traits: what the task is like.
        search: names of :data:`NAMES`; by default those that make sense for the task, without ``fixed``.
        fixed: options that the user has set.

    Raises:
        UserError: an option cannot be searched on this task.
    """
    if unknown := [name for name in search if name not in NAMES]:
        raise UserError(f"{unknown[0]} cannot be searched; choose from {', '.join(NAMES)}")
    for name in search:
        if (reason := _obstacle(name, config, traits, search)) is not None:
            raise UserError(f"{name} cannot be searched {reason}")
    fixed = {*fixed, *(["policy"] if "hidden" in fixed else [])}
    usual = [name for name in NAMES if name not in fixed and _is_usual(name, config, traits)]
    names = [name for name in NAMES if name in search] if search else usual
    if not names:
        raise UserError(
            "every option is set on the command line, so there is nothing to search; name some with --search"
        )
    return {name: _domain(name, config, traits) for name in names}


def _is_usual(name: str, config: TrainConfig, traits: Traits) -> bool:
    if name in _ONLY_ON_REQUEST or _obstacle(name, config, traits, ()) is not None:
        return False
    if name in ("horizon", "episode_cap"):
        return traits.max_episode_steps is not None and traits.max_episode_steps >= _LONG_EPISODES
    if name == "episode_cap_until":
        return _is_usual("episode_cap", config, traits)
    return True


def _obstacle(name: str, config: TrainConfig, traits: Traits, search: Collection[str]) -> str | None:
    """Return why an option cannot be searched, as the end of a sentence; None if it can."""
    task = config.task
    limited = traits.max_episode_steps is not None
    match name:
        case "squash" if not traits.box_actions:
            return "with discrete actions"
        case "remove_alive_bonus" if not traits.alive_bonus:
            return f"for {task.env_id}, which has no alive bonus"
        case "horizon" if not traits.restorable:
            return f"for {task.env_id}, whose state cannot be restored"
        case "horizon" if config.policy.kind == "recurrent":
            return "with a recurrent policy"
        case "horizon" if task.start_states == "generation":
            return "with start states shared by the generation"
        case "horizon" if task.episode_cap is not None and "episode_cap" not in search:
            return "with an episode cap"
        case "episode_cap" if task.horizon is not None and "horizon" not in search:
            return "with a horizon"
        case "horizon" | "episode_cap" if not limited:
            return f"for {task.env_id}, which has no time limit"
        case "episode_cap_until" if "episode_cap" not in search and search and task.episode_cap is None:
            return "without an episode cap"
        case "shaping" if not config.strategy.antithetic and "antithetic" not in search:
            return "without antithetic pairs"
        case "antithetic" if config.strategy.population_size % 2:
            return "with an odd population"
        case "policy" if config.policy.kind == "convnet":
            return "with a convnet policy"
    return None


def _domain(name: str, config: TrainConfig, traits: Traits) -> Domain:
    strategy, task = config.strategy, config.task
    start = config.flat()[name]
    limit = traits.max_episode_steps or 0
    match name:
        case "learning_rate":
            return _range(start, 1e-3, 0.3)
        case "learning_rate_final":  # as a fraction of the first one
            return _range(_ratio(start, strategy.learning_rate), 0.01, 1.0, clamp=True)
        case "sigma":
            return _range(start, 5e-3, 0.5)
        case "sigma_final":  # as a fraction of the first one
            return _range(_ratio(start, strategy.sigma), 0.1, 1.0, clamp=True)
        case "population_size":
            sizes = {start, *(max(2 * round(start * factor / 2), 4) for factor in (0.25, 0.5, 2, 4))}
            # The last generation of a run is completed, so few large ones would train longer than the others.
            steps = config.schedule.env_steps
            most = max(sizes) if steps is None else steps // (_FEWEST_GENERATIONS * task.episodes * max(limit, 1))
            return Choice(start, tuple(sorted(size for size in sizes if size <= max(start, most))))
        case "policy":
            kind, sizes = config.policy.kind, ((16,), (32, 32), (64, 64))
            if kind == "recurrent":
                return _choice(_network(config), *(f"{kind} {size}" for size in (16, 32, 64)))
            return _choice(_network(config), "linear", *(_sizes("mlp", hidden) for hidden in sizes))
        case "weight_decay":
            return _choice(start, 0.0, 0.003, 0.01, 0.03, 0.1)
        case "shaping":
            return _choice(start, "ranks", "differences")
        case "horizon":
            return _choice(start, None, *(limit // part for part in (20, 10, 5) if limit // part))
        case "episode_cap":
            return _choice(start, None, *(limit // part for part in (10, 5, 2) if limit // part))
        case "episode_cap_until":
            return _choice(task.episode_cap_until, 0.5, 0.75, 1.0)
        case "episodes":
            return _choice(start, 1, 2, 4)
        case "squash":
            return _choice(start, "clip", "tanh")
        case "optimizer":
            return _choice(start, "adam", "sgd", "clipup")
        case _:
            return _choice(start, True, False)


def _range(start: float, low: float, high: float, clamp: bool = False) -> LogRange:
    if clamp:
        return LogRange(min(max(start, low), high), low, high)
    return LogRange(start, min(start, low), max(start, high))


def _choice(start: Any, *values: Any) -> Choice:
    return Choice(start, values if start in values else (start, *values))


def _ratio(final: float | None, start: float) -> float:
    return 1.0 if final is None else final / start


def _network(config: TrainConfig) -> str:
    hidden = () if config.policy.kind == "linear" else config.policy.hidden
    return _sizes(config.policy.kind, hidden)


def _sizes(kind: str, hidden: tuple[int, ...]) -> str:
    return " ".join((kind, *map(str, hidden)))


def start_of(space: Space) -> dict[str, Any]:
    """Return the values of the configuration from which the search starts."""
    return {name: domain.start for name, domain in space.items()}


def suggest(trial: Trial, space: Space, config: TrainConfig) -> TrainConfig:
    """Ask Optuna for the values of a trial; a value that would have no effect next to another one is not asked for."""
    values: dict[str, Any] = {}
    for name, domain in space.items():
        if _has_effect(name, values, config):
            if isinstance(domain, LogRange):
                values[name] = trial.suggest_float(name, domain.low, domain.high, log=True)
            else:
                values[name] = trial.suggest_categorical(name, domain.values)
    return configured(config, values)


def _has_effect(name: str, values: Mapping[str, Any], config: TrainConfig) -> bool:
    """Return whether an option has an effect, given the values of those before it in :data:`NAMES`."""
    match name:
        case "shaping":
            return values.get("antithetic", config.strategy.antithetic)
        case "episode_cap":
            return values.get("horizon", config.task.horizon) is None
        case "episode_cap_until":
            return values.get("episode_cap", None if values.get("horizon") else config.task.episode_cap) is not None
    return True


def configured(config: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """Return a configuration with the values of a trial.

    Args:
        config: the configuration from which the search starts.
        values: by name, from the domains of :func:`make_space`.
    """
    changes: dict[str, Any] = {}
    for name, value in values.items():
        match name:
            case "learning_rate_final" | "sigma_final":
                start = name.removesuffix("_final")
                first = changes.get(start, config.flat()[start])
                changes[name] = None if value == 1 else _three_digits(first * value)
            case "policy":
                kind, *hidden = value.split()
                changes["policy"] = kind
                if hidden:
                    changes["hidden"] = tuple(int(size) for size in hidden)
            case _:
                changes[name] = _three_digits(value) if isinstance(value, float) else value
    if values.get("horizon") is not None:
        changes["episode_cap"] = None
    if values.get("antithetic") is False:
        changes["shaping"] = "ranks"
    return config.replace(**changes)


def _three_digits(value: float) -> float:
    return float(f"{value:.3g}")
