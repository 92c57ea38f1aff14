"""The run directory: ``config.json``, ``environment.json``, ``policy.safetensors``, ``best.safetensors``, ``evaluation.json``.

For checkpoints and metrics, see :mod:`es_flipout.training.checkpoint` and :mod:`es_flipout.training.metrics`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from torch import Tensor

import es_flipout
from es_flipout.config import TrainConfig
from es_flipout.errors import UserError
from es_flipout.policies.agent import Agent
from es_flipout.rollout.builder import make_agent, make_one_env
from es_flipout.runinfo import environment
from es_flipout.training.checkpoint import atomic_write, load_generation, load_progress, load_tensors, save_tensors
from es_flipout.training.evaluate import Evaluation
from es_flipout.training.lock import LOCK

_CONFIG, _ENVIRONMENT, _EVALUATION = "config.json", "environment.json", "evaluation.json"

Which = Literal["best", "last"]
_POLICIES: dict[Which, str] = {"best": "best.safetensors", "last": "policy.safetensors"}


def require_unused(run_dir: Path) -> None:
    """Check that a run directory does not exist or is empty, except for what a run leaves that was killed at its start.

    Raises:
        UserError: it is in use.
    """
    if not run_dir.exists():
        return
    if not run_dir.is_dir():
        raise UserError(f"run directory {run_dir} exists: choose another with --run-dir")
    left = {path.name for path in run_dir.iterdir()} - {LOCK, f".{_CONFIG}.tmp", f".{_ENVIRONMENT}.tmp", _ENVIRONMENT}
    if _CONFIG in left:
        raise UserError(
            f"run directory {run_dir} exists: choose another with --run-dir, or continue it with "
            f"`es-flipout resume {run_dir}`"
        )
    if left:
        raise UserError(
            f"run directory {run_dir} exists: choose another with --run-dir; it contains no run to continue"
        )


def create(run_dir: Path, config: TrainConfig) -> None:
    """Create a run directory with ``config.json`` and ``environment.json``.

    Raises:
        UserError: the directory exists and is not empty.
    """
    require_unused(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    atomic_write(run_dir / _ENVIRONMENT, json.dumps(environment(), indent=2) + "\n")
    atomic_write(run_dir / _CONFIG, config.to_json())  # last: with it, the run can be resumed


def write_config(run_dir: Path, config: TrainConfig) -> None:
    """Replace the configuration of a run that goes on with another end or on another device."""
    atomic_write(run_dir / _CONFIG, config.to_json())


def read_config(run_dir: Path, trust: bool = False) -> TrainConfig:
    """Read the configuration of a run directory.

    Args:
        run_dir: its directory.
        trust: whether the Python module that the configuration names, if it does (``module:Id-v0``), may be imported.

    Raises:
        UserError: the directory is missing, contains no run, or was written by a version with another configuration
            format; or it names a module and is not trusted.
    """
    if not run_dir.is_dir():
        raise UserError(f"run directory {run_dir} does not exist")
    path = run_dir / _CONFIG
    if not path.exists():
        raise UserError(f"{run_dir} is not a run directory: it has no {_CONFIG}")
    try:
        config = TrainConfig.from_json(path.read_text(encoding="utf-8"))
    except (UserError, UnicodeDecodeError) as error:
        version = _version_of(run_dir)
        if version not in (None, es_flipout.__version__):
            raise UserError(
                f"{run_dir} was written by es_flipout {version}, whose configuration differs from that of this version "
                f"({es_flipout.__version__}): install es-flipout=={version} to use it"
            ) from None
        raise UserError(f"{path}: {error}") from None
    if config.task.module is not None and not trust:
        raise UserError(
            f"{run_dir} is a run of {config.task.env_id}: using it imports, and so executes, the Python module "
            f"{config.task.module}; if you trust this run, use --trust (in Python, trust=True)"
        )
    return config


def _version_of(run_dir: Path) -> str | None:
    """Return the version of es_flipout that wrote a run directory; None if unknown."""
    try:
        version = json.loads((run_dir / _ENVIRONMENT).read_text(encoding="utf-8"))["versions"]["es-flipout"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return version if isinstance(version, str) else None


def save_policy(run_dir: Path, tensors: Mapping[str, Tensor], which: Which) -> None:
    """Write the tensors of an agent to ``policy.safetensors`` (the last one) or ``best.safetensors``."""
    save_tensors(run_dir / _POLICIES[which], dict(tensors))


def policy_file(run_dir: Path, which: Which) -> Path:
    """Return the file of the best or the last policy; a run that was not scored yet has only the last one."""
    return run_dir / _POLICIES[_at_hand(run_dir, which)]


def load_agent(
    run_dir: Path, which: Which = "best", trust: bool = False, generation: int | None = None
) -> tuple[Agent, TrainConfig]:
    """Load a trained agent of a run directory, and the configuration of the run.

    Args:
        run_dir: its directory.
        which: the mean policy with the best score of training, or the last one. A run that was not scored yet has only
            the last one.
        trust: see :func:`read_config`.
        generation: load the mean policy of the checkpoint of this generation instead.

    Raises:
        UserError: the directory is missing or incomplete, or is not trusted, or has no such checkpoint.
    """
    config = read_config(run_dir, trust)
    env = make_one_env(config)
    agent = make_agent(config, env)
    env.close()
    if generation is None:
        agent.load_state_dict(load_tensors(policy_file(run_dir, which)))
    else:
        agent.load_state_dict(_mean_policy(load_generation(run_dir / "checkpoints", generation)))
    return agent, config


def generation_of(run_dir: Path, which: Which) -> int | None:
    """Return the generation of the best or the last policy; None if that is unknown."""
    progress = load_progress(run_dir / "checkpoints")
    if progress is None:
        return None
    return progress.generation if _at_hand(run_dir, which) == "last" else progress.best_generation


def _mean_policy(checkpoint: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of an agent from those of a checkpoint."""
    parts = {name: name.partition(".") for name in checkpoint}
    mean = {f"policy.{rest}": checkpoint[name] for name, (part, _, rest) in parts.items() if part == "module"}
    return mean | {name: checkpoint[name] for name, (part, _, _) in parts.items() if part == "observation_norm"}


def _at_hand(run_dir: Path, which: Which) -> Which:
    return which if which == "last" or (run_dir / _POLICIES["best"]).exists() else "last"


def write_evaluation(run_dir: Path, evaluation: Evaluation) -> None:
    """Write ``evaluation.json``, or ``evaluation_last.json`` for the last policy of a run whose best one is another."""
    name = "evaluation_last.json" if evaluation.which == "last" else _EVALUATION
    atomic_write(run_dir / name, json.dumps(evaluation.to_dict(), indent=2) + "\n")
