"""``es-flipout envs``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from es_flipout.cli.parsing import parse
from es_flipout.presets import TUNED, preset, preset_ids


@dataclass(frozen=True)
class EnvsOptions:
    """List what can be trained, and on which backend."""


def run(arguments: Sequence[str]) -> int:
    """Print the list."""
    parse(EnvsOptions, arguments, "envs")

    from es_flipout.envs import native_env_ids
    from es_flipout.envs.gymnasium_adapter import extra_of

    backends = native_env_ids()
    for env_id in dict.fromkeys([*backends, *preset_ids()]):
        backend, extra = backends.get(env_id, "gymnasium"), extra_of(env_id)
        config = preset(env_id)
        population, env_steps = config.strategy.population_size, config.schedule.env_steps
        preset_is = "tuned" if env_id in TUNED else "not tuned"
        needs = "" if extra is None else f"extra {extra}, "
        run_is = f"population {population:4}, {env_steps:>12,} environment steps"
        print(f"{env_id:28} {backend:10} {run_is}, {needs}{preset_is}")
    print(
        "Tuned presets have measured results (results/README.md); the others are starting points. "
        "The torch backend also runs on CUDA, and so does mujoco (pip install 'es-flipout[gpu]'). "
        "An extra that is named is needed, too, as in pip install 'es-flipout[box2d]'. "
        "Any other registered Gymnasium id with one-dimensional observations runs through Gymnasium's vector API."
    )
    return 0
