"""Memory of a run, predicted before it runs; and the number of slots that fit into memory.

Everything a run stores is linear in its members and slots. Therefore the objects of the run are created in three small
sizes, the bytes they store are counted, and the rest is a linear extrapolation. Plans for a GPU that are made without
one count plain torch; the kernels need an eighth of the memory for signs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from es_flipout.config import TrainConfig
from es_flipout.envs import BatchEnv, make_env
from es_flipout.envs.make import NAMESPACE
from es_flipout.envs.observed import observe
from es_flipout.errors import UserError
from es_flipout.policies.agent import parameter_shapes
from es_flipout.rollout.builder import backend_of, make_agent, make_one_env, make_strategy, row_block_of, slots_for
from es_flipout.rollout.device import DeviceRollout
from es_flipout.rollout.episodes import MOMENT_JOBS, Episodes
from es_flipout.rollout.memory import show_bytes, stored_bytes

_SMALL_MEMBERS, _SMALL_SLOTS = 64, 32  # fewer slots than members, so that slots are refilled
_USED_OF_FREE = 0.9  # the rest is for fragmentation, libraries and other processes
_DOUBT = 8  # a run that may need this many times its lower bound is planned
_MOST_BYTES_OF_A_SLOT = 1 << 20
_MOST_SLOTS = 1 << 16  # more do not speed up physics on a GPU
# About as many slots keep a GPU busy, so that fewer steps, rather than fewer slots, shorten a generation.
BUSY_SLOTS = {"torch": _MOST_SLOTS, "mujoco": 1 << 13}
_FLOAT, _DOUBLE = 4, 8
_OPTIMIZER_COPIES = {"adam": 2, "sgd": 1, "clipup": 1}
_DRAW_BYTES = 72  # temporary memory per random number: drawing one takes a few 64-bit words
_STEP_BYTES = 12  # temporary memory per number of a layer's output or an observation


@dataclass(frozen=True)
class Plan:
    """The memory of a run.

    Attributes:
        env_id, device, physics: environment and placement.
        population_size, episodes: members, and episodes per member.
        slots: environments stepped in parallel.
        row_block, blocks: rows per policy forward, and number of forwards per step of all slots.
        parts: bytes by purpose.
        free: free bytes on the device (or this machine); None if unknown.
    """

    env_id: str
    device: str
    physics: str
    population_size: int
    episodes: int
    slots: int
    row_block: int
    blocks: int
    parts: dict[str, int]
    free: int | None

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, object]:
        """Return the plan as printed by ``es-flipout plan --json``."""
        return {**dataclasses.asdict(self), "total": self.total}


def make_plan(config: TrainConfig) -> Plan:
    """Predict the memory of a run whose device and physics are decided.

    Raises:
        UserError: the run does not fit into memory, even with one slot.
    """
    model, compute = _Model(config), config.compute
    slots = model.device_slots() if compute.slots is None and compute.physics == "gpu" else slots_for(config)
    row_block = row_block_of(config, model.module) or slots
    return Plan(
        env_id=config.task.env_id,
        device=compute.device,
        physics=compute.physics,
        population_size=config.strategy.population_size,
        episodes=config.task.episodes,
        slots=slots,
        row_block=row_block,
        blocks=-(-slots // row_block),
        parts=model.parts(slots, row_block),
        free=free_bytes(compute.device),
    )


def device_slots(config: TrainConfig) -> int:
    """Return the number of slots for physics on a GPU, from the free memory of the device.

    That is one per episode if they fit, and otherwise as many as play all episodes in equal turns. Where episodes can
    end early, there are fewer slots than episodes, but enough to keep the GPU busy: a slot whose episode ends takes
    the next one, while one without a next episode is stepped in vain until the longest episode ends
    (results/occupancy_* shows the difference).

    Raises:
        UserError: not even one slot fits.
    """
    return _Model(config).device_slots()


def slots_in_turns(jobs: int, fits: int, busy: int | None) -> int:
    """Return the slots that play ``jobs`` episodes in equal turns.

    Args:
        jobs: episodes.
        fits: the largest possible number of slots.
        busy: where episodes can end early, the number of slots below which turns are not worth it; otherwise None.
    """
    turns = -(-jobs // fits)
    if busy is not None:
        turns = max(turns, jobs // busy)
    return -(-jobs // turns)


def require_memory(config: TrainConfig) -> None:
    """Check that a run on the CPU fits into memory, before anything large is created.

    The sizes of the tensors that every run needs give a lower bound; only if that leaves doubt, a plan is made.

    Raises:
        UserError: the run does not fit.
    """
    free = free_bytes("cpu")
    if free is None or config.compute.physics == "gpu":
        return
    env = make_one_env(config)
    try:
        shapes = parameter_shapes(config, env.observation_space, env.action_space, env.observation_shape)
        obs_dim = env.observation_space.shape[0]
    finally:
        env.close()
    strategy, slots = config.strategy, slots_for(config)
    numbers = sum(shape.numel() for shape in shapes)
    vectors = sum(shape.numel() for shape in shapes if len(shape) == 1)
    members = strategy.population_size
    sources = members // (2 if strategy.antithetic else 1)
    match strategy.perturbation:
        case "flipout":
            noise = sources * vectors + strategy.bases * numbers
        case "low_rank":
            noise = sources * (vectors + strategy.rank * sum(sum(shape[:2]) for shape in shapes if len(shape) > 1))
        case "dense":
            noise = sources * numbers
    jobs = max(members * config.task.episodes, config.logging.score_episodes)
    copies = 2 + _OPTIMIZER_COPIES[strategy.optimizer]
    least = _FLOAT * (copies * numbers + noise + slots * obs_dim) + 4 * _DOUBLE * jobs
    most = _DOUBT * least + _MOST_BYTES_OF_A_SLOT * max(slots, config.compute.row_block or 0)
    if least <= free and most > free and config.compute.backend == "local":
        least = make_plan(config).total
    if least > free:
        raise UserError(
            f"{config.task.env_id} with {members} members, a policy of {numbers:,} parameters and {slots} parallel "
            f"environments needs at least {show_bytes(least)}, but only {show_bytes(free)} of memory are free; "
            "es-flipout plan shows what needs how much"
        )


def free_bytes(device: str) -> int | None:
    """Return the free memory on ``cpu`` or ``cuda``; None if it cannot be determined."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return None


