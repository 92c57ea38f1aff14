"""``bench compare``: the classic strategy on Ray against this engine, on one task, in one run.

- ``classic_1 ... classic_n``: OpenAI-ES with ``n`` Ray workers, one core and one Gymnasium environment each
  (:mod:`es_flipout.bench.classic`).
- ``engine_cpu``, ``engine_cuda``: this engine on all cores of this machine, and on its GPU if there is one.
- ``engine_ray``: this engine on Ray, with one single-threaded worker per core of this machine.

All play generations of the same population size around the same mean policy (untrained, or that of a run) with the same
network, in :meth:`Trainer.generation` as ``es-flipout train`` runs it (ask, play, tell; no scoring). The learning rate
is so small that the policy stays the same. Episodes are not shortened. Only live environment steps count, and warm-up
is excluded; rounds are interleaved, and ratios are taken within a round.

One extra generation of each contender, which is not counted, gives the split of time: physics (``step`` and ``reset``
of the environment), policy (the rest of a worker's time), communication (the rest of the playing time: messages, and
waiting for the last worker) and update (ask and tell). The equivalent number of cores is the engine's rate divided by
that of one classic worker, which is the slope of a line fitted to all measured numbers of workers. Beyond the cores of
this machine it is an extrapolation, and the report says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import tyro
from rich.console import Console
from torch import Tensor

from es_flipout.bench.classic.player import ClassicPlayer, build_classic
from es_flipout.bench.compare_report import Prices, Splits, evaluate, plot, tables
from es_flipout.bench.contenders import STAGES, Contender, TimedEnv
from es_flipout.bench.timing import SideBySide, interleave, report
from es_flipout.cluster.connect import import_ray
from es_flipout.cluster.sharded import build_sharded
from es_flipout.config import TrainConfig
from es_flipout.envs.mujoco_cpu import usable_cores
from es_flipout.errors import UserError
from es_flipout.policies.observation_norm import ObservationNorm
from es_flipout.rollout.builder import Parts, Say, build
from es_flipout.training.run_directory import load_agent, read_config
from es_flipout.training.setup import Build, make_trainer
from es_flipout.training.trainer import Trainer

_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class CompareBench:
    """Compare the classic strategy on Ray with this engine, on one task."""

    env_id: Annotated[str, tyro.conf.arg(metavar="ENV_ID")]
    """Gymnasium id of the environment."""
    workers: str | None = None
    """Numbers of classic workers, such as 1,2,4; by default powers of two up to the number of cores."""
    devices: str | None = None
    """Devices of the engine: cpu, cuda or cpu,cuda; by default the CPU, and the GPU if there is one."""
    price_core_hour: float | None = None
    """Price of one core, in dollars per hour."""
    price_gpu_hour: float | None = None
    """Price of a machine with one GPU, in dollars per hour."""
    population_size: int = 512
    """Members per generation."""
    hidden: tuple[int, ...] = (64, 64)
    """Sizes of the hidden layers."""
    sigma: float = 0.03
    """Standard deviation of the perturbations."""
    env_kwargs: str = "{}"
    """Keyword arguments of gymnasium.make, as a JSON object."""
    run_dir: Path | None = None
    """Use the mean policy, network, sigma and environment of this run; by default the mean policy is untrained."""
    rounds: int = 3
    """Number of rounds; medians over rounds are shown."""
    seconds: float = 5.0
    """Duration of a measurement: whole generations for at least this long."""
    ray_address: str | None = None
    """Ray cluster to join; by default Ray is started on this machine."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Write ENV_ID.json (after every round) and ENV_ID.png to this folder (with a run: ENV_ID_RUN)."""

    def __post_init__(self) -> None:
        """Check the values that no other configuration checks.

        Raises:
            UserError: a value is out of range.
        """
        if self.rounds < 1:
            raise UserError(f"rounds must be at least 1, got {self.rounds}")
        if not self.seconds >= 0:
            raise UserError(f"seconds must be 0 or greater, got {self.seconds}")
        for name in ("price_core_hour", "price_gpu_hour"):
            price = getattr(self, name)
            if price is not None and not price > 0:
                raise UserError(f"{name.replace('_', '-')} must be greater than 0, got {price}")
        self.worker_counts()
        self.device_names()

    def worker_counts(self) -> tuple[int, ...]:
        """Return the numbers of classic workers in ascending order."""
        if self.workers is None:
            cores = usable_cores()
            return tuple(sorted({*(1 << k for k in range(cores.bit_length())), cores}))
        counts = {int(text) if text.strip().isdigit() else 0 for text in self.workers.split(",")}
        if min(counts) < 1:
            raise UserError(f"workers must be numbers such as 1,2,4, got {self.workers!r}")
        return tuple(sorted(counts))

    def file_name(self) -> str:
        """Return the name of the JSON file in the output folder."""
        of_run = [] if self.run_dir is None else [self.run_dir.name]
        return "_".join([self.env_id.replace("/", "_"), *of_run]) + ".json"

    def device_names(self) -> tuple[str, ...]:
        """Return the devices of the engine."""
        if self.devices is None:
            return _DEVICES if torch.cuda.is_available() else _DEVICES[:1]
        names = tuple(dict.fromkeys(text.strip() for text in self.devices.split(",")))
        if not set(names) <= set(_DEVICES):
            raise UserError(f"devices must be cpu, cuda or cpu,cuda, got {self.devices!r}")
        return names


