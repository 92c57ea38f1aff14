"""Malformed input by the thousand: options and files of a run, drawn by hypothesis.

    .venv/bin/python scripts/checks/fuzz.py --cases 2000 --seed 0

Every case must end in a correct run or in one clear line and exit code 2. The counts by kind are written to
``results/reliability_<hardware>_<month>/fuzz.json``, with the seed that repeats them; each case that ended otherwise is printed.
The exit code is the number of those, at most 1.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import tyro
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings

from es_flipout.runinfo import environment
from scripts.checks._fuzz_cases import Case, carry_out, cases, make_run


@dataclass(frozen=True)
class Fuzz:
    """Run malformed input through the command line."""

    cases: int = 2000
    """Number of cases."""
    seed: int = 0
    """Seed of all cases."""
    output: Path | None = None
    """File for the counts, such as results/reliability_HARDWARE_MONTH/fuzz.json; None to print only."""


def main() -> int:
    """Run all cases and write the counts."""
    options = tyro.cli(Fuzz, description=__doc__)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    failures: list[dict[str, str]] = []
    slowest, began = 0.0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder))

        @seed(options.seed)
        @settings(
            max_examples=options.cases,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
            verbosity=Verbosity.quiet,
        )
        @given(cases())
        def one(case: Case) -> None:
            nonlocal slowest
            outcome = carry_out(case, run)
            counts[case.kind][outcome.end] += 1
            slowest = max(slowest, outcome.seconds)
            if not outcome.good:
                failures.append(
                    {"kind": case.kind, "end": outcome.end, "case": repr(case.arguments), "said": outcome.said}
                )
                print(f"{outcome.end}: {case.kind} {case.arguments}\n{outcome.said}\n", flush=True)

        one()
    total = sum(counts.values(), Counter())
    print(f"{sum(total.values())} cases in {time.monotonic() - began:.0f} s (slowest {slowest:.1f} s): {dict(total)}")
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        report = {
            "command": f"scripts/checks/fuzz.py --cases {options.cases} --seed {options.seed}",
            "cases": sum(total.values()),
            "ends": dict(total),
            "by_kind": {kind: dict(found) for kind, found in sorted(counts.items())},
            "failures": failures,
            "environment": environment(),
        }
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return min(len(failures), 1)


if __name__ == "__main__":
    sys.exit(main())
