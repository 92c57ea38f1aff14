"""``es-flipout render RUN --output clip.mp4|clip.gif``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from es_flipout.cli.parsing import parse
from es_flipout.errors import UserError


@dataclass(frozen=True)
class RenderOptions:
    """Write a video of the policy of a run. Needs no display."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """Directory of the run."""
    output: Path
    """File to write: .mp4 or .gif."""
    episodes: int | None = None
    """Episodes to show; None for one per place of the grid."""
    seed: int | None = None
    """Seed of the first start state, the next ones follow; None for those of evaluate."""
    grid: tuple[int, int] = (1, 1)
    """Rows and columns of episodes that are shown side by side."""
    width: int | None = None
    """Width of the video in pixels; None for the environment's own."""
    steps: int | None = None
    """Cut episodes after this many steps; None for whole episodes."""
    which: Literal["best", "last"] = "best"
    """The mean policy with the best score of training, or the last one."""
    checkpoint: int | None = None
    """Show the mean policy of the checkpoint of this generation instead."""
    progress: bool = False
    """Show the mean policies of all kept checkpoints, one after another."""
    trust: bool = False
    """Allow the run to import the Python module of its environment."""
    force: bool = False
    """Overwrite the output."""


def run(arguments: Sequence[str]) -> int:
    """Render the policy and print what was written."""
    options = parse(RenderOptions, arguments, "render")
    rows, columns = options.grid
    for name, value in (
        *(("episodes", options.episodes), ("grid", min(rows, columns))),
        *(("width", options.width), ("steps", options.steps)),
    ):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    if options.progress and options.checkpoint is not None:
        raise UserError("progress shows all kept checkpoints: leave out --checkpoint")
    if options.seed is not None and options.seed < 0:
        raise UserError(f"seed must be 0 or greater, got {options.seed}")

    import torch

    from es_flipout.cli.session import find_modules_here
    from es_flipout.tools.output import check_output
    from es_flipout.tools.policy import load_policy
    from es_flipout.tools.render import Clip, render
    from es_flipout.tools.source import find_run
    from es_flipout.tools.video import ENDINGS
    from es_flipout.training.checkpoint import generations
    from es_flipout.training.evaluate import FIRST_SEED

    check_output(options.output, ENDINGS, options.force)
    torch.set_num_threads(1)
    find_modules_here()
    run_dir = find_run(options.run)
    shown: list[int | None] = [options.checkpoint]
    if options.progress:
        shown = list(generations(run_dir / "checkpoints"))
        if not shown:
            raise UserError(f"{run_dir} has no checkpoints")
    policies = [
        (
            "" if generation is None else f"generation {generation}   ",
            load_policy(run_dir, options.which, options.trust, generation),
        )
        for generation in shown
    ]
    episodes = options.episodes if options.episodes is not None else rows * columns
    seed = FIRST_SEED if options.seed is None else options.seed
    done = render(policies, options.output, Clip(episodes, seed, rows, columns, options.width, options.steps))
    size = options.output.stat().st_size / 1e6
    returns = ", ".join(f"{value:,.1f}" for value in done.returns)
    print(f"{options.output}: {done.frames:,} frames, {done.frames / done.fps:.1f} s, {size:.2f} MB")
    print(f"returns: {returns}")
    return 0
