"""``es-flipout envs``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from es_flipout.cli.parsing import parse
from es_flipout.presets import TUNED, preset


@dataclass(frozen=True)
class EnvsOptions:
    """List what can be trained, and on which backend."""


def run(arguments: Sequence[str]) -> int:
    """Print the list."""
    parse(EnvsOptions, arguments, "envs")

    from es_flipout.envs import native_env_ids

    for env_id, backend in native_env_ids().items():
        config = preset(env_id)
        population, env_steps = config.strategy.population_size, config.schedule.env_steps
        preset_is = "tuned" if env_id in TUNED else "not tuned"
        print(f"{env_id:28} {backend:10} population {population:4}, {env_steps:>12,} environment steps, {preset_is}")
    print(
        "Tuned presets have measured results (results/README.md); the others are starting points. "
        "The torch backend also runs on CUDA, and so does mujoco (pip install 'es-flipout[gpu]'). "
        "Any other registered Gymnasium id with one-dimensional observations runs through Gymnasium's vector API."
    )
    return 0
