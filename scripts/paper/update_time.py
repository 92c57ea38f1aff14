r"""Time of one ES update: figure 5 of the Flipout paper (Wen et al., ICLR 2018), and what it leaves out.

python scripts/paper/update_time.py --quick                                              # seconds, into runs/
python scripts/paper/update_time.py --out results/paper_update_time_<hardware>_<yyyy-mm>
python scripts/paper/update_time.py --out ... --device cuda                              # all 5,000 samples, on a GPU
python scripts/paper/update_time.py --out ... --render                                   # only table.md and figure.png

The paper's figure has flipout on a GPU (FlipES) beside standard ES on 40 cores (cpuES); it never compares flipout with
independent perturbations on the same device. Here stand side by side, for the same networks and 5,000 samples an update:

- ``flipout``: FlipES, 125 Gaussian bases of 40 flips each; and flipout as the engine does it by default, one base of ±1;
- ``independent``: every sample has its own weights, made chunk by chunk and made again from their seed for the gradient (all
  of them at once do not fit); the forward is a batched matrix product (convolutions: of patches) or ``torch.func.vmap``;
- ``low rank``: rank one (EGGROLL);
- ``cpuES``: a process for each core, sample after sample, noise from seeds; a worker sums up its own part of the gradient,
  so nothing of the size of the weights travels but the mean and that sum, through shared memory.

An update: noise, forward of all samples on one mini-batch, cross-entropy, centered ranks, gradient, Adam. From the paper:
networks (784-h-h-10; LeNet with 32 and 64 filters times the scale), 5,000 samples, 40 flips. It does not say the mini-batch:
here 64 images of 28x28 that all samples share (as in es.py), of random numbers, because time does not depend on them;
and the convolutional net keeps its 1,024 hidden units at every scale.

On a CPU everything but cpuES has one thread. There the large networks are measured with fewer samples and scaled in proportion
to 5,000; ``table.md`` says which.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from es_flipout.errors import UserError
from es_flipout.runinfo import commit
from scripts import report
from scripts.paper._paper import FLIPS
from scripts.paper._update_methods import (
    CPU_ES,
    FAMILIES,
    INDEPENDENT,
    METHODS,
    Independent,
    Task,
    Workers,
    population_update,
)
from scripts.paper._update_report import PAPER, SAMPLES, figure, table

# Samples measured on a CPU: what keeps an update of every network at a few seconds; multiples of 40.
CPU_SAMPLES: dict[str, dict[float, int]] = {
    "fc": {32: 2000, 128: 1000, 512: 200, 2048: 40},
    "conv": {0.25: 80, 0.75: 40, 1.0: 40, 1.5: 40},
}


def main() -> None:
    """Measure what is missing in ``--out``, and write the table and the figure."""
    parser = report.script_parser(__doc__, "the two smallest networks, 40 samples, one round")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--fc", nargs="*", type=int, default=list(PAPER["fc"]), help="hidden units of the FC net")
    parser.add_argument("--conv", nargs="*", type=float, default=list(PAPER["conv"]), help="filter scales of the LeNet")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--samples", type=int, help="measured, for every network; default: by size on a CPU, 5,000 on a GPU"
    )
    parser.add_argument("--batch", type=int, default=64, help="images of a mini-batch")
    parser.add_argument("--rounds", type=int, default=3, help="timed updates; one more before them does not count")
    parser.add_argument("--processes", type=int, default=report.usable_cores(), help="of cpuES")
    parser.add_argument(
        "--chunk-mib", type=int, help="memory of a chunk of independent samples; default: 256, on a GPU 8192"
    )
    options = report.parse(parser)
    if options.quick:
        options.fc, options.conv, options.samples, options.rounds = [32], [0.25], FLIPS, 1
    if not options.render:
        measure_all(options)
    report.write_table(options.out, table(options.out))
    figure(options.out)


def measure_all(options: argparse.Namespace) -> None:
    """Measure what ``runs.csv`` does not hold yet.

    Raises:
        UserError: there is no GPU, or a number is out of range.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU")
    for name in ("samples", "batch", "rounds", "processes"):
        value = getattr(options, name)
        if value is not None and value < (2 if name == "samples" else 1):
            raise UserError(f"--{name} must be at least {2 if name == 'samples' else 1}, got {value}")
    torch.set_num_threads(1)
    chunk_mib = options.chunk_mib or (8192 if options.device == "cuda" else 256)
    names = ("device", "batch", "rounds", "processes", "samples")
    report.begin(options.out, {name: getattr(options, name) for name in names} | {"chunk_mib": chunk_mib})
    measured = report.done(options.out, ("network", "size", "method"))
    for network, size in [*(("fc", units) for units in options.fc), *(("conv", scale) for scale in options.conv)]:
        samples = options.samples or (CPU_SAMPLES[network].get(size, FLIPS) if options.device == "cpu" else SAMPLES)
        for method in options.methods:
            if (network, str(size), method) in measured:
                continue
            task = Task(network, size, options.batch, options.device)
            seconds = rounds(task, method, samples, options.rounds, options.processes, chunk_mib)
            fixed = {"network": network, "size": size, "method": method, "samples": samples}
            fixed["processes"] = options.processes if method == CPU_ES else 1
            rows = [{**fixed, "round": i, "seconds": s, "commit": commit()} for i, s in enumerate(seconds)]
            report.append_csv(options.out / "runs.csv", rows)
            print(f"{network} {size}, {method}: {median(seconds):.3f} s for {samples} samples", flush=True)


def rounds(task: Task, method: str, samples: int, count: int, processes: int, chunk_mib: int) -> list[float]:
    """Seconds of ``count`` updates, after one that does not count."""
    if method == CPU_ES:
        with Workers(Task(task.network, task.size, task.batch, "cpu"), samples, processes) as workers:
            return [_seconds("cpu", workers.update) for _ in range(count + 1)][1:]
    if method in FAMILIES:
        update = population_update(task, FAMILIES[method](samples), samples)
    else:
        update = Independent(task, samples, INDEPENDENT[method], chunk_mib << 20).update
    return [_seconds(task.device, update) for _ in range(count + 1)][1:]


def _seconds(device: str, update: Callable[[], object]) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    update()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    report.run_script(main)
