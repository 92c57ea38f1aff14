"""``es-flipout evaluate RUN [--episodes N] [--json]``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from es_flipout.cli.parsing import parse
from es_flipout.errors import UserError

_SHOWN = (
    "env_id",
    "which",
    "generation",
    "episodes",
    "mean_return",
    "std_return",
    "median_return",
    "min_return",
    "max_return",
)


@dataclass(frozen=True)
class EvaluateOptions:
    """Score the mean policy of a run in the single Gymnasium environment."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run directory, zoo:ENV_ID or hub:USER/NAME."""
    episodes: int = 100
    """Episodes to play."""
    which: Literal["best", "last"] = "best"
    """The mean policy with the best score of training, or the last one."""
    trust: bool = False
    """Allow the run to import the Python module of its environment."""
    json: bool = False
    """Print the result as JSON."""


def run(arguments: Sequence[str]) -> int:
    """Score the policy and print the result."""
    options = parse(EvaluateOptions, arguments, "evaluate")
    if options.episodes < 1:
        raise UserError(f"episodes must be at least 1, got {options.episodes}")

    import torch

    from es_flipout.cli.session import find_modules_here
    from es_flipout.tools.source import find_run
    from es_flipout.training.evaluate import evaluate
    from es_flipout.training.run_directory import generation_of, load_agent

    torch.set_num_threads(1)
    find_modules_here()
    run_dir = find_run(options.run)
    agent, config = load_agent(run_dir, options.which, options.trust)
    generation = generation_of(run_dir, options.which)
    played = evaluate(agent, config, options.episodes)
    result = dataclasses.replace(played, which=options.which, generation=generation).to_dict()
    if options.json:
        print(json.dumps(result, indent=2))
        return 0
    for name in _SHOWN:
        value = result[name]
        print(f"{name:14} {value:,.2f}" if isinstance(value, float) else f"{name:14} {value}")
    return 0
