"""The configuration of a training run: frozen dataclasses by subject, validated on creation. Does not import torch.

Every option has a unique flat name, which is its flag on the command line and its keyword argument in
:meth:`TrainConfig.of` and :meth:`TrainConfig.replace`; the dataclasses and ``config.json`` group options by subject.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import tyro

import es_flipout
from es_flipout import schema
from es_flipout.errors import UserError

LATER_FIELDS: dict[str, dict[str, Any]] = {
    "task": {"horizon": None},
    "strategy": {"shaping": "ranks"},
    "schedule": {"anneal_generations": None, "anneal_env_steps": None, "starts": 1, "start_fraction": 0.05},
    "compute": {"compile": "off"},
    "logging": {"track": ["tensorboard"], "video": "off"},
}
"""Fields that the format of config.json got later, by subject, with what all runs did before: a file may be without them."""

_NOT_ENV_KWARGS = frozenset({"env_id", "id", "num_envs", "threads", "device", "vectorization_mode", "observed"})


def _check_values(section: Any) -> None:
    """Check what follows from the type of a field alone: choices, and integers of 64 bits."""
    for name, hint in typing.get_type_hints(type(section)).items():
        value = getattr(section, name)
        if typing.get_origin(hint) is Literal:
            choices = typing.get_args(hint)
            _require(value in choices, "policy" if name == "kind" else name, f"one of {', '.join(choices)}", value)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int):
                _require(abs(number) < 2**63, name, "less than 2**63", number)


def _at_least_one(section: Any, *names: str) -> None:
    for name in names:
        _require(getattr(section, name) >= 1, name, "at least 1", getattr(section, name))


def _at_least_one_or_none(section: Any, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        _require(value is None or value >= 1, name, "at least 1", value)


def _non_negative(section: Any, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        _require(math.isfinite(value) and value >= 0, name, "0 or greater", value)


def _require(condition: bool, name: str, need: str, value: object) -> None:
    if not condition:
        raise UserError(f"{name.replace('_', '-')} must be {need}, got {value}")


def _fraction(*parts: tuple[int, int | None]) -> float:
    """Return the largest fraction of ``(done, end)``, at most 1; without an end, 0."""
    return min(max(0.0 if end is None else done / end for done, end in parts), 1.0)


def _linear(start: float, end: float | None, progress: float) -> float:
    return start if end is None else start + (end - start) * progress


@dataclass(frozen=True, kw_only=True)
class Task:
    """The task to learn."""

    env_id: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ENV_ID")]
    """Gymnasium id of the environment."""
    env_kwargs: str = "{}"
    """Keyword arguments of gymnasium.make, as a JSON object."""
    observed: tuple[int, ...] | None = None
    """Indices of the observation entries that the policy sees; None for all."""
    remove_alive_bonus: bool = True
    """Exclude the per-step alive bonus from the fitness (reported returns include it)."""
    start_states: Literal["pair", "generation"] = "pair"
    """Which members share start states: antithetic partners, or the whole generation."""
    episodes: int = 1
    """Episodes per member and generation."""
    episode_cap: int | None = None
    """Initial limit on the steps of training episodes; it grows to the environment's time limit."""
    episode_cap_until: float = 0.5
    """Fraction of the run after which episodes are no longer capped."""
    horizon: int | None = None
    """Steps of every episode per generation; the next generation continues it. None plays whole episodes."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            UserError: a value is out of range; the message names the option and the allowed values.
        """
        _check_values(self)
        _at_least_one(self, "episodes")
        _at_least_one_or_none(self, "episode_cap", "horizon")
        if self.horizon is not None:
            _require(self.episode_cap is None, "episode_cap", "unset with a horizon", self.episode_cap)
            _require(self.start_states == "pair", "start_states", "pair with a horizon", self.start_states)
        if self.observed is not None:
            valid = all(entry >= 0 for entry in self.observed)
            _require(valid, "observed", "indices of 0 or greater", self.observed)
        _require(0 < self.episode_cap_until <= 1, "episode_cap_until", "in (0, 1]", self.episode_cap_until)
        self.parsed_env_kwargs()

    def parsed_env_kwargs(self) -> dict[str, Any]:
        """Return ``env_kwargs`` as a dictionary."""
        try:
            parsed = json.loads(self.env_kwargs)
        except (ValueError, RecursionError) as error:
            raise UserError(f"env-kwargs must be a JSON object, got {self.env_kwargs[:80]!r} ({error})") from None
        _require(isinstance(parsed, dict), "env_kwargs", 'a JSON object such as {"healthy_reward": 2}', self.env_kwargs)
        for name in _NOT_ENV_KWARGS & parsed.keys():
            raise UserError(f"env-kwargs must be keyword arguments of gymnasium.make, which {name} is not")
        return parsed

    @property
    def module(self) -> str | None:
        """The Python module that is imported before the environment is created (``module:Id-v0``); None if there is none."""
        return self.env_id.rpartition(":")[0].removeprefix("es_flipout/") or None

    def episode_cap_at(self, progress: float, limit: int | None) -> int | None:
        """Return the cap on the steps of training episodes at a given progress, or None if there is none.

        Args:
            progress: completed fraction of the run, in [0, 1].
            limit: the environment's own time limit.
        """
        if self.episode_cap is None or progress >= self.episode_cap_until:
            return None
        if limit is None:
            return self.episode_cap
        return round(_linear(self.episode_cap, limit, progress / self.episode_cap_until))


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The policy network and its observation and action maps."""

    kind: Annotated[Literal["mlp", "linear", "recurrent", "convnet"], tyro.conf.arg(name="policy")] = "mlp"
    """Kind of policy network."""
    hidden: tuple[int, ...] = (64, 64)
    """Sizes of the hidden layers (for a recurrent policy: of the recurrent layers)."""
    activation: Literal["tanh", "relu", "elu", "silu", "gelu"] = "tanh"
    """Activation of the hidden layers (not used by recurrent layers)."""
    cell: Literal["gru", "lstm"] = "gru"
    """Cell type of a recurrent policy."""
    channels: tuple[int, ...] = (16, 32)
    """Output channels of the layers of a convolutional policy, each with stride 2."""
    output_gain: float = 0.1
    """Initialization gain of the output layer."""
    squash: Literal["clip", "tanh"] = "clip"
    """How outputs are mapped into a bounded action space."""
    observation_norm: bool = True
    """Normalize observations by running mean and standard deviation (images: by their bounds)."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            UserError: a value is out of range; the message names the option and the allowed values.
        """
        _check_values(self)
        for name, kind in (("hidden", "recurrent"), ("channels", "convnet")):
            sizes = getattr(self, name)
            _require(all(size >= 1 for size in sizes), name, "sizes of at least 1", sizes)
            if self.kind == kind:
                _require(len(sizes) >= 1, name, f"at least one size for a {kind} policy", "none")
        _non_negative(self, "output_gain")


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """The evolution strategy: perturbations and the update of the mean policy."""

    population_size: int = 128
    """Members per generation."""
    sigma: float = 0.03
    """Standard deviation of the perturbations."""
    sigma_final: float | None = None
    """Sigma at the end of the run, reached linearly; None keeps it constant."""
    perturbation: Literal["flipout", "low_rank", "dense"] = "flipout"
    """Perturbation family."""
    base: Literal["rademacher", "gaussian"] = "rademacher"
    """Distribution of flipout's base matrices."""
    bases: int = 1
    """Base matrices per layer (flipout)."""
    rank: int = 1
    """Rank of each member's perturbation (low_rank)."""
    antithetic: bool = True
    """Evaluate each perturbation together with its negative."""
    shaping: Literal["ranks", "differences"] = "ranks"
    """Weights of the members: ranks over all members, or scaled differences of antithetic partners."""
    optimizer: Literal["adam", "sgd", "clipup"] = "adam"
    """Optimizer of the mean weights."""
    learning_rate: float = 0.02
    """Learning rate."""
    learning_rate_final: float | None = None
    """Learning rate at the end of the run, reached linearly; None keeps it constant."""
    momentum: float = 0.9
    """Momentum of the optimizer (beta1 of Adam)."""
    weight_decay: float = 0.0
    """Decoupled weight decay, as in AdamW."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            UserError: a value is out of range; the message names the option and the allowed values.
        """
        _check_values(self)
        for name in ("sigma", "learning_rate"):
            value, final = getattr(self, name), getattr(self, f"{name}_final")
            _require(math.isfinite(value) and value > 0, name, "greater than 0", value)
            if final is not None:
                _require(math.isfinite(final) and final >= 0, f"{name}_final", "0 or greater", final)
        if self.sigma_final is not None:
            _require(self.sigma_final > 0, "sigma_final", "greater than 0", self.sigma_final)
        _at_least_one(self, "bases", "rank")
        _require(self.population_size >= 2, "population_size", "at least 2", self.population_size)
        if self.antithetic:
            _require(self.population_size % 2 == 0, "population_size", "even (antithetic pairs)", self.population_size)
        if self.shaping == "differences":
            _require(self.antithetic, "shaping", "ranks without antithetic pairs", self.shaping)
        _require(0 <= self.momentum < 1, "momentum", "in [0, 1)", self.momentum)
        _non_negative(self, "weight_decay")

    def sigma_at(self, progress: float) -> float:
        """Return sigma at a given progress of the run, in [0, 1]."""
        return _linear(self.sigma, self.sigma_final, progress)

    def learning_rate_at(self, progress: float) -> float:
        """Return the learning rate at a given progress of the run, in [0, 1]."""
        return _linear(self.learning_rate, self.learning_rate_final, progress)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long to train."""

    seed: int = 0
    """Seed of all random numbers of the run."""
    generations: int | None = None
    """Stop after this many generations."""
    env_steps: int | None = None
    """Stop after the generation that reaches this many environment steps."""
    anneal_generations: int | None = None
    """Generation at which sigma, learning rate and episode cap reach their final values; None for the end of the run."""
    anneal_env_steps: int | None = None
    """Environment steps at which they do."""
    starts: int = 1
    """Independent starts, of which the one with the highest score goes on."""
    start_fraction: float = 0.05
    """Fraction of the run that each start gets, if there are several."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            UserError: a value is out of range; the message names the option and the allowed values.
        """
        _check_values(self)
        _require(0 <= self.seed < 2**63, "seed", "in [0, 2**63)", self.seed)
        _at_least_one_or_none(self, "generations", "env_steps", "anneal_generations", "anneal_env_steps")
        _at_least_one(self, "starts")
        leave = "starts leave" if self.starts > 1 else "start leaves"
        _require(
            0 < self.start_fraction * self.starts < 1,
            "start_fraction",
            f"in (0, {1 / self.starts:.3g}), so that {self.starts} {leave} a rest of the run",
            self.start_fraction,
        )

    def progress(self, generation: int, env_steps: int) -> float:
        """Return the completed fraction of the run, in [0, 1]: the larger of generations' and environment steps'."""
        return _fraction((generation, self.generations), (env_steps, self.env_steps))

    def annealed(self, generation: int, env_steps: int) -> float:
        """Return the completed fraction of the changes of sigma, learning rate and episode cap, in [0, 1]."""
        if self.anneal_generations is None and self.anneal_env_steps is None:
            return self.progress(generation, env_steps)
        return _fraction((generation, self.anneal_generations), (env_steps, self.anneal_env_steps))

    def extended(self, generations: int | None, env_steps: int | None) -> Schedule:
        """Return this schedule with another end; sigma, learning rate and episode cap change as if it were the same.

        Raises:
            UserError: a value is out of range.
        """
        changes = {"generations": generations, "env_steps": env_steps}
        if self.anneal_generations is None and self.anneal_env_steps is None:
            changes |= {"anneal_generations": self.generations, "anneal_env_steps": self.env_steps}
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Where and how to compute; these options do not change what is learned."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the policies; if there is a GPU, auto measures which is faster."""
    physics: Literal["auto", "cpu", "gpu"] = "auto"
    """Where environments are stepped; auto uses the device of the policies if the environment supports it."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """Fused Triton kernels or plain torch; auto uses Triton on CUDA."""
    precision: Literal["ieee", "tf32x3", "tf32", "bf16"] = "ieee"
    """Precision of matrix products in the Triton kernels; sums are always float32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Use torch.compile: on the CPU for the control step of environments written in torch, on a GPU for what surrounds
    MuJoCo's physics. Compiling takes about half a minute and needs a C++ compiler; auto compiles on the CPU if a run has
    at least 100,000 control steps (environment steps / parallel environments). The last bits of results then differ."""
    backend: Literal["local", "ray"] = "local"
    """This machine, or a Ray cluster."""
    worker_kind: Literal["engine", "classic"] = "engine"
    """What Ray workers run: this engine, or (classic) one policy at a time in one environment."""
    workers: int | None = None
    """Number of Ray workers; None for one per core, fewer for small populations."""
    ray_address: str | None = None
    """Ray cluster to join (host:port, ray://host:port or auto); None starts Ray on this machine."""
    threads: int | None = None
    """Physics threads (of each worker); None for one per core."""
    overlap: bool | None = None
    """Overlap physics and policy by double buffering (CPU physics); None to do so if it is faster."""
    slots: int | None = None
    """Environments stepped in parallel; None for one per episode, up to 1024 (physics on a GPU: up to its memory)."""
    row_block: int | None = None
    """Rows per policy forward; None for one per slot, up to 1024 (fewer for wide layers)."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            UserError: a value is out of range; the message names the option and the allowed values.
        """
        _check_values(self)
        _at_least_one_or_none(self, "workers", "threads", "slots", "row_block")
        if self.worker_kind == "classic":
            _require(self.backend == "ray", "worker_kind", "engine unless the backend is ray", self.worker_kind)
            _require(self.device != "cuda", "device", "cpu for classic workers, which have one core each", self.device)


@dataclass(frozen=True, kw_only=True)
class Logging:
    """Scores, checkpoints and trackers."""

    score_every: int = 10
    """Generations between two scores of the mean policy."""
    score_episodes: int = 16
    """Episodes per score during training."""
    evaluation_episodes: int = 100
    """Episodes of the final score, in the single Gymnasium environment."""
    checkpoint_every: int = 10
    """Generations between two checkpoints."""
    keep_checkpoints: int = 3
    """Number of checkpoints to keep."""
    track: tuple[str, ...] = ("tensorboard",)
    """Trackers: tensorboard, wandb, mlflow, trackio (extras of the same names), or module:Class for one's own."""
    video: Literal["off", "gif", "mp4"] = "off"
    """Render an episode of the best policy at the end, to video.gif or video.mp4 in the run directory (extra render)."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            UserError: a value is out of range; the message names the option and the allowed values.
        """
        _check_values(self)
        _at_least_one(self, *(field.name for field in dataclasses.fields(self) if field.name not in ("track", "video")))
        _require(len(set(self.track)) == len(self.track), "track", "different trackers", " ".join(self.track))

    @property
    def own_trackers(self) -> tuple[str, ...]:
        """The trackers that are classes of one's own."""
        return tuple(name for name in self.track if ":" in name)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that determines a training run."""

    task: Task
    policy: Policy = Policy()
    strategy: Strategy = Strategy()
    schedule: Schedule = Schedule()
    compute: Compute = Compute()
    logging: Logging = Logging()

    SUBJECTS: ClassVar[Mapping[str, type]] = {
        "task": Task,
        "policy": Policy,
        "strategy": Strategy,
        "schedule": Schedule,
        "compute": Compute,
        "logging": Logging,
    }

    def __post_init__(self) -> None:
        """Check values across subjects.

        Raises:
            UserError: options contradict each other.
        """
        if self.task.horizon is not None:
            _require(
                self.policy.kind != "recurrent", "policy", "mlp, linear or convnet with a horizon", self.policy.kind
            )
            kind = self.compute.worker_kind
            _require(kind == "engine", "worker_kind", "engine with a horizon", kind)

    @classmethod
    def of(cls, env_id: str, **fields: Any) -> TrainConfig:
        """Create a configuration from flat names, as in ``TrainConfig.of("Hopper-v5", sigma=0.05, policy="linear")``.

        Raises:
            UserError: an option is unknown, or a value is out of range.
        """
        own = _by_subject({"env_id": env_id, **fields})
        return cls(**{subject: kind(**own.get(subject, {})) for subject, kind in cls.SUBJECTS.items()})

    def replace(self, **fields: Any) -> TrainConfig:
        """Return a copy of this configuration with some values replaced, by flat names.

        Raises:
            UserError: an option is unknown, or a value is out of range.
        """
        changes = _by_subject(fields)
        return dataclasses.replace(
            self, **{subject: dataclasses.replace(getattr(self, subject), **own) for subject, own in changes.items()}
        )

    @classmethod
    def of_json(cls, values: Mapping[str, object]) -> TrainConfig:
        """Create a configuration from the arguments of :meth:`of` as parsed JSON, with type checks.

        Raises:
            UserError: an option is unknown, or a value has the wrong type or is out of range; the message names it.
        """
        fields = {}
        for name, value in values.items():
            subject, field = _place(name)
            try:
                fields[name] = schema.typed(value, typing.get_type_hints(cls.SUBJECTS[subject])[field], name)
            except schema.NOT_AS_EXPECTED as error:
                raise UserError(str(error)) from None
        return cls.of(**fields)

    def flat(self) -> dict[str, Any]:
        """Return all values by their flat names."""
        return {name: getattr(getattr(self, subject), field) for name, (subject, field) in PLACES.items()}

    def to_json(self) -> str:
        """Return the configuration as JSON text, with the version that wrote it."""
        return json.dumps({"version": es_flipout.__version__, **dataclasses.asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> TrainConfig:
        """Read the text that :meth:`to_json` wrote, also before the newest fields existed.

        Raises:
            UserError: the text is not a configuration of this version.
        """
        version: object = None
        try:
            values = schema.load_object(text)
            version = values.pop("version", None)
            schema.expect(values, cls.SUBJECTS)
            for subject, before in LATER_FIELDS.items():
                if isinstance(values[subject], dict):
                    values[subject] = {**before, **values[subject]}
            return cls(
                **{subject: schema.build(kind, values[subject], subject) for subject, kind in cls.SUBJECTS.items()}
            )
        except UserError:
            raise
        except schema.NOT_AS_EXPECTED as error:
            made_by = f" (es_flipout {version} wrote it)" if isinstance(version, str) else ""
            raise UserError(f"not a configuration of es_flipout {es_flipout.__version__}: {error}{made_by}") from None


def _places() -> dict[str, tuple[str, str]]:
    places: dict[str, tuple[str, str]] = {}
    for subject, kind in TrainConfig.SUBJECTS.items():
        for field in dataclasses.fields(kind):
            # The field ``kind`` of the subject "policy" has the flat name "policy".
            places["policy" if (subject, field.name) == ("policy", "kind") else field.name] = subject, field.name
    return places


PLACES: Mapping[str, tuple[str, str]] = types.MappingProxyType(_places())
"""Subject and field of every option, by its flat name."""


def _by_subject(fields: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Group values by subject and field."""
    own: dict[str, dict[str, Any]] = {}
    for name, value in fields.items():
        subject, field = _place(name)
        own.setdefault(subject, {})[field] = value
    return own


def _place(name: str) -> tuple[str, str]:
    """Return subject and field of an option."""
    if name not in PLACES:
        near = difflib.get_close_matches(name, PLACES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the options are {', '.join(PLACES)}"
        raise UserError(f"unknown option {name}; {hint}")
    return PLACES[name]
