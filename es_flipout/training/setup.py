"""Construction of a :class:`es_flipout.training.trainer.Trainer` from a configuration or a run directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from es_flipout.cluster.sharded import build_sharded
from es_flipout.config import TrainConfig
from es_flipout.envs import register_factory
from es_flipout.envs.factory import Factory
from es_flipout.errors import UserError
from es_flipout.rollout.builder import Parts, Say, backend_of, build, steps_compiled
from es_flipout.rollout.compiled import CompilationError
from es_flipout.rollout.placement import place, with_compilation
from es_flipout.rollout.plan import require_memory
from es_flipout.rollout.players import LocalPlayer, Player
from es_flipout.training.checkpoint import checkpoints, load_checkpoint
from es_flipout.training.metrics import Reporter, Silent
from es_flipout.training.run_directory import read_config
from es_flipout.training.trackers import make_tracker
from es_flipout.training.tracking import Tracking
from es_flipout.training.trainer import Trainer

_FEWEST_PIXELS = 64  # smaller arrays are hardly images

Build = Callable[[TrainConfig, Say], Parts]


def build_engine(config: TrainConfig, say: Say) -> Parts:
    """Build the parts of a run with this engine, on this machine or on a Ray cluster.

    Raises:
        ValueError: classic workers are configured, which :mod:`es_flipout.bench.classic` builds.
    """
    if config.compute.worker_kind != "engine":
        raise ValueError("pass build=es_flipout.bench.classic.player.build_classic for classic workers")
    return build_sharded(config) if config.compute.backend == "ray" else build(config, say)


def make_trainer(
    config: TrainConfig,
    run_dir: Path | None = None,
    reporter: Reporter | None = None,
    build: Build = build_engine,
    factory: Factory | None = None,
) -> Trainer:
    """Create a trainer at the start of a run; nothing is written yet.

    Args:
        config: configuration of the run.
        run_dir: directory for all output; None to write nothing.
        reporter: shows progress and messages.
        build: builds the parts of the run once device and physics are decided.
        factory: makes the Gymnasium environment that the configuration's ``env_id`` is the name of (any new name such as
            ``Mine-v0``), for an environment that is not registered.

    Raises:
        UserError: the environment, a space or a device is not supported, or a tracker's package is missing.
    """
    reporter = reporter if reporter is not None else Silent()
    if factory is not None:
        register_factory(factory, config.task.env_id)
    if config.schedule.generations is None and config.schedule.env_steps is None:
        raise UserError("the length of the run is missing: set --generations or --env-steps")
    if config.task.horizon is not None and backend_of(config) == "gymnasium":
        raise UserError(
            f"horizon needs an environment whose state can be restored (es-flipout envs lists them), and {config.task.env_id} "
            "runs through Gymnasium's vector API"
        )
    # Before anything is measured or written: a package may be missing.
    trackers = {} if run_dir is None else {name: make_tracker(name) for name in config.logging.track}
    # Small layers stall with more than one intra-op thread, and the other cores are needed for physics.
    torch.set_num_threads(1)
    requested = config.compute.compile
    config = with_compilation(place(config, reporter.say))
    require_memory(config)
    tracking = Tracking(trackers, reporter.say)
    trainer = Trainer(config, build(config, reporter.say), run_dir, reporter, tracking)
    if steps_compiled(config):
        reporter.say(
            f"compiling the control step of {config.task.env_id}, which takes about half a minute the first time"
        )
        try:
            trainer.prepare()
        except CompilationError as error:
            trainer.close()
            if requested == "on":
                raise UserError(f"{config.task.env_id} cannot be compiled: {error}; use --compile off") from error
            reporter.say(f"going on without compilation, which is not possible here: {error}")
            config = config.replace(compile="off")
            trainer = Trainer(config, build(config, reporter.say), run_dir, reporter, tracking)
    for warning in [*_ineffective(config), *_of_images(config, trainer.player), *trainer.player.warnings]:
        reporter.say(warning)
    return trainer


def _ineffective(config: TrainConfig) -> list[str]:
    """Return warnings about options that are given but have no effect."""
    compute = config.compute
    if compute.backend == "ray":
        return []
    given = [name for name, value in (("workers", compute.workers), ("ray-address", compute.ray_address)) if value]
    return [f"warning: --{name} has no effect without --backend ray" for name in given]


def _of_images(config: TrainConfig, player: Player) -> list[str]:
    """Return a warning if the observations are images and the policy is none for images."""
    if config.policy.kind == "convnet" or config.task.observed is not None or not isinstance(player, LocalPlayer):
        return []
    shape, numbers = player.envs[0].observation_shape, player.envs[0].observation_space.shape[0]
    if len(shape) not in (2, 3) or numbers < _FEWEST_PIXELS:
        return []
    return [
        f"warning: the observations are images of shape {shape}, which the {config.policy.kind} policy sees as {numbers} "
        "unrelated numbers; --policy convnet is made for images"
    ]


def resume_trainer(
    run_dir: Path,
    reporter: Reporter | None = None,
    changes: Mapping[str, Any] | None = None,
    build: Build = build_engine,
    trust: bool = False,
    factory: Factory | None = None,
) -> Trainer:
    """Restore the run in ``run_dir`` from its newest checkpoint.

    Args:
        run_dir: directory of the run.
        reporter: shows progress and messages.
        changes: options, by flat name, that select where to compute or when to stop. The backend does not affect
            results; another device rounds differently.
        build: see :func:`make_trainer`.
        factory: see :func:`make_trainer`.
        trust: whether the modules and the Ray cluster that the run names may be used: they can execute code here.

    Raises:
        UserError: the directory is missing or incomplete, was written by another version, or is not trusted.
    """
    changes = changes or {}
    config = read_config(run_dir, trust).replace(**changes)
    compute = config.compute
    if (
        compute.backend == "ray"
        and compute.ray_address not in (None, "auto")
        and "ray_address" not in changes
        and not trust
    ):
        raise UserError(
            f"{run_dir} was trained on the Ray cluster at {compute.ray_address}, and a Ray cluster can execute code on "
            "every machine that joins it: name the cluster with --ray-address, or use --trust (in Python, trust=True)"
        )
    if config.logging.own_trackers and "track" not in changes and not trust:
        raise UserError(
            f"{run_dir} imports, and so executes, the trackers {', '.join(config.logging.own_trackers)}: choose others with "
            "--track, or use --trust (in Python, trust=True)"
        )
    # A run that died before its first checkpoint starts from its configuration, which determines everything.
    untouched = not (run_dir / "metrics.csv").exists() and not checkpoints(run_dir / "checkpoints")
    saved = None if untouched else load_checkpoint(run_dir / "checkpoints")
    trainer = make_trainer(config, run_dir, reporter, build, factory)
    if saved is None:
        trainer.save()
        return trainer
    trainer.load(*saved)
    trainer.save_policies()  # the run may have died between writing checkpoint and policy
    return trainer