class _Line(NamedTuple):
    """Bytes as a linear function of members and slots."""

    fixed: float
    per_member: float
    per_slot: float

    @classmethod
    def through(cls, small: int, more_members: int, more_slots: int) -> _Line:
        """Fit the bytes of a small run, of one with twice the members and of one with twice the slots."""
        per_member, per_slot = (more_members - small) / _SMALL_MEMBERS, (more_slots - small) / _SMALL_SLOTS
        return cls(small - per_member * _SMALL_MEMBERS - per_slot * _SMALL_SLOTS, per_member, per_slot)

    def at(self, members: int, slots: int) -> int:
        """Return the bytes of a run."""
        return max(round(self.fixed + self.per_member * members + self.per_slot * slots), 0)


def _counting_device() -> torch.device:
    """Return where the objects of a run on a GPU are counted: most of them store the same on any other device."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class _Model:
    """The bytes of a run as a function of its slots.

    Attributes:
        module: the policy.
        terminates: see :class:`es_flipout.envs.BatchEnv`.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._on_gpu = config.compute.physics == "gpu"
        self._device = _counting_device() if self._on_gpu else torch.device("cpu")
        sizes = [(_SMALL_MEMBERS, _SMALL_SLOTS), (2 * _SMALL_MEMBERS, _SMALL_SLOTS), (_SMALL_MEMBERS, 2 * _SMALL_SLOTS)]
        counted = [self._counted(members, slots) for members, slots in sizes]
        self._lines = {name: _Line.through(*(one[name] for one in counted)) for name in counted[0]}

    def _counted(self, members: int, slots: int) -> dict[str, int]:
        """Count the bytes that the objects of a small run store."""
        kernels = self._config.compute.kernels if self._device.type == "cuda" else "torch"
        config = self._config.replace(population_size=members, row_block=1, kernels=kernels)
        env = self._env(slots)
        try:
            agent = make_agent(config, env)
            self.module, self._obs_dim = agent.module, env.observation_space.shape[0]
            self.terminates = env.terminates
            population = make_strategy(config, agent.module, self._device).ask()
            stored = stored_bytes(population)
            chosen = torch.arange(slots, device=population.device)
            found = {
                "perturbations": stored,
                "selection": stored_bytes(population, population.select(chosen)) - stored,
                "environments": stored_bytes(env),
            }
            if self._on_gpu:
                episodes = Episodes(torch.zeros(members, config.task.episodes, dtype=torch.int64))
                kept = DeviceRollout(env, agent, population, episodes)  # pyright: ignore[reportArgumentType]
                found["slots and queue"] = stored_bytes(*kept.stored())
                found["working memory of the physics"] = getattr(env, "temporary_bytes", int)()
            return found
        finally:
            env.close()

    def _env(self, slots: int) -> BatchEnv:
        task = self._config.task
        if self._on_gpu and backend_of(self._config) == "mujoco" and self._device.type == "cpu":
            return _warp_env(self._config, slots)
        kwargs = task.parsed_env_kwargs()
        return make_env(task.env_id, slots, self._device, threads=1, observed=task.observed, **kwargs)

    def parts(self, slots: int, row_block: int) -> dict[str, int]:
        """Return bytes by purpose."""
        config, members = self._config, self._config.strategy.population_size
        at = {name: line.at(members, slots) for name, line in self._lines.items()}
        jobs = members * config.task.episodes
        moments = 2 * _DOUBLE * self._obs_dim * min(jobs, MOMENT_JOBS) if config.policy.observation_norm else 0
        observed = min(slots, MOMENT_JOBS) if self._on_gpu else slots
        sums = 2 * _DOUBLE * self._obs_dim * observed if config.policy.observation_norm else 0
        numbers = [parameter.numel() for parameter in self.module.parameters()]
        parts = {
            "mean, gradient and optimizer": (2 + _OPTIMIZER_COPIES[config.strategy.optimizer]) * _FLOAT * sum(numbers),
            "perturbations": at["perturbations"],
        }
        if self._on_gpu:
            parts["perturbations, second buffer"] = at["perturbations"]
        rows = -(-slots // row_block) * row_block
        parts["selection"] = self._lines["selection"].at(members, rows)
        if self._on_gpu:
            parts["slots and queue"] = at["slots and queue"] + sums + moments
        else:
            parts["slots and queue"] = 4 * _DOUBLE * (slots + jobs) + sums + moments
        parts["environments"] = at["environments"]
        parts["working memory"] = self._working(max(slots, row_block))  # of a block, whose last rows may be padding
        if self._on_gpu:
            parts["working memory of the physics"] = at["working memory of the physics"]
            parts["CUDA graphs"] = self._step(slots)  # their pool keeps the temporary memory of a step
        return parts

    def _working(self, rows: int) -> int:
        """Return the peak of temporary memory: to draw the noise of the largest parameter, or for a policy forward."""
        strategy = self._config.strategy
        sources = strategy.population_size // (2 if strategy.antithetic else 1)
        dense = strategy.perturbation == "dense"
        drawn = max(p.numel() if dense or p.ndim == 1 else 0 for p in self.module.parameters()) * sources
        return max(_DRAW_BYTES * drawn, self._step(rows))

    def _step(self, rows: int) -> int:
        """Return the temporary memory of a policy forward."""
        widths = self._obs_dim + sum(p.shape[0] for p in self.module.parameters() if p.ndim > 1)
        return _STEP_BYTES * widths * rows

    def device_slots(self) -> int:
        """See :func:`device_slots`."""
        jobs = self._config.strategy.population_size * self._config.task.episodes
        busy = BUSY_SLOTS[backend_of(self._config)] if self.terminates else None
        return slots_in_turns(jobs, self._slots_that_fit(min(jobs, _MOST_SLOTS)), busy)

    def _slots_that_fit(self, most: int) -> int:
        """Return the largest number of slots, up to ``most``, that fits into the free memory of the device."""
        population_size, task = self._config.strategy.population_size, self._config.task
        free = free_bytes(self._config.compute.device)
        if free is None:
            return most
        room = _USED_OF_FREE * free

        def total(slots: int) -> int:
            return sum(self.parts(slots, slots).values())

        if total(1) > room:
            raise UserError(
                f"{task.env_id} with {population_size} members needs {total(1) / 2**30:.1f} GiB even "
                f"with one environment at a time, but only {free / 2**30:.1f} GiB are free; reduce --population-size"
            )
        fits, too_many = 1, most + 1
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if total(middle) <= room:
                fits = middle
            else:
                too_many = middle
        return fits


def _warp_env(config: TrainConfig, slots: int) -> BatchEnv:
    """Create the GPU backend of MuJoCo on the CPU, to count its memory without a GPU."""
    try:
        from es_flipout.envs.mujoco_gpu import make_warp_env
    except ImportError as error:
        needed = "pip install 'es-flipout[gpu]'"
        raise UserError(f"{config.task.env_id} on the GPU requires mujoco-warp: {needed} ({error})") from None
    task = config.task
    env = make_warp_env(task.env_id.removeprefix(NAMESPACE), slots, "cpu", **task.parsed_env_kwargs())
    return env if task.observed is None else observe(env, task.observed)
