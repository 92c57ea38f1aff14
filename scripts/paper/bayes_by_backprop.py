"""Section 4.3 of the Flipout paper (Figure 2a): Bayes by Backprop with large batches, flipout against one shared sample.

python scripts/paper/bayes_by_backprop.py --out results/paper_bayes_by_backprop_<hardware>_<yyyy-mm>
python scripts/paper/bayes_by_backprop.py --quick              # under a minute, into runs/
python scripts/paper/bayes_by_backprop.py --out ... --render   # only table.md and figure.png

Additive Gaussian noise with a learned scale for every weight; Adam with learning rate .003 as in the paper. The question is how
many iterations each estimator needs to reach the same training loss (negative log-likelihood of the noisy network, running
mean). The KL divergence is weighted as in the paper on MNIST, a tenth of 1 / 60,000, whatever the size of the data set.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import nn
from torch.nn import functional as F

from es_flipout.nn import AdditiveGaussian, Estimator, flipout, kl_divergence
from scripts import report
from scripts.paper._data import Images, load_images
from scripts.paper._paper import (
    ESTIMATOR_COLORS,
    ESTIMATOR_NAMES,
    ESTIMATORS,
    QUICKLY,
    ConvLe,
    fully_connected,
    paper_parser,
)

LEVELS = (1.0, 0.7, 0.5, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03)


@dataclass(frozen=True)
class Protocol:
    """The paper: batch 8192 of MNIST's 60,000, ConvLe with 32 and 64 filters and 1024 units, 30k and 6k iterations."""

    batch: int = 1024
    iterations: tuple[tuple[str, int], ...] = (("FC", 200), ("Conv", 250))
    seeds: int = 3
    learning_rate: float = 0.003
    initial_scale: float = 0.05
    prior_scale: float = 1.0
    kl_weight: float = 0.1 / 60_000
    filters: tuple[int, int] = (8, 16)  # ConvLe doubles the first
    conv_units: int = 128
    running_mean: int = 10


QUICK = Protocol(batch=256, iterations=(("FC", 25), ("Conv", 25)), seeds=1)


@dataclass(frozen=True)
class Job(report.Job):
    """One run. Runs of one seed share initial weights and batches."""

    KEY = ("net", "estimator", "seed")
    net: str
    estimator: Estimator
    seed: int
    images: Images
    protocol: Protocol

    def network(self) -> nn.Module:
        """The paper's 512-512-10, or its ConvLe with fewer filters."""
        images, protocol = self.images, self.protocol
        if self.net == "FC":
            return fully_connected(images.shape, 512, images.classes)
        return ConvLe(images.shape, protocol.filters[0], protocol.conv_units, images.classes)


def train(job: Job) -> dict[str, report.Rows]:
    """One run."""
    images, protocol = job.images, job.protocol
    torch.set_num_threads(1)
    torch.manual_seed(job.seed)
    noise = AdditiveGaussian(protocol.initial_scale, protocol.prior_scale)
    model = flipout(job.network(), noise, job.estimator)
    optimizer = torch.optim.Adam(model.parameters(), protocol.learning_rate)
    batches = torch.Generator().manual_seed(job.seed)
    losses: list[float] = []
    start = time.perf_counter()
    for _ in range(dict(protocol.iterations)[job.net]):
        i = torch.randperm(len(images.train_x), generator=batches)[: protocol.batch]
        loss = F.cross_entropy(model(images.train_x[i]), images.train_y[i])
        optimizer.zero_grad()
        (loss + protocol.kl_weight * kl_divergence(model)).backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    seconds = time.perf_counter() - start
    model.eval()
    with torch.no_grad():
        row = {
            **job.key,
            "last_loss": mean(losses[-protocol.running_mean :]),
            "test_error": float((model(images.test_x).argmax(1) != images.test_y).double().mean()),
            "kl": float(kl_divergence(model)),
            "seconds": round(seconds, 3),
        }
    curve: report.Rows = [{**job.key, "iteration": t + 1, "loss": round(v, 5)} for t, v in enumerate(losses)]
    return {"runs": [row], "curves": curve}


def smoothed(out: Path) -> report.Frame:
    """``curves.csv`` with the running mean of the loss (of fewer iterations at the start)."""
    width = report.read_json(out / "config.json")["protocol"]["running_mean"]
    curves = report.read_csv(out / "curves.csv")
    losses = curves.groupby(["net", "estimator", "seed"])["loss"]
    return curves.assign(running=losses.transform(lambda loss: loss.rolling(width, min_periods=1).mean()))