class _Center(NamedTuple):
    """The mean policy of all contenders; ``module`` is None for an untrained one."""

    config: TrainConfig
    module: Mapping[str, Tensor] | None = None
    norm: Mapping[str, Tensor] | None = None

    def trainer(self, build: Build, **where: Any) -> Trainer:
        """Return a trainer that starts from this policy."""
        trainer = make_trainer(self.config.replace(**where), build=build)
        if self.module is not None:
            trainer.strategy.load_state_dict({**trainer.strategy.state_dict(), "module": self.module})
        if self.norm is not None:
            assert isinstance(trainer.agent.norm, ObservationNorm)
            trainer.agent.norm.load_state_dict(self.norm)
        return trainer


def run(options: CompareBench, console: Console) -> dict[str, Any]:
    """Measure, print tables, and return the JSON-serializable result.

    Raises:
        UserError: Ray is not installed, a GPU was requested but there is none, or the run cannot be compared.
    """
    import_ray()
    center = _center(options)
    contenders: list[Contender] = []
    try:
        with console.status("starting the workers"):
            _start(options, center, contenders)
        player = contenders[0].trainer.player
        assert isinstance(player, ClassicPlayer)
        # Only the name of the run directory is recorded: its path is private.
        named = asdict(options) | {"run_dir": None if options.run_dir is None else options.run_dir.name}
        path = None if options.out is None else options.out / options.file_name()
        prices = Prices(options.price_core_hour, options.price_gpu_hour)
        setting = _setting(options, center.config, player)

        def write(timings: SideBySide, splits: Splits) -> dict[str, Any]:
            results = setting | evaluate(contenders, timings, splits, prices, player.cores)
            return report("bench compare", named, {"compare": results}, path)

        with console.status(f"{options.env_id}: {options.rounds} rounds and one for warm-up"):
            measures = {each.name: each.measure(options.seconds) for each in contenders}
            unsplit: Splits = {each.name: dict.fromkeys(map(str, STAGES)) for each in contenders}
            timings = interleave(measures, options.rounds, after_round=lambda timings: write(timings, unsplit))
        with console.status("split of time"):
            whole = write(timings, {each.name: each.split() for each in contenders})
    finally:
        # The first trainer started Ray, so it is closed last.
        for trainer in reversed(list(dict.fromkeys(each.trainer for each in contenders))):
            trainer.close()
    results = whole["results"]["compare"]
    for warning in player.warnings:
        console.print(warning, style="yellow")
    for table in tables(results):
        console.print(table)
    for sentence in results["sentences"]:
        console.print(sentence)
    if path is not None:
        plot(results, path.with_suffix(".png"))
    return whole


def _setting(options: CompareBench, config: TrainConfig, player: ClassicPlayer) -> dict[str, Any]:
    return {
        "env_id": options.env_id,
        "env_kwargs": config.task.parsed_env_kwargs(),
        "population_size": config.strategy.population_size,
        "policy": {
            "kind": config.policy.kind,
            "hidden": config.policy.hidden,
            "sigma": config.strategy.sigma,
        },
        "mean_policy": "untrained" if options.run_dir is None else f"run {options.run_dir.name}",
        "rounds": options.rounds,
        "cores": usable_cores(),
        "warnings": list(player.warnings),
    }


def _start(options: CompareBench, center: _Center, contenders: list[Contender]) -> None:
    """Start all contenders; they are appended one by one, so that the caller can close them if one fails to start."""
    counts, cores = options.worker_counts(), usable_cores()
    address = {"ray_address": options.ray_address}
    classic = center.trainer(build_classic, backend="ray", worker_kind="classic", workers=max(counts), **address)
    contenders += [Contender(f"classic_{n}", classic, n, n) for n in counts]
    for device in options.device_names():
        contenders.append(Contender(f"engine_{device}", center.trainer(_build_timed, device=device), cores))
        if device == "cpu":
            # Only one contender runs at a time and idle workers use no CPU, so these need no cores of their own.
            where: dict[str, Any] = {"device": device, "backend": "ray", "workers": cores, "threads": 1, **address}
            contenders.append(Contender("engine_ray", center.trainer(_build_unreserved, **where), cores))


def _build_timed(config: TrainConfig, say: Say) -> Parts:
    return build(config, say, wrap_env=TimedEnv)


def _build_unreserved(config: TrainConfig, say: Say) -> Parts:
    del say
    return build_sharded(config, reserve_cores=False)


def _center(options: CompareBench) -> _Center:
    common: dict[str, Any] = {
        "population_size": options.population_size,
        "learning_rate": 1e-12,
        "learning_rate_final": None,
        "sigma_final": None,
        "weight_decay": 0.0,
        "episodes": 1,
        "episode_cap": None,
        "generations": 2**31,
        "env_steps": None,
        "slots": None,
        "compile": "off",  # the time that physics takes can only be measured beside a policy that is not compiled with it
        "threads": None,
    }
    if options.run_dir is None:
        given = {name: getattr(options, name) for name in ("env_kwargs", "hidden", "sigma")}
        return _Center(TrainConfig.of(options.env_id, **given, **common))
    config = read_config(options.run_dir, trust=True)  # the user named the environment, and nothing was imported yet
    if config.task.env_id != options.env_id:
        raise UserError(f"{options.run_dir} is a run of {config.task.env_id}, not of {options.env_id}")
    agent, _ = load_agent(options.run_dir, trust=True)
    here: dict[str, Any] = {"backend": "local", "worker_kind": "engine", "workers": None, "physics": "auto"}
    norm = agent.norm.state_dict() if isinstance(agent.norm, ObservationNorm) else None
    return _Center(config.replace(**common, **here), agent.module.state_dict(), norm)
