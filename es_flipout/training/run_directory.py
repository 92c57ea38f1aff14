"""The run directory: ``config.json``, ``environment.json``, ``policy.safetensors`` and ``evaluation.json``.

For checkpoints and metrics, see :mod:`es_flipout.training.checkpoint` and :mod:`es_flipout.training.metrics`.
"""

from __future__ import annotations

import json
from pathlib import Path

import es_flipout
from es_flipout.config import TrainConfig
from es_flipout.errors import UserError
from es_flipout.policies.agent import Agent
from es_flipout.rollout.builder import make_agent, make_one_env
from es_flipout.runinfo import environment
from es_flipout.training.checkpoint import atomic_write, load_tensors, save_tensors
from es_flipout.training.evaluate import Evaluation

_CONFIG, _ENVIRONMENT, _POLICY, _EVALUATION = "config.json", "environment.json", "policy.safetensors", "evaluation.json"


def create(run_dir: Path, config: TrainConfig) -> None:
    """Create a run directory with ``config.json`` and ``environment.json``.

    Raises:
        UserError: the directory exists and is not empty.
    """
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise UserError(
            f"run directory {run_dir} exists: choose another with --run-dir, or continue it with "
            f"`es-flipout resume {run_dir}`"
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    atomic_write(run_dir / _CONFIG, config.to_json())
    atomic_write(run_dir / _ENVIRONMENT, json.dumps(environment(), indent=2) + "\n")


def read_config(run_dir: Path) -> TrainConfig:
    """Read the configuration of a run directory.

    Raises:
        UserError: the directory is missing, contains no run, or was written by a version with another configuration
            format.
    """
    if not run_dir.is_dir():
        raise UserError(f"run directory {run_dir} does not exist")
    path = run_dir / _CONFIG
    if not path.exists():
        raise UserError(f"{run_dir} is not a run directory: it has no {_CONFIG}")
    try:
        return TrainConfig.from_json(path.read_text(encoding="utf-8"))
    except (UserError, UnicodeDecodeError) as error:
        version = _version_of(run_dir)
        if version not in (None, es_flipout.__version__):
            raise UserError(
                f"{run_dir} was written by es_flipout {version}, whose configuration differs from that of this version "
                f"({es_flipout.__version__}): install es-flipout=={version} to use it"
            ) from None
        raise UserError(f"{path}: {error}") from None


def _version_of(run_dir: Path) -> str | None:
    """Return the version of es_flipout that wrote a run directory; None if unknown."""
    try:
        version = json.loads((run_dir / _ENVIRONMENT).read_text(encoding="utf-8"))["versions"]["es-flipout"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return version if isinstance(version, str) else None


def save_policy(run_dir: Path, agent: Agent) -> None:
    """Write ``policy.safetensors``."""
    save_tensors(run_dir / _POLICY, agent.state_dict())


def load_agent(run_dir: Path) -> tuple[Agent, TrainConfig]:
    """Load the trained agent of a run directory, and the configuration of the run.

    Raises:
        UserError: the directory is missing or incomplete.
    """
    config = read_config(run_dir)
    env = make_one_env(config)
    agent = make_agent(config, env)
    env.close()
    agent.load_state_dict(load_tensors(run_dir / _POLICY))
    return agent, config


def write_evaluation(run_dir: Path, evaluation: Evaluation) -> None:
    """Write ``evaluation.json``."""
    atomic_write(run_dir / _EVALUATION, json.dumps(evaluation.to_dict(), indent=2) + "\n")
