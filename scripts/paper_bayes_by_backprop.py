"""Section 4.3 of the Flipout paper (Figure 2a): Bayes by Backprop with large batches, flipout against one shared sample.

python scripts/paper_bayes_by_backprop.py --out results/paper_bayes_by_backprop_<hardware>_<yyyy-mm>
python scripts/paper_bayes_by_backprop.py --out ... --quick      # under a minute
python scripts/paper_bayes_by_backprop.py --out ... --render     # only table.md and figure.png again

Additive Gaussian noise with a learned scale for every weight; Adam with learning rate .003 as in the paper. The question is how
many iterations each estimator needs to the same training loss (negative log-likelihood of the noisy network, running mean). The
KL divergence is weighed as the paper weighs it on MNIST, a tenth of 1 / 60,000, whatever the size of the data set.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _data import Images, load_images
from _paper import append, begin, done, options_of, read_config
from _runs import read_csv
from torch import nn
from torch.nn import functional as F

from es_flipout.nn import AdditiveGaussian, Estimator, flipout, kl_divergence

NAMES = {"shared": "shared", "flipout": "flipout", "local_reparameterization": "local reparam."}
COLORS = {"shared": "C3", "flipout": "C0", "local_reparameterization": "C2"}
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
    filters: tuple[int, int] = (8, 16)
    conv_units: int = 128
    running_mean: int = 10


QUICK = Protocol(batch=256, iterations=(("FC", 25), ("Conv", 25)), seeds=1)


def network(kind: str, images: Images, protocol: Protocol) -> nn.Module:
    """The paper's 512-512-10, or its LeNet-like ConvLe with fewer filters."""
    channels, height, width = images.shape
    if kind == "FC":
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels * height * width, 512),
            nn.ReLU(),
            nn.Linear(512, 512),
            nn.ReLU(),
            nn.Linear(512, images.classes),
        )
    first, second = protocol.filters
    return nn.Sequential(
        nn.Conv2d(channels, first, 5, padding="same"),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(first, second, 5, padding="same"),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(second * (height // 4) * (width // 4), protocol.conv_units),
        nn.ReLU(),
        nn.Linear(protocol.conv_units, images.classes),
    )


def train(kind: str, estimator: Estimator, seed: int, images: Images, protocol: Protocol, out: Path) -> None:
    """One run: its losses to ``curves.csv``, its end to ``runs.csv``. Seeds share weights and batches over the estimators."""
    torch.manual_seed(seed)
    noise = AdditiveGaussian(protocol.initial_scale, protocol.prior_scale)
    model = flipout(network(kind, images, protocol), noise, estimator)
    optimizer = torch.optim.Adam(model.parameters(), protocol.learning_rate)
    batches = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    start = time.perf_counter()
    for _ in range(dict(protocol.iterations)[kind]):
        i = torch.randperm(len(images.train_x), generator=batches)[: protocol.batch]
        loss = F.cross_entropy(model(images.train_x[i]), images.train_y[i])
        optimizer.zero_grad()
        (loss + protocol.kl_weight * kl_divergence(model)).backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    seconds = time.perf_counter() - start
    model.eval()
    with torch.no_grad():
        error = float((model(images.test_x).argmax(1) != images.test_y).double().mean())
        kl = float(kl_divergence(model))
    name = {"net": kind, "estimator": estimator, "seed": seed}
    append(out / "curves.csv", [{**name, "iteration": t + 1, "loss": round(v, 5)} for t, v in enumerate(losses)])
    last = statistics.mean(losses[-protocol.running_mean :])
    append(out / "runs.csv", [{**name, "last_loss": last, "test_error": error, "kl": kl, "seconds": round(seconds, 1)}])
    print(f"{kind} {estimator} seed {seed}: loss {last:.4f}, test error {error:.2%}, {seconds:.0f} s", flush=True)


def running_mean(losses: Sequence[float], width: int) -> np.ndarray:
    """Mean of the last ``width`` values (of fewer at the start)."""
    sums = np.cumsum([0.0, *losses])
    end = np.arange(1, len(losses) + 1)
    begin_ = np.maximum(0, end - width)
    return (sums[end] - sums[begin_]) / (end - begin_)


Curves = dict[tuple[str, str], list[np.ndarray]]  # (net, estimator) -> smoothed losses of every seed


def collected(out: Path) -> Curves:
    """The smoothed losses of ``curves.csv``."""
    protocol: Any = read_config(out)["protocol"]
    raw: dict[tuple[str, str, str], list[float]] = {}
    for line in read_csv(out / "curves.csv"):
        raw.setdefault((line["net"], line["estimator"], line["seed"]), []).append(float(line["loss"]))
    curves: Curves = {}
    for (net, estimator, _), losses in raw.items():
        curves.setdefault((net, estimator), []).append(running_mean(losses, protocol["running_mean"]))
    return curves


def reached(curve: np.ndarray, level: float) -> float:
    """The first iteration with a loss of at most ``level``; nan where there is none."""
    below = np.flatnonzero(curve <= level)
    return float(below[0]) + 1 if len(below) else math.nan


def table(out: Path) -> str:
    """Iterations to equal loss, in Markdown."""
    config = read_config(out)
    protocol: Any = config["protocol"]
    curves = collected(out)
    seeds = sorted({len(losses) for losses in curves.values()})
    lines = [
        f"Data: {config['images']}, {config['examples']} training examples; batch {protocol['batch']} without replacement, "
        f"{' to '.join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))} seeds. The paper: MNIST, batch 8192.",
        f"FC: 512-512-{config['classes']}. Conv: 5x5 filters {protocol['filters'][0]} and {protocol['filters'][1]}, "
        f"{protocol['conv_units']} units (the paper's ConvLe: 32, 64 and 1024).",
        "",
        "**Iterations to equal training loss** (median seed, worst and best in brackets; - where a seed did not get there)",
        "",
        "| net | loss | shared | flipout | local reparam. | shared ÷ flipout, here | shared ÷ flipout, paper (MNIST) |",
        "|---|---|---|---|---|---|---|",
    ]
    for net, _ in protocol["iterations"]:
        for level in LEVELS:
            cells = {}
            for estimator in NAMES:
                hits = [reached(curve, level) for curve in curves.get((net, estimator), [])]
                cells[estimator] = hits if hits and not any(map(math.isnan, hits)) else []
            if not cells["flipout"]:
                continue
            shown = [
                f"{statistics.median(hits):.0f} ({max(hits):.0f}, {min(hits):.0f})" if hits else "-"
                for hits in cells.values()
            ]
            at_least = "" if cells["shared"] else "> "
            slow = statistics.median(cells["shared"]) if cells["shared"] else dict(protocol["iterations"])[net]
            ratio = f"{at_least}{slow / statistics.median(cells['flipout']):.1f}"
            lines.append(f"| {net} | {level:g} | {' | '.join(shown)} | **{ratio}** | about 3 |")
    lines += [
        "",
        "**At the end**",
        "",
        "| net | estimator | loss (running mean) | test error of the mean weights | ms per iteration | ÷ shared |",
        "|---|---|---|---|---|---|",
    ]
    rows = read_csv(out / "runs.csv")
    for net, iterations in protocol["iterations"]:
        base = statistics.median(float(r["seconds"]) for r in rows if (r["net"], r["estimator"]) == (net, "shared"))
        for estimator, name in NAMES.items():
            own = [r for r in rows if (r["net"], r["estimator"]) == (net, estimator)]
            if own:
                loss, error, seconds = (
                    statistics.median(float(r[c]) for r in own) for c in ("last_loss", "test_error", "seconds")
                )
                lines.append(
                    f"| {net} | {name} | {loss:.4f} | {error:.2%} | {1000 * seconds / iterations:.0f} | {seconds / base:.1f} |"
                )
    lines.append(
        "\nThe runs shared the machine with other work, so their times are rough. The paper states twice the cost of shared."
    )
    return "\n".join(lines) + "\n"


def figure(out: Path) -> None:
    """Training loss against iterations, one line for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = collected(out)
    nets = list(dict.fromkeys(net for net, _ in curves))
    fig, axes = plt.subplots(1, len(nets), figsize=(5 * len(nets), 3.6), squeeze=False)
    for axis, net in zip(axes.flat, nets, strict=True):
        for (own, estimator), seeds in curves.items():
            if own == net:
                for i, curve in enumerate(seeds):
                    axis.plot(
                        np.arange(1, len(curve) + 1),
                        curve,
                        color=COLORS[estimator],
                        lw=1,
                        label=NAMES[estimator] if not i else None,
                    )
        axis.set(yscale="log", title=net, xlabel="iteration")
    axes[0, 0].set_ylabel("training loss (running mean)")
    axes[0, 0].legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(out / "figure.png", dpi=110)
    plt.close(fig)


def main() -> None:
    """Train, and write the table and the figure."""
    options = options_of(__doc__, images=True).parse_args()
    if not options.render:
        torch.set_num_threads(1)
        protocol = QUICK if options.quick else Protocol()
        images = load_images(options.images, options.data_dir).standardised()
        config = {
            "images": images.source,
            "examples": len(images.train_x),
            "classes": images.classes,
            "protocol": asdict(protocol),
        }
        begin(options.out, config)
        for seed in range(protocol.seeds):
            for kind, _ in protocol.iterations:
                estimators: list[Estimator] = ["shared", "flipout"]
                if kind == "FC":
                    estimators.append("local_reparameterization")
                for estimator in estimators:
                    if (kind, estimator, str(seed)) in done(options.out, ("net", "estimator", "seed")):
                        continue
                    train(kind, estimator, seed, images, protocol, options.out)
    (options.out / "table.md").write_text(table(options.out))
    figure(options.out)


if __name__ == "__main__":
    main()
