"""``es-flipout play RUN``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from es_flipout.cli.parsing import parse
from es_flipout.errors import UserError


@dataclass(frozen=True)
class PlayOptions:
    """Show the policy of a run in a window. Ctrl-C ends it."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """Directory of the run."""
    episodes: int | None = None
    """Episodes to play; None to go on until Ctrl-C."""
    seed: int | None = None
    """Seed of the first start state, the next ones follow; None for those of evaluate."""
    which: Literal["best", "last"] = "best"
    """The mean policy with the best score of training, or the last one."""
    checkpoint: int | None = None
    """Show the mean policy of the checkpoint of this generation instead."""
    trust: bool = False
    """Allow the run to import the Python module of its environment."""


def run(arguments: Sequence[str]) -> int:
    """Play in a window and print the return of every episode."""
    options = parse(PlayOptions, arguments, "play")
    if options.episodes is not None and options.episodes < 1:
        raise UserError(f"episodes must be at least 1, got {options.episodes}")
    if options.seed is not None and options.seed < 0:
        raise UserError(f"seed must be 0 or greater, got {options.seed}")

    import itertools

    import torch

    from es_flipout.cli.session import find_modules_here
    from es_flipout.tools.episode import Episode, make_rendered_env
    from es_flipout.tools.policy import load_policy
    from es_flipout.tools.source import find_run
    from es_flipout.training.evaluate import FIRST_SEED

    torch.set_num_threads(1)
    find_modules_here()
    policy = load_policy(find_run(options.run), options.which, options.trust, options.checkpoint)
    env = make_rendered_env(policy.config, "human")
    first = FIRST_SEED if options.seed is None else options.seed
    numbers = itertools.count() if options.episodes is None else range(options.episodes)
    try:
        for number in numbers:
            episode = Episode(policy, env, first + number)
            while not episode.ended:
                episode.step()
            print(f"episode {number + 1}: return {episode.total:,.1f} after {episode.steps:,} steps", flush=True)
    finally:
        env.close()
    return 0
