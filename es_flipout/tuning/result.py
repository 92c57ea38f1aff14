"""What a search leaves behind: a preset as Python code, and as a file for ``es-flipout train --preset``."""

from __future__ import annotations

import json
import re
from typing import Any

from es_flipout.config import PLACES, TrainConfig

_NOT_IN_PRESETS = frozenset({"env_id", "seed", "evaluation_episodes", "keep_checkpoints"})


def preset_options(config: TrainConfig) -> dict[str, Any]:
    """Return the options of a configuration that differ from the general defaults, without seed and computation."""
    default = TrainConfig.of(config.task.env_id).flat()
    unused = {"hidden"} if config.policy.kind == "linear" else set()
    if config.task.episode_cap is None:
        unused.add("episode_cap_until")
    return {
        name: value
        for name, value in config.flat().items()
        if value != default[name] and PLACES[name][0] != "compute" and name not in _NOT_IN_PRESETS | unused
    }


def preset_json(config: TrainConfig) -> str:
    """Return the contents of a preset file, for :func:`es_flipout.presets.read_preset`."""
    return json.dumps({"env_id": config.task.env_id, **preset_options(config)}, indent=2) + "\n"


def preset_code(config: TrainConfig) -> str:
    """Return a function in the style of ``es_flipout/presets.py``."""
    name = re.sub(r"\W", "_", config.task.env_id).lower()
    options = (f"        {name}={_source(value)}," for name, value in preset_options(config).items())
    return "\n".join(
        (
            f"def _{name}(env_id: str) -> TrainConfig:",
            "    return TrainConfig.of(",
            "        env_id,",
            *options,
            "    )",
        )
    )


def _source(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if type(value) is int and value >= 10_000:
        return f"{value:_}"
    return repr(value)
