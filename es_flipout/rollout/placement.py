"""Placement of policies and physics: as requested, or the fastest one in a short measurement; and whether to compile.

There are three placements: everything on the CPU; policies on a GPU and physics on the CPU, double-buffered; and
everything on the GPU, for environments with a GPU backend (torch and MuJoCo).
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch

from es_flipout.config import TrainConfig
from es_flipout.envs import UnsupportedEnvironmentError
from es_flipout.errors import UserError
from es_flipout.rollout.builder import Say, backend_of, build, make_one_env, slots_for
from es_flipout.rollout.episodes import MOMENT_JOBS, Episodes, start_seeds
from es_flipout.rollout.plan import device_slots

_SECONDS = 1.5  # approximate duration of one measurement
_TRIAL_STEPS = 16  # steps per episode in the trial that determines how many steps fill that time
# Compiled, a control step takes .2 ms (8 members) to .45 ms (512) less: as many save 20 to 45 s, and compiling takes 10
# to 30 s (results/LOG.md).
LEAST_CONTROL_STEPS = 100_000


class Placement(NamedTuple):
    """Devices of policies and physics."""

    device: str
    physics: str

    def __str__(self) -> str:
        if self.device == "cpu":
            return "CPU"
        return "GPU" if self.physics == "gpu" else "GPU with physics on the CPU"

    def of(self, config: TrainConfig) -> TrainConfig:
        """Return the configuration with this placement."""
        return config.replace(device=self.device, physics=self.physics)


def place(config: TrainConfig, say: Say | None = None) -> TrainConfig:
    """Decide device, physics and (for physics on the GPU) slots, so that a resumed run keeps them.

    Args:
        config: the requested configuration.
        say: called with the measurements and the choice.

    Raises:
        UserError: the requested placement is not possible on this machine.
    """
    compute = config.compute
    only_cpu = compute.device == "cpu" or compute.worker_kind == "classic"
    missing = "device cpu was requested" if only_cpu else missing_cuda()
    if missing is not None:
        if compute.device == "cuda":
            raise UserError(f"device cuda was requested, but {missing}; use --device cpu")
        if compute.physics == "gpu":
            raise UserError(f"physics gpu was requested, but {missing}; use --physics cpu")
        return Placement("cpu", "cpu").of(config)
    options = _options(config)

    def measure(option: Placement) -> float:
        return measured(option.of(config), say=say)

    chosen = options[0] if len(options) == 1 else faster(options, measure, say)
    return _with_slots(chosen.of(config)) if compute.backend == "local" else chosen.of(config)


def with_compilation(config: TrainConfig) -> TrainConfig:
    """Decide whether the control step is compiled, so that a resumed run keeps it; the placement is decided.

    ``auto`` compiles on the CPU where that saves clearly more time than it takes: where a run has enough control steps.

    Raises:
        UserError: it was requested, but there is nothing that can be compiled.
    """
    compute, choice = config.compute, config.compute.compile
    possible = backend_of(config) == "torch" and compute.device == "cpu" and compute.backend == "local"
    if choice == "on" and not possible and compute.physics != "gpu":
        raise UserError(
            "compile on needs an environment written in torch (es-flipout envs lists them), device cpu and backend local, or "
            f"physics on a GPU, which {config.task.env_id} here does not have; use --compile off"
        )
    if choice == "auto":
        choice = "on" if possible and _control_steps(config) >= LEAST_CONTROL_STEPS else "off"
    return config.replace(compile=choice)


def _control_steps(config: TrainConfig) -> float:
    """Estimate the control steps of all slots in a run: at most as many as episodes of full length take."""
    task, schedule = config.task, config.schedule
    jobs = config.strategy.population_size * task.episodes
    slots, estimates = min(jobs, slots_for(config)), [math.inf]
    if schedule.env_steps is not None:
        estimates.append(schedule.env_steps / slots)
    if schedule.generations is not None:
        env = make_one_env(config)
        env.close()
        steps = min(task.horizon or math.inf, env.max_episode_steps or 1000)
        estimates.append(schedule.generations * steps * jobs / slots)
    return min(estimates)


def planned(config: TrainConfig) -> TrainConfig:
    """Like :func:`place`, for a plan: without measurements, and also for a GPU that this machine does not have."""
    compute = config.compute
    if compute.device == "cpu" or (compute.device == "auto" and missing_cuda() is not None):
        if compute.physics == "gpu":
            raise UserError("physics gpu requires device cuda")
        return Placement("cpu", "cpu").of(config)
    return _options(config.replace(device="cuda"))[0].of(config)


def _with_slots(config: TrainConfig) -> TrainConfig:
    """Return the configuration with its number of slots, if physics is on the GPU."""
    if config.compute.physics != "gpu" or config.compute.slots is not None:
        return config
    return config.replace(slots=device_slots(config))


def missing_cuda() -> str | None:
    """Return the reason why torch cannot use a GPU; None if it can."""
    if torch.version.cuda is None and torch.version.hip is None:
        return "torch finds no CUDA GPU (this is a CPU-only build of torch)"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        return None
    reason = f" ({str(said[-1].message).partition('. ')[0]})" if said else ""
    return f"torch finds no CUDA GPU{reason}"


def _options(config: TrainConfig) -> list[Placement]:
    """Return the placements that the configuration allows, given that there is a GPU."""
    compute, backend = config.compute, backend_of(config)
    if compute.physics == "gpu" and backend == "gymnasium":
        raise UserError(f"{config.task.env_id} has no GPU physics; use --physics cpu")
    everywhere = [Placement("cpu", "cpu"), Placement("cuda", "cpu")]
    if backend != "gymnasium":
        everywhere.append(Placement("cuda", "gpu"))
    options = [option for option in everywhere if compute.physics in ("auto", option.physics)]
    if compute.device == "cuda":
        return [option for option in options if option.device == "cuda"][-1:]  # with physics on the GPU, if allowed
    if compute.backend == "ray":
        return options[:1]
    if backend == "torch" and compute.physics == "auto":
        options.remove(Placement("cuda", "cpu"))  # slower than on the GPU: transfers at every step
    return options


def faster(options: list[Placement], measure: Callable[[Placement], float], say: Say | None = None) -> Placement:
    """Return the option with the most environment steps per second; options that do not work are skipped.

    Raises:
        UserError: no option works.
        Exception: an error on the CPU that is not the user's; on a GPU, any error is a reason to do without it.
    """
    rates: dict[Placement, float] = {}
    failed: list[str] = []
    for option in options:
        try:
            rates[option] = measure(option)
        except (UserError, UnsupportedEnvironmentError, torch.OutOfMemoryError) as error:
            failed.append(f"{option}: {' '.join(str(error).split())}")
        except Exception as error:
            if option.device == "cpu":
                raise
            failed.append(f"{option}: {_first_line(error)}")
    if not rates:
        raise UserError(f"no device can be used: {'; '.join(failed)}")
    best = max(rates, key=lambda option: rates[option])
    if say is not None:
        for line in failed:
            say(f"not possible on the {line}")
        shown = ", ".join(f"{option} {rate:,.0f}" for option, rate in rates.items())
        say(f"device: {best} (environment steps per second measured: {shown})")
    return best


def _first_line(error: Exception) -> str:
    """Return the kind of an error and the first line of its message; the rest is advice for developers."""
    lines = str(error).strip().splitlines()
    return ": ".join([type(error).__name__, *lines[:1]])


def measured(config: TrainConfig, seconds: float = _SECONDS, say: Say | None = None) -> float:
    """Measure the live environment steps per second of rollouts with this configuration, at the start of a run."""
    config = _with_slots(config)
    # Only as many members as play at a time: more would only take longer.
    per_source = 2 if config.strategy.antithetic else 1
    members = max(min(config.strategy.population_size, slots_for(config)) // per_source * per_source, 2)
    episodes = config.task.episodes if members == config.strategy.population_size else 1
    _, strategy, player = build(config, say)
    try:
        strategy.population_size = members  # the row block is still that of the run
        population = strategy.ask()
        seeds = start_seeds(population, episodes)

        def play(steps: int) -> tuple[int, float]:
            started = time.perf_counter()
            rollout = player.play(population, Episodes(seeds, step_cap=steps, moment_jobs=MOMENT_JOBS))
            return rollout.env_steps, time.perf_counter() - started

        play(1)  # compilation and graph capture
        steps, took = play(_TRIAL_STEPS)
        if took < seconds:
            longer = round(_TRIAL_STEPS * seconds / took)
            steps, took = play(min(longer, player.max_episode_steps or longer))
        return steps / took
    finally:
        player.close()
