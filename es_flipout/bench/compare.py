"""``bench compare``: the classic strategy on Ray against this engine, on one task, in one run.

- ``classic_1 ... classic_n``: OpenAI-ES with ``n`` Ray workers, one core and one Gymnasium environment each
  (:mod:`es_flipout.cluster.classic`).
- ``engine_cpu``, ``engine_cuda``: this engine on all cores of this machine, and on its GPU where there is one.
- ``engine_ray``: this engine on Ray, a worker with one thread for each core of this machine.

All play generations of the same population size around the same mean policy (untrained, or that of a run) with the same
network, in :meth:`Trainer.generation` as ``es-flipout train`` runs it (ask, play, tell; no scoring), with a learning rate so
small that the policy stays the same. Episodes end when they end. Counted are live environment steps; warm-up is left out; the
rounds are interleaved, and ratios are taken round by round.

Where the time goes is measured in one more generation of each, which is not counted: physics (``step`` and ``reset`` of the
environment), policy (the rest of what a worker does), communication (what remains of the playing: messages, and waiting for the
last worker) and update (ask and tell). The equivalent number of cores is the engine's
rate divided by that of one classic worker, the slope of a line through all measured numbers of workers; beyond the cores of this
machine that is extrapolated, and the report says so.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from es_flipout.bench.timing import Measure, SideBySide, Spread, interleave, report, timed
from es_flipout.cluster.classic import ClassicPlayer
from es_flipout.cluster.connect import import_ray
from es_flipout.cluster.sharded import ShardedPlayer
from es_flipout.config import TrainConfig
from es_flipout.envs import BatchEnv
from es_flipout.envs.mujoco_cpu import usable_cores
from es_flipout.errors import UserError
from es_flipout.observation_norm import ObservationNorm
from es_flipout.player import LocalPlayer
from es_flipout.trainer import Trainer, load_agent

_DEVICES = ("cpu", "cuda")
_PARTS = ("physics", "policy", "communication", "update")
_PART_COLORS = ("#4477aa", "#ccbb44", "#ee6677", "#228833")


@dataclass(frozen=True, kw_only=True)
class CompareBench:
    """The classic strategy on Ray against this engine, on one task, in one run."""

    env_id: Annotated[str, tyro.conf.arg(metavar="ENV_ID")]
    """Gymnasium id of the environment."""
    workers: str | None = None
    """Numbers of classic workers, for instance 1,2,4; by default powers of two up to the cores there are."""
    devices: str | None = None
    """Devices of the engine, cpu,cuda; by default the CPU, and the GPU where there is one."""
    price_core_hour: float | None = None
    """What one core costs an hour."""
    price_gpu_hour: float | None = None
    """What a machine with one GPU costs an hour."""
    population_size: int = 512
    """Members of a generation."""
    hidden: tuple[int, ...] = (64, 64)
    """Hidden layer sizes."""
    sigma: float = 0.03
    """Standard deviation of the perturbations."""
    env_kwargs: str = "{}"
    """Keyword arguments of gymnasium.make, as a JSON object."""
    run_dir: Path | None = None
    """Play around the mean policy of this run, with its network, sigma and environment; by default it is untrained."""
    rounds: int = 3
    """Rounds; medians of them are shown."""
    seconds: float = 5.0
    """One measurement takes whole generations for at least this long."""
    ray_address: str | None = None
    """Ray cluster to join; by default Ray is started on this machine."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Write ENV_ID.json and ENV_ID.png (of a run: ENV_ID_RUN) to this folder."""

    def __post_init__(self) -> None:
        """Check what no other configuration checks.

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
        """Numbers of classic workers, ascending."""
        if self.workers is None:
            cores = usable_cores()
            return tuple(sorted({*(1 << k for k in range(cores.bit_length())), cores}))
        counts = {int(text) if text.strip().isdigit() else 0 for text in self.workers.split(",")}
        if min(counts) < 1:
            raise UserError(f"workers must be numbers such as 1,2,4, got {self.workers!r}")
        return tuple(sorted(counts))

    def file_name(self) -> str:
        """Of the JSON file in the folder that was given."""
        of_run = [] if self.run_dir is None else [self.run_dir.name]
        return "_".join([self.env_id.replace("/", "_"), *of_run]) + ".json"

    def device_names(self) -> tuple[str, ...]:
        """Devices of the engine."""
        if self.devices is None:
            return _DEVICES if torch.cuda.is_available() else _DEVICES[:1]
        names = tuple(dict.fromkeys(text.strip() for text in self.devices.split(",")))
        if not set(names) <= set(_DEVICES):
            raise UserError(f"devices must be cpu, cuda or cpu,cuda, got {self.devices!r}")
        return names


class PowerLaw(NamedTuple):
    """``rate = factor * workers ** exponent``."""

    factor: float
    exponent: float

    def workers_for(self, rate: float) -> float:
        """Workers that reach a rate."""
        return (rate / self.factor) ** (1 / self.exponent)


def rate_per_worker(workers: Sequence[int], rates: Sequence[float]) -> float:
    """The slope of the line through the origin that fits best (least squares)."""
    n, y = np.asarray(workers, np.float64), np.asarray(rates, np.float64)
    return float((n * y).sum() / (n * n).sum())


def power_law(workers: Sequence[int], rates: Sequence[float]) -> PowerLaw | None:
    """The power law that fits best in logarithms (least squares); None for fewer than two numbers of workers."""
    if len(set(workers)) < 2:
        return None
    exponent, intercept = np.polyfit(np.log(workers), np.log(rates), 1)
    return PowerLaw(float(np.exp(intercept)), float(exponent))


def dollars(rate: float, price_hour: float) -> float:
    """What 10^9 steps cost at ``rate`` steps per second."""
    return 1e9 / rate / 3600 * price_hour


@dataclass
class _Contender:
    """One that is measured.

    Attributes:
        name: as in the report.
        trainer: plays the generations.
        cores: of the CPU that it uses.
        workers: classic Ray workers; None for this engine.
        lengths: mean episode length of every counted generation.
    """

    name: str
    trainer: Trainer
    cores: int
    workers: int | None = None

    def __post_init__(self) -> None:
        self.lengths: list[float] = []

    def measure(self, seconds: float) -> Measure:
        """Measures live environment steps of whole generations."""

        def play() -> int:
            self._choose_workers()
            started, steps = time.perf_counter(), 0
            while steps == 0 or time.perf_counter() - started < seconds:
                rollout = self.trainer.generation()
                steps += rollout.env_steps
                self.lengths.append(float(rollout.lengths.double().mean()))
            return steps

        return lambda: timed(play)

    def split(self) -> dict[str, float | None]:
        """Fractions of one generation's time, measured from outside; None for what cannot be told apart."""
        self._choose_workers()
        player = self.trainer.player
        if isinstance(player, ClassicPlayer):
            return self._classic_split(player)
        if isinstance(player, LocalPlayer) and self.trainer.device.type == "cpu":
            return self._engine_split(player)
        whole, playing = self._generation()
        return dict(zip(_PARTS, (None, None, None, 1 - playing / whole), strict=True))

    def _classic_split(self, player: ClassicPlayer) -> dict[str, float | None]:
        player.profile = True
        try:
            whole, playing = self._generation()
        finally:
            player.profile = False
        times = player.times
        physics = (times.step + times.reset) / player.active
        busy = times.busy / player.active
        seconds = (physics, busy - physics, playing - busy, whole - playing)
        return {name: value / whole for name, value in zip(_PARTS, seconds, strict=True)}

    def _engine_split(self, player: LocalPlayer) -> dict[str, float | None]:
        own = player.envs
        clocks = [_TimedEnv(env) for env in own]
        player.envs = list[BatchEnv](clocks)
        try:
            whole, playing = self._generation()
        finally:
            player.envs = own
        # Where the physics of one half overlaps with the policy of the other, what is not hidden is the policy's.
        physics = min(sum(clock.seconds for clock in clocks) / len(clocks), playing)
        seconds = (physics, playing - physics, 0.0, whole - playing)
        return {name: value / whole for name, value in zip(_PARTS, seconds, strict=True)}

    def _generation(self) -> tuple[float, float]:
        """Seconds of a generation, and of its playing."""
        player = self.trainer.player
        play, playing = player.play, 0.0

        def timed_play(*args: Any, **kwargs: Any) -> Any:
            nonlocal playing
            started = time.perf_counter()
            rollout = play(*args, **kwargs)
            playing = time.perf_counter() - started
            return rollout

        player.play = timed_play
        started = time.perf_counter()
        try:
            self.trainer.generation()
        finally:
            del player.play
        return time.perf_counter() - started, playing

    def _choose_workers(self) -> None:
        if self.workers is not None:
            assert isinstance(self.trainer.player, ClassicPlayer)
            self.trainer.player.active = self.workers


