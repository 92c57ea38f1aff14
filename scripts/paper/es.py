r"""Evolution strategies on a classifier: figures 2b to 2d of the Flipout paper (Wen et al., ICLR 2018, sections 4.4 and E.3).

python scripts/paper/es.py --quick                                       # under a minute, into runs/es_quick
python scripts/paper/es.py --out results/paper_es_<hardware>_<yyyy-mm>
python scripts/paper/es.py --out ... --render                            # only table.md and figure.png
python scripts/paper/es.py --out ... --images mnist --data-dir DIR --width 512 --filters 32 --conv-hidden 1024 \
    --updates 12000 --conv-updates 4000 --device cuda --processes 1          # the paper's own sizes

The question is whether flipout loses anything, update by update, against an independent perturbation for every sample. From
the paper: the shapes of the networks, 1,600 and 5,000 samples for each update, N = 40 flips for each base, neither antithetic
pairs nor weight decay. Chosen here, because the paper does not say: the fitness is minus the cross-entropy of a mini-batch that
all samples share; its centered ranks are the weights of the update; Adam; sigma, the steps and the batch as in ``Setting``
(``_es_runs.py``). Runs of one seed start from the same weights and see the same mini-batches, whatever the perturbations.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from es_flipout.errors import UserError
from scripts import report
from scripts.paper._data import load_images
from scripts.paper._es_report import figure, table
from scripts.paper._es_runs import BACKPROP, FAMILIES, PAPERS_OWN, Job, Setting, run
from scripts.paper._paper import FLIPS, paper_parser

SIZES = {
    "width": "hidden units of FC",
    "filters": "of ConvLe's first convolution",
    "conv_hidden": "hidden units of ConvLe",
    "updates": "of FC",
    "conv_updates": "of ConvLe",
}


def main() -> None:
    """Run what is missing in ``--out``, and write the table and the figure."""
    parser = paper_parser(__doc__, "a tenth of the updates, 400 samples, one seed, no 5,000", images=True)
    parser.add_argument("--networks", nargs="+", choices=("fc", "conv"), default=["fc", "conv"])
    for name, text in SIZES.items():
        default = getattr(Setting, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=default, help=f"{text} (default {default})"
        )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=report.usable_cores(), help="runs side by side")
    options = report.parse(parser)
    if not options.render:
        measure(options)
    report.write_table(options.out, table(options.out))
    figure(options.out)


def measure(options: argparse.Namespace) -> None:
    """Run what ``runs.csv`` does not hold yet.

    Raises:
        UserError: there are too few updates, files are missing, or the folder holds runs of another setting.
    """
    fewest = min(options.updates, options.conv_updates)
    if fewest < 10:
        raise UserError(f"updates must be at least 10, got {fewest}")
    load_images(options.images, options.data_dir)  # missing files are an error now
    setting = Setting(
        data=options.images,
        data_dir=None if options.data_dir is None else str(options.data_dir),
        score_every=max(fewest // 50, 2),
        device=options.device,
        **{name: getattr(options, name) for name in SIZES},
    )
    if options.quick:
        setting = dataclasses.replace(setting, updates=10, conv_updates=10, score_every=2, draws=2)
    jobs = quick_jobs(options.networks, setting) if options.quick else jobs_of(options, setting)
    report.begin(options.out, dataclasses.asdict(setting))
    report.run_missing(jobs, run, options.out, options.processes)


def quick_jobs(networks: list[str], setting: Setting) -> list[Job]:
    """One seed of the paper's own methods, with 400 samples."""
    return [
        Job(network, 0 if method == BACKPROP else 10 * FLIPS, method, 0, setting)
        for network in networks
        for method in (*PAPERS_OWN, BACKPROP)
    ]


def jobs_of(options: argparse.Namespace, setting: Setting) -> Iterator[Job]:
    """The runs, those of one seed together; the expensive ones have fewer seeds or methods."""
    few = options.seeds[:3]
    if "fc" in options.networks:
        for seed in options.seeds:
            yield Job("fc", 0, BACKPROP, seed, setting)
            yield from (Job("fc", 1600, method, seed, setting) for method in FAMILIES)
        for seed in few:
            methods = (*PAPERS_OWN, "flipout ±1, one base", "low rank 1")
            yield from (Job("fc", 5000, method, seed, setting) for method in methods)
    if "conv" in options.networks:
        for seed in few:
            yield Job("conv", 0, BACKPROP, seed, setting)
            yield from (Job("conv", 1600, method, seed, setting) for method in PAPERS_OWN)


if __name__ == "__main__":
    report.run_script(main)
