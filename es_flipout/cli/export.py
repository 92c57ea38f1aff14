"""``es-flipout export RUN --output policy.onnx|policy.pt2``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from es_flipout.cli.parsing import parse


@dataclass(frozen=True)
class ExportOptions:
    """Write the policy of a run as one file: observations in, actions out."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run directory, zoo:ENV_ID or hub:USER/NAME."""
    output: Path
    """File to write: .onnx for ONNX, .pt2 for a program of torch.export."""
    which: Literal["best", "last"] = "best"
    """The mean policy with the best score of training, or the last one."""
    trust: bool = False
    """Allow the run to import the Python module of its environment."""
    force: bool = False
    """Overwrite the output."""


def run(arguments: Sequence[str]) -> int:
    """Export the policy, check it against the agent, and print what was written."""
    options = parse(ExportOptions, arguments, "export")

    from es_flipout.cli.session import find_modules_here
    from es_flipout.tools.export import ENDINGS, export
    from es_flipout.tools.output import check_output
    from es_flipout.tools.policy import load_policy
    from es_flipout.tools.source import find_run
    from es_flipout.training.run_directory import generation_of

    check_output(options.output, ENDINGS, options.force)
    find_modules_here()
    run_dir = find_run(options.run)
    policy = load_policy(run_dir, options.which, options.trust)
    signature, check = export(policy, options.output, generation_of(run_dir, options.which))
    print(f"{options.output}: the {options.which} policy of {signature.env_id} (generation {signature.generation})")
    state = [] if signature.state is None else [(signature.state_dtype, (signature.state,))]
    shown = [
        (signature.inputs, [(signature.observation_dtype, signature.observation), *state]),
        (signature.outputs, [(signature.action_dtype, signature.action), *state]),
    ]
    for way, (names, values) in zip(("input", "output"), shown, strict=True):
        for name, (dtype, shape) in zip(names, values, strict=True):
            print(f"  {way:7} {name:12} {dtype:8} ({', '.join(['batch', *map(str, shape)])})")
    discrete = signature.action_dtype.startswith("int")
    what = "different actions" if discrete else "largest difference of an action"
    difference = f"{check.difference:.1%}" if discrete else f"{check.difference:.2g}"
    print(f"checked against the agent over an episode of {check.steps:,} steps: {what} {difference}")
    return 0