def first_below(curves: report.Frame, net: str, estimator: str, level: float) -> list[int]:
    """The first iteration of every seed with a running mean of at most ``level``; none where a seed did not get there."""
    own = curves[(curves["net"] == net) & (curves["estimator"] == estimator)]
    first = own[own["running"] <= level].groupby("seed")["iteration"].min()
    return list(first) if len(first) == own["seed"].nunique() else []


def table(out: Path) -> str:
    """Iterations to equal loss, in Markdown."""
    config, curves = report.read_json(out / "config.json"), smoothed(out)
    protocol = config["protocol"]
    seeds = curves.groupby(["net", "estimator"])["seed"].nunique()
    text = (
        f"Data: {config['images']}, {config['examples']} training examples; batch {protocol['batch']} without replacement, "
        f"{' to '.join(map(str, dict.fromkeys((seeds.min(), seeds.max()))))} seeds. The paper: MNIST, batch 8192.\n"
        f"FC: 512-512-{config['classes']}. Conv: 5x5 filters {protocol['filters'][0]} and {protocol['filters'][1]}, "
        f"{protocol['conv_units']} units (the paper's ConvLe: 32, 64 and 1024).\n\n"
        "**Iterations to equal training loss** (median seed, worst and best in brackets; - where a seed did not get there)\n\n"
    )
    rows = []
    for net, iterations in protocol["iterations"]:
        for level in LEVELS:
            hits = {estimator: first_below(curves, net, estimator, level) for estimator in ESTIMATOR_NAMES}
            if hits["flipout"]:
                cells = [f"{median(h):.0f} ({max(h):.0f}, {min(h):.0f})" if h else "-" for h in hits.values()]
                at_least, slow = ("", median(hits["shared"])) if hits["shared"] else ("> ", iterations)
                ratio = f"**{at_least}{slow / median(hits['flipout']):.1f}**"
                rows.append((net, f"{level:g}", *cells, ratio, "about 3"))
    header = "net | loss | shared | flipout | local reparam. | shared ÷ flipout, here | shared ÷ flipout, paper (MNIST)"
    text += report.markdown(header, rows)
    text += "\n**At the end**\n\n"
    rows = []
    ends = (
        report.read_csv(out / "runs.csv").groupby(["net", "estimator"])[["last_loss", "test_error", "seconds"]].median()
    )
    for net, iterations in protocol["iterations"]:
        for estimator in [name for name in ESTIMATOR_NAMES if (net, name) in ends.index]:
            loss, error, seconds = ends.loc[(net, estimator)]
            ratio = seconds / ends.loc[(net, "shared")]["seconds"]
            name, ms = ESTIMATOR_NAMES[estimator], 1000 * seconds / iterations
            rows.append((net, name, f"{loss:.4f}", f"{error:.2%}", f"{ms:.0f}", f"{ratio:.1f}"))
    header = "net | estimator | loss (running mean) | test error of the mean weights | ms per iteration | ÷ shared"
    text += report.markdown(header, rows)
    note = "The runs shared the machine with other work, so their times are rough. The paper states twice the cost of shared."
    return f"{text}\n{note}\n"


def figure(out: Path) -> None:
    """Training loss against iterations."""
    curves = smoothed(out)
    nets = list(report.groups(curves, "net"))
    fig, axes = report.panels(len(nets), 5, 3.6)
    for axis, (net, own) in zip(axes, nets, strict=True):
        for estimator, seeds in report.groups(own, "estimator"):
            report.plot_seeds(
                axis, seeds, "iteration", "running", ESTIMATOR_COLORS[estimator], label=ESTIMATOR_NAMES[estimator]
            )
        axis.set(yscale="log", title=net, xlabel="iteration")
    axes[0].set_ylabel("training loss (running mean)")
    axes[0].legend(fontsize=8)
    report.save(fig, out)


def main() -> None:
    """Train, and write the table and the figure."""
    options = report.parse(paper_parser(__doc__, QUICKLY, images=True))
    if not options.render:
        protocol = QUICK if options.quick else Protocol()
        images = load_images(options.images, options.data_dir).standardized()
        config = {
            "images": images.source,
            "examples": len(images.train_x),
            "classes": images.classes,
            "protocol": asdict(protocol),
        }
        report.begin(options.out, config)
        jobs = [
            Job(net, estimator, seed, images, protocol)
            for seed in range(protocol.seeds)
            for net, _ in protocol.iterations
            for estimator in ESTIMATORS[net]
        ]
        report.run_missing(jobs, train, options.out)
    report.write_table(options.out, table(options.out))
    figure(options.out)


if __name__ == "__main__":
    report.run_script(main)
