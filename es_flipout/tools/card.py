"""The card of a policy: what it was trained for and how, what it scores, and how to use it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from es_flipout.config import PLACES, TrainConfig
from es_flipout.presets import preset

# These change neither the policy nor which of the policies of a run is the best.
_NEUTRAL = frozenset({"evaluation_episodes", "checkpoint_every", "keep_checkpoints", "track", "video"})


def card(config: TrainConfig, source: str, evaluation: Mapping[str, Any] | None, commit: str | None) -> str:
    """Return the card in Markdown.

    Args:
        config: configuration of the run.
        source: how the policy is named on the command line, such as ``zoo:HalfCheetah-v5``.
        evaluation: the contents of ``evaluation.json``, if the policy was scored.
        commit: commit of the source tree that trained the policy, if that is known.
    """
    rows = [("task", config.task.env_id), ("seed", config.schedule.seed)]
    if evaluation is not None:
        rows.append(
            (
                "score",
                f"{evaluation['mean_return']:,.1f} (sd {evaluation['std_return']:,.1f}, median "
                f"{evaluation['median_return']:,.1f}) over {evaluation['episodes']} episodes in Gymnasium "
                f"{evaluation['versions']['gymnasium']}",
            )
        )
    rows += [("command", f"`{train_command(config)}`"), ("commit", "unknown" if commit is None else f"`{commit}`")]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""# {config.task.env_id}

A policy trained by evolution strategies with es_flipout.

| | |
|---|---|
{table}

```
es-flipout evaluate {source}
```
"""


def train_command(config: TrainConfig) -> str:
    """Return the command that trains this policy, with the options that differ from the preset."""
    usual, words = preset(config.task.env_id).flat(), ["es-flipout", "train", config.task.env_id]
    for name, value in config.flat().items():
        if name in _NEUTRAL or PLACES[name][0] == "compute" or value == usual[name]:
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


def read_json(path: Path) -> Any:
    """Return the value in a JSON file; None if the file does not exist or is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
