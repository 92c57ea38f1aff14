"""The configuration of a training run: one frozen dataclass, checked when made. Imports no torch."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from es_flipout.errors import UserError

_NOT_ENV_KWARGS = frozenset({"env_id", "id", "num_envs", "threads", "device", "vectorization_mode", "observed"})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that determines a training run."""

    env_id: Annotated[str, tyro.conf.arg(metavar="ENV_ID")]
    """Gymnasium id of the environment."""
    env_kwargs: str = "{}"
    """Keyword arguments of gymnasium.make, as a JSON object."""
    seed: int = 0
    """All randomness of the run follows from it."""

    generations: int | None = None
    """Stop after this many generations."""
    env_steps: int | None = None
    """Stop after the generation that reaches this many environment steps."""

    population_size: int = 128
    """Members of a generation."""
    episodes: int = 1
    """Episodes that every member plays in a generation."""
    sigma: float = 0.03
    """Standard deviation of the perturbations."""
    sigma_final: float | None = None
    """Sigma at the end of the run, reached linearly; by default sigma stays."""
    perturbation: Literal["flipout", "low_rank", "dense"] = "flipout"
    """Perturbation family."""
    base: Literal["rademacher", "gaussian"] = "rademacher"
    """Entries of flipout's base matrices."""
    bases: int = 1
    """Base matrices for each layer (flipout)."""
    rank: int = 1
    """Rank of each member's perturbation (low_rank)."""
    antithetic: bool = True
    """Evaluate every perturbation together with its negative."""

    optimizer: Literal["adam", "sgd", "clipup"] = "adam"
    """Optimiser of the mean weights."""
    learning_rate: float = 0.02
    """Step size."""
    learning_rate_final: float | None = None
    """Step size at the end of the run, reached linearly; by default it stays."""
    momentum: float = 0.9
    """Momentum of the optimiser (beta1 of Adam)."""
    weight_decay: float = 0.0
    """Decoupled weight decay: each step shrinks the weights by learning rate times this."""

    policy: Literal["mlp", "linear", "recurrent", "convnet"] = "mlp"
    """Kind of policy network."""
    hidden: tuple[int, ...] = (64, 64)
    """Hidden layer sizes (of a recurrent policy: of its recurrent layers)."""
    activation: Literal["tanh", "relu", "elu", "silu", "gelu"] = "tanh"
    """Activation of the hidden layers (a recurrent policy has its own)."""
    cell: Literal["gru", "lstm"] = "gru"
    """Cell of a recurrent policy."""
    channels: tuple[int, ...] = (16, 32)
    """Channels of a convolutional policy's layers, each of stride 2."""
    output_gain: float = 0.1
    """Scale of the network's last layer at the start."""
    squash: Literal["clip", "tanh"] = "clip"
    """How outputs are brought into a bounded action space."""

    observed: tuple[int, ...] | None = None
    """Entries of the observation that the policy sees, for instance 0 2; by default all."""
    observation_norm: bool = True
    """Normalise observations by their running mean and standard deviation (images: by the bounds of their space)."""
    remove_alive_bonus: bool = True
    """Leave the bonus for merely being alive out of what is trained on (returns that are reported keep it)."""
    start_states: Literal["pair", "generation"] = "pair"
    """Who shares start states: antithetic partners, or all members of a generation."""
    episode_cap: int | None = None
    """End training episodes after this many steps at the start of the run; the cap grows to the environment's limit."""
    episode_cap_until: float = 0.5
    """Fraction of the run after which the cap is gone."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where policies are computed; auto measures what is faster, where there is a GPU."""
    physics: Literal["auto", "cpu", "gpu"] = "auto"
    """Where environments are stepped; auto follows the device where there is an implementation for it."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """Fused Triton kernels or plain torch for the policies; auto takes Triton on CUDA."""
    precision: Literal["ieee", "tf32x3", "tf32", "bf16"] = "ieee"
    """Precision of the products in the Triton kernels; sums are always float32."""
    backend: Literal["local", "ray"] = "local"
    """One machine, or a Ray cluster."""
    worker_kind: Literal["engine", "classic"] = "engine"
    """What a Ray worker does: this engine on a share of the population, or one policy at a time in one environment."""
    workers: int | None = None
    """Ray workers; by default one for each core, or fewer with more threads where the population is small."""
    ray_address: str | None = None
    """Ray cluster to join (host:port, ray://host:port or auto); by default Ray is started on this machine."""
    threads: int | None = None
    """Physics threads (of each worker); by default one for each core."""
    overlap: bool | None = None
    """Let the physics of one half of the environments run while the policy serves the other (MuJoCo on the CPU); by
    default where there are more than two cores."""
    slots: int | None = None
    """Environments stepped side by side; by default enough for the population, up to 1024."""
    row_block: int | None = None
    """Rows of one policy computation; by default one for each slot, up to 1024 (fewer for wide layers)."""

    score_every: int = 10
    """Generations between two scorings of the mean policy."""
    score_episodes: int = 16
    """Episodes of each scoring during training."""
    evaluation_episodes: int = 100
    """Episodes of the final score, in the real single Gymnasium environment."""
    checkpoint_every: int = 10
    """Generations between two checkpoints."""
    keep_checkpoints: int = 3
    """Checkpoints that are kept."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            UserError: a value is out of range; the message names it and says what would be right.
        """
        for name in ("sigma", "learning_rate"):
            value, final = getattr(self, name), getattr(self, f"{name}_final")
            _require(math.isfinite(value) and value > 0, name, "greater than 0", value)
            if final is not None:
                _require(math.isfinite(final) and final >= 0, f"{name}_final", "0 or greater", final)
        if self.sigma_final is not None:
            _require(self.sigma_final > 0, "sigma_final", "greater than 0", self.sigma_final)
        for name, hint in typing.get_type_hints(type(self)).items():
            if typing.get_origin(hint) is Literal:
                choices = typing.get_args(hint)
                _require(getattr(self, name) in choices, name, f"one of {', '.join(choices)}", getattr(self, name))
        positive = ("episodes", "bases", "rank", "score_every", "score_episodes", "evaluation_episodes")
        for name in (*positive, "checkpoint_every", "keep_checkpoints"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("generations", "env_steps", "workers", "threads", "slots", "row_block", "episode_cap"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, "at least 1", value)
        if self.worker_kind == "classic":
            _require(self.backend == "ray", "worker_kind", "engine for any backend but ray", self.worker_kind)
            _require(self.device != "cuda", "device", "cpu for classic workers, which have one core each", self.device)
        _require(0 <= self.seed < 2**63, "seed", "in [0, 2**63)", self.seed)
        _require(self.population_size >= 2, "population_size", "at least 2", self.population_size)
        if self.antithetic:
            _require(self.population_size % 2 == 0, "population_size", "even (antithetic pairs)", self.population_size)
        _require(all(size >= 1 for size in self.hidden), "hidden", "layer sizes of at least 1", self.hidden)
        _require(all(size >= 1 for size in self.channels), "channels", "numbers of at least 1", self.channels)
        for name, policy in (("hidden", "recurrent"), ("channels", "convnet")):
            if self.policy == policy:
                _require(len(getattr(self, name)) >= 1, name, f"at least one size for a {policy} policy", "none")
        if self.observed is not None:
            _require(all(entry >= 0 for entry in self.observed), "observed", "numbers of entries from 0", self.observed)
        _require(0 <= self.momentum < 1, "momentum", "in [0, 1)", self.momentum)
        for name in ("weight_decay", "output_gain"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value >= 0, name, "0 or greater", value)
        _require(0 < self.episode_cap_until <= 1, "episode_cap_until", "in (0, 1]", self.episode_cap_until)
        self.parsed_env_kwargs()

    def parsed_env_kwargs(self) -> dict[str, Any]:
        """``env_kwargs`` as a dictionary."""
        try:
            parsed = json.loads(self.env_kwargs)
        except json.JSONDecodeError as error:
            raise UserError(f"env_kwargs must be a JSON object, got {self.env_kwargs!r} ({error})") from None
        _require(isinstance(parsed, dict), "env_kwargs", 'a JSON object such as {"healthy_reward": 2}', self.env_kwargs)
        for name in _NOT_ENV_KWARGS & parsed.keys():
            raise UserError(f"env-kwargs must be keyword arguments of gymnasium.make, and {name} is none")
        return parsed

    def progress(self, generation: int, env_steps: int) -> float:
        """How much of the run is done, in [0, 1]: the larger of the fractions of generations and of environment steps."""
        done = 0.0
        if self.generations is not None:
            done = max(done, generation / self.generations)
        if self.env_steps is not None:
            done = max(done, env_steps / self.env_steps)
        return min(done, 1.0)

    def sigma_at(self, progress: float) -> float:
        """Sigma when ``progress`` of the run is done."""
        return _linear(self.sigma, self.sigma_final, progress)

    def learning_rate_at(self, progress: float) -> float:
        """Learning rate when ``progress`` of the run is done."""
        return _linear(self.learning_rate, self.learning_rate_final, progress)

    def episode_cap_at(self, progress: float, limit: int | None) -> int | None:
        """The cap on training episodes when ``progress`` of the run is done; None where there is none.

        Args:
            progress: in [0, 1].
            limit: the environment's own time limit.
        """
        if self.episode_cap is None or progress >= self.episode_cap_until:
            return None
        if limit is None:
            return self.episode_cap
        return round(_linear(self.episode_cap, limit, progress / self.episode_cap_until))

    def to_json(self) -> str:
        """The configuration as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> TrainConfig:
        """The configuration that :meth:`to_json` wrote.

        Raises:
            UserError: the text is not a configuration of this version.
        """
        try:
            values = json.loads(text)
            missing = [field.name for field in dataclasses.fields(cls) if field.name not in values]
            if missing:
                raise TypeError(f"it has no {', '.join(missing)}")
            # JSON has no tuples.
            arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            return cls(**arguments)
        except (json.JSONDecodeError, TypeError, AttributeError) as error:
            raise UserError(f"not a configuration of this version of es_flipout: {error}") from None


def _require(condition: bool, name: str, need: str, value: object) -> None:
    if not condition:
        raise UserError(f"{name.replace('_', '-')} must be {need}, got {value}")


def _linear(start: float, end: float | None, progress: float) -> float:
    return start if end is None else start + (end - start) * progress