class _TimedEnv(BatchEnv):
    """An environment that adds up the seconds of its steps and resets."""

    def __init__(self, env: BatchEnv) -> None:
        for name in BatchEnv.__annotations__:
            if name != "diverged":
                setattr(self, name, getattr(env, name))
        self._env = env
        self.seconds = 0.0

    @property
    def diverged(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._env.diverged

    def reset(self, seeds: Tensor, mask: Tensor | None = None) -> Tensor:
        started = time.perf_counter()
        obs = self._env.reset(seeds, mask)
        self.seconds += time.perf_counter() - started
        return obs

    def step(self, action: Tensor, live: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        started = time.perf_counter()
        outcome = self._env.step(action, live)
        self.seconds += time.perf_counter() - started
        return outcome


def run(options: CompareBench, console: Console) -> dict[str, Any]:
    """Measure, print a table, return the JSON-ready result.

    Raises:
        UserError: Ray is not installed, no GPU where one was asked for, or the run cannot be compared.
    """
    import_ray()
    counts, address = options.worker_counts(), {"ray_address": options.ray_address}
    config, load = _config(options)
    contenders: list[_Contender] = []
    trainers: list[Trainer] = []
    try:
        with console.status("starting the workers"):
            classic = _trainer(
                config, load, trainers, backend="ray", worker_kind="classic", workers=max(counts), **address
            )
            contenders += [_Contender(f"classic_{n}", classic, n, n) for n in counts]
            for device in options.device_names():
                engine = _trainer(config, load, trainers, device=device)
                contenders.append(_Contender(f"engine_{device}", engine, usable_cores()))
                if device == "cpu":
                    engine = _trainer(config, load, trainers, device=device)
                    engine.player.close()
                    engine.player = ShardedPlayer(
                        dataclasses.replace(engine.config, backend="ray", workers=usable_cores(), threads=1, **address),
                        reserve_cores=False,  # those that wait for their turn cost nothing
                    )
                    contenders.append(_Contender("engine_ray", engine, usable_cores()))
        with console.status(f"{options.env_id}: {options.rounds} rounds and a warm-up"):
            measures = {each.name: each.measure(options.seconds) for each in contenders}
            timings = interleave(measures, options.rounds)
        with console.status("where the time goes"):
            splits = {each.name: each.split() for each in contenders}
    finally:
        for trainer in reversed(trainers):  # the first one started Ray
            trainer.close()
    player = classic.player
    assert isinstance(player, ClassicPlayer)
    results = _results(options, config, contenders, timings, splits, player)
    for warning in player.warnings:
        console.print(warning, style="yellow")
    for table in _tables(results):
        console.print(table)
    for sentence in results["sentences"]:
        console.print(sentence)
    path = None
    if options.out is not None:
        path = options.out / options.file_name()
    # Where the run lies is nobody else's business.
    named = asdict(options) | {"run_dir": None if options.run_dir is None else options.run_dir.name}
    whole = report("bench compare", named, {"compare": results}, path)
    if path is not None:
        plot(results, path.with_suffix(".png"))
    return whole


def _config(options: CompareBench) -> tuple[TrainConfig, Mapping[str, Any] | None]:
    """The common configuration, and the state of the mean policy (None: untrained)."""
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
        "threads": None,
    }
    if options.run_dir is None:
        given = {name: getattr(options, name) for name in ("env_id", "env_kwargs", "hidden", "sigma")}
        return TrainConfig(**given, **common), None
    agent, config = load_agent(options.run_dir)
    if config.env_id != options.env_id:
        raise UserError(f"{options.run_dir} is a run of {config.env_id}, not of {options.env_id}")
    here: dict[str, Any] = {"backend": "local", "worker_kind": "engine", "workers": None, "physics": "auto"}
    config = dataclasses.replace(config, **common, **here)
    norm = agent.norm.state_dict() if isinstance(agent.norm, ObservationNorm) else None
    return config, {"module": agent.module.state_dict(), "norm": norm}


def _trainer(config: TrainConfig, load: Mapping[str, Any] | None, trainers: list[Trainer], **where: Any) -> Trainer:
    trainer = Trainer(dataclasses.replace(config, **where))
    trainers.append(trainer)
    if load is not None:
        trainer.strategy.load_state_dict({**trainer.strategy.state_dict(), "module": load["module"]})
        if isinstance(trainer.agent.norm, ObservationNorm):
            trainer.agent.norm.load_state_dict(load["norm"])
    return trainer


def _results(
    options: CompareBench,
    config: TrainConfig,
    contenders: Sequence[_Contender],
    timings: SideBySide,
    splits: Mapping[str, Mapping[str, float | None]],
    player: ClassicPlayer,
) -> dict[str, Any]:
    """Everything that the table, the plot and the reader need."""
    counts = [each.workers for each in contenders if each.workers is not None]
    # Workers that share a core are measured, but say nothing of what a core does.
    fitted = [n for n in counts if n <= player.cores] or counts
    by_round = [[timings.rates[f"classic_{n}"][number] for n in fitted] for number in range(options.rounds)]
    slopes = [rate_per_worker(fitted, rates) for rates in by_round]
    laws = [law for rates in by_round if (law := power_law(fitted, rates)) is not None]
    points = {each.name: _point(each, options, timings, splits[each.name]) for each in contenders}
    equivalent: dict[str, Any] = {}
    for each in contenders:
        if each.workers is not None:
            continue
        rates = timings.rates[each.name]
        linear = Spread.of([rate / slope for rate, slope in zip(rates, slopes, strict=True)])
        power = [law.workers_for(rate) for rate, law in zip(rates, laws, strict=True)] if laws else []
        equivalent[each.name] = {
            "linear": asdict(linear),
            "power_law": asdict(Spread.of(power)) if power else None,
            "extrapolated": linear.max > max(fitted),
            "to_classic": {f"classic_{n}": asdict(timings.ratio(each.name, f"classic_{n}")) for n in counts},
        }
    results = {
        "env_id": options.env_id,
        "env_kwargs": config.parsed_env_kwargs(),
        "population_size": config.population_size,
        "policy": {"kind": config.policy, "hidden": config.hidden, "sigma": config.sigma},
        "mean_policy": "untrained" if options.run_dir is None else f"run {options.run_dir.name}",
        "rounds": options.rounds,
        "cores": usable_cores(),
        "contenders": points,
        "scaling": {
            "workers": fitted,
            "per_worker": asdict(Spread.of(slopes)),
            "exponent": asdict(Spread.of([law.exponent for law in laws])) if laws else None,
            "factor": asdict(Spread.of([law.factor for law in laws])) if laws else None,
        },
        "equivalent_cores": equivalent,
        "warnings": list(player.warnings),
    }
    results["sentences"] = _sentences(results)
    return results


def _point(
    each: _Contender, options: CompareBench, timings: SideBySide, split: Mapping[str, float | None]
) -> dict[str, Any]:
    on_gpu = each.trainer.device.type == "cuda"
    hourly = options.price_gpu_hour if on_gpu else options.price_core_hour
    price = None if hourly is None else hourly * (1 if on_gpu else each.cores)
    rates = timings.rates[each.name]
    return {
        "cores": each.cores,
        "workers": each.workers,
        "device": each.trainer.device.type,
        "steps_per_s": asdict(timings.rate(each.name)),
        "steps_per_s_by_round": list(rates),
        "mean_length": float(np.mean(each.lengths)),
        "split": dict(split),
        "dollars_per_1e9": None if price is None else asdict(Spread.of([dollars(rate, price) for rate in rates])),
    }


def _sentences(results: Mapping[str, Any]) -> list[str]:
    """What the numbers say, and what of it was not measured."""
    counts, sentences = results["scaling"]["workers"], []
    for name, found in results["equivalent_cores"].items():
        linear = found["linear"]
        sentences.append(
            f"{name} does the work of {linear['median']:.1f} classic cores ({linear['min']:.1f} to {linear['max']:.1f})"
            + (
                f": extrapolated, {max(counts)} workers at most were measured, and more are taken to scale in proportion."
                if found["extrapolated"]
                else "."
            )
        )
        if found["extrapolated"] and found["power_law"] is not None:
            power, exponent = found["power_law"], results["scaling"]["exponent"]
            sentences.append(
                f"With the scaling measured up to {max(counts)} workers (workers to the power of {exponent['median']:.2f}) it "
                f"would be {power['median']:.1f} ({power['min']:.1f} to {power['max']:.1f}); this too is extrapolated."
            )
    if any(point["device"] == "cuda" and point["dollars_per_1e9"] for point in results["contenders"].values()):
        sentences.append("The price of the GPU is taken to be that of its whole machine.")
    return sentences


def _tables(results: Mapping[str, Any]) -> list[Table]:
    rates = Table(
        title=f"{results['env_id']}, population {results['population_size']}, {results['mean_policy']} mean policy",
        caption="Live environment steps per second: median of the rounds (smallest-largest)",
    )
    for name in ("", "cores", "steps/s", "classic cores", "$ per 10⁹ steps"):
        rates.add_column(name, justify="right" if name else "left")
    shares = Table(caption="Fractions of the time of one more generation")
    for name in ("", *_PARTS):
        shares.add_column(name, justify="right" if name else "left")
    for name, point in results["contenders"].items():
        rate, price = point["steps_per_s"], point["dollars_per_1e9"]
        equal = results["equivalent_cores"].get(name)
        rates.add_row(
            name,
            str(point["cores"]),
            f"{rate['median']:,.0f} ({rate['min']:,.0f}-{rate['max']:,.0f})",
            "-" if equal is None else f"{equal['linear']['median']:.1f}" + " (extrapolated)" * equal["extrapolated"],
            "-" if price is None else f"{price['median']:,.2f}",
        )
        split = [point["split"][part] for part in _PARTS]
        shares.add_row(name, *("-" if value is None else f"{value:.2f}" for value in split))
    return [rates, shares]


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Rates against cores with the fit, and where the time goes, as a PNG."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    rates, shares = figure.subplots(1, 2)
    points, scaling = results["contenders"], results["scaling"]
    classic = [point for point in points.values() if point["workers"] is not None]
    engines = {name: point for name, point in points.items() if point["workers"] is None}
    counts = [point["workers"] for point in classic]
    spreads = [point["steps_per_s"] for point in classic]
    medians = [spread["median"] for spread in spreads]
    errors = [[s["median"] - s["min"] for s in spreads], [s["max"] - s["median"] for s in spreads]]
    rates.errorbar(counts, medians, errors, fmt="o", color="black", label="classic workers on Ray")
    most = max([max(counts), *(e["linear"]["median"] for e in results["equivalent_cores"].values())]) * 1.2
    slope, measured = scaling["per_worker"]["median"], max(counts)
    rates.plot([1, measured], [slope, slope * measured], color="black", linewidth=1)
    rates.plot(
        [measured, most],
        [slope * measured, slope * most],
        color="black",
        linestyle=":",
        label="extrapolated in proportion",
    )
    for number, (name, point) in enumerate(engines.items()):
        rate, color = point["steps_per_s"], f"C{number}"
        rates.axhline(rate["median"], color=color, label=f"{name} ({rate['median']:,.0f})")
        rates.axhspan(rate["min"], rate["max"], color=color, alpha=0.2)
    rates.set(xscale="log", yscale="log", xlabel="classic workers (cores)", ylabel="live environment steps per second")
    rates.set_title(f"{results['env_id']}, population {results['population_size']}")
    rates.legend(fontsize=8)
    split = {name: point["split"] for name, point in points.items() if point["split"]["physics"] is not None}
    left = np.zeros(len(split))
    for part, color in zip(_PARTS, _PART_COLORS, strict=True):
        widths = [parts[part] for parts in split.values()]
        shares.barh(list(split), widths, left=left, color=color, label=part)
        left += widths
    shares.set(xlabel="fraction of a generation's time", xlim=(0, 1))
    shares.invert_yaxis()
    shares.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=4, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
