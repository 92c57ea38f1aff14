"""Draw the pictures of docs/: how members are made, the error of the gradient estimate, and the path of a run through the code.

python scripts/site/pictures.py                # rewrite docs/images/*.svg
python scripts/site/pictures.py --out DIR
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

import es_flipout as esf
from es_flipout.perturbations.base import Family

matplotlib.use("agg")
matplotlib.rcParams.update({"svg.hashsalt": "es_flipout", "font.size": 9})

ROOT = Path(__file__).resolve().parents[2]
OUT, IN = 16, 16  # sizes of the layer in the picture of the error
POPULATIONS = (32, 128, 512, 2048, 8192)
FAMILIES: dict[str, Family] = {
    "flipout, Rademacher base": esf.Flipout(),
    "flipout, 8 Gaussian bases": esf.Flipout(base="gaussian", bases=8),
    "flipout, one Gaussian base": esf.Flipout(base="gaussian"),
    "low rank 1": esf.LowRank(),
    "dense": esf.Dense(),
}


def perturbations(family: Family, population_size: int, out: int, inputs: int, seed: int = 0) -> Tensor:
    """Perturbations of a linear layer's weight in units of sigma, ``(P, out, in)``, as the engine draws them."""
    layer = torch.nn.Linear(inputs, out, bias=False)
    torch.nn.init.zeros_(layer.weight)
    strategy = esf.EvolutionStrategy(layer, population_size, sigma=1.0, perturbation=family, seed=seed)
    outputs = strategy.ask()(torch.eye(inputs).expand(population_size, inputs, inputs))
    return outputs.detach().transpose(1, 2)


def cosine(family: Family, population_size: int, seeds: int = 5) -> float:
    """Mean cosine between the estimated and the true gradient of a linear fitness, without shaping."""
    total = 0.0
    for seed in range(seeds):
        noise = perturbations(family, population_size, OUT, IN, seed).flatten(1)
        gradient = torch.randn(OUT * IN, generator=torch.Generator().manual_seed(seed))
        estimate = (noise @ gradient) @ noise
        total += float(torch.nn.functional.cosine_similarity(estimate, gradient, dim=0))
    return total / seeds


def members() -> Figure:
    """The base, the signs of two members, and their perturbations, with antithetic partners."""
    noise = perturbations(esf.Flipout(base="gaussian"), 4, 6, 8)
    # The engine keeps B, r and s to itself: the ratio of two members is their sign matrix, r s^T, up to member 0's.
    base = noise[0]
    signs = (noise[2] / base).sign()
    figure, axes = plt.subplots(1, 5, figsize=(9, 1.9), layout="constrained")
    panels = [
        (base, "shared base $B$"),
        (signs, "signs $r_n s_n^T$"),
        (noise[2], r"member $n$: $B \circ r_n s_n^T$"),
        (-signs, "partner: $(-r_n) s_n^T$"),
        (noise[3], r"partner: $-B \circ r_n s_n^T$"),
    ]
    for axis, (values, title) in zip(axes, panels, strict=True):
        axis.imshow(values.numpy(), cmap="RdBu_r", vmin=-2, vmax=2)
        axis.set_title(title)
        axis.set_xticks([])
        axis.set_yticks([])
    axes[0].set_xlabel("inputs")
    axes[0].set_ylabel("outputs")
    return figure


def error() -> Figure:
    """Cosine between estimate and gradient over the population, for every family."""
    figure, axis = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
    for (name, family), style in zip(FAMILIES.items(), ("-", "-", "-", "--", ":"), strict=True):
        axis.plot(POPULATIONS, [cosine(family, size) for size in POPULATIONS], style, marker="o", ms=3, label=name)
    axis.axhline(3**-0.5, color="gray", lw=0.8)
    axis.annotate(
        "limit of one Gaussian base", (POPULATIONS[0], 3**-0.5), (0, 3), textcoords="offset points", color="gray"
    )
    axis.set(xscale="log", xlabel="members", ylabel="cosine to the true gradient", ylim=(0, 1.02))
    axis.set_xticks(POPULATIONS, [f"{size:,}" for size in POPULATIONS])
    axis.minorticks_off()
    axis.set_title(f"Linear fitness, one layer of {OUT} × {IN} weights")
    axis.legend(frameon=False, loc="lower right")
    return figure


# Boxes of the data flow: position (column, row), title, what happens there.
_BOXES = {
    "cli": (0, 0, "cli/", "a file per command"),
    "config": (2, 0, "config.py, presets.py", "TrainConfig by subject"),
    "setup": (1, 1, "training/setup.py", "configuration to trainer"),
    "placement": (0, 2, "rollout/placement.py", "CPU, GPU or both"),
    "builder": (2, 2, "rollout/builder.py", "agent, strategy, player"),
    "trainer": (1, 3, "training/trainer.py", "the loop"),
    "strategy": (0, 4, "strategy/", "population, estimator, optimizers"),
    "files": (2, 4, "training/", "checkpoints, metrics, run directory"),
    "player": (1, 5, "a Player", "rollout/players.py and others"),
    "host": (0, 6, "rollout/host.py", "environments on the CPU"),
    "device": (1, 6, "rollout/device.py", "everything on a GPU"),
    "sharded": (2, 6, "cluster/sharded.py", "shards on Ray workers"),
}
_ARROWS = [
    ("cli", "setup", ""),
    ("config", "setup", ""),
    ("setup", "placement", "place(config)"),
    ("setup", "builder", "build(config)"),
    ("builder", "trainer", ""),
    ("trainer", "strategy", "ask(), tell(fitness)"),
    ("trainer", "files", ""),
    ("strategy", "player", "Population"),
    ("trainer", "player", "Episodes, Rollout"),
    ("player", "host", ""),
    ("player", "device", ""),
    ("player", "sharded", ""),
]


def data_flow() -> Figure:
    """The path of a run through the modules."""
    figure, axis = plt.subplots(figsize=(9, 7), layout="constrained")
    axis.set(xlim=(-0.55, 2.55), ylim=(6.5, -0.5))
    axis.axis("off")
    boxes = {}
    for name, (x, y, title, what) in _BOXES.items():
        box = {"boxstyle": "round,pad=0.5", "facecolor": "#e8eaf6", "edgecolor": "#3f51b5"}
        boxes[name] = axis.text(x, y, f"{title}\n{what}", ha="center", va="center", bbox=box).get_bbox_patch()
    figure.canvas.draw()  # places the boxes, at whose edges the arrows end
    for start, end, label in _ARROWS:
        (x0, y0), (x1, y1) = _BOXES[start][:2], _BOXES[end][:2]
        ends = {"patchA": boxes[start], "patchB": boxes[end], "shrinkA": 2, "shrinkB": 2, "color": "gray"}
        axis.annotate("", (x1, y1), (x0, y0), arrowprops={"arrowstyle": "<->" if "," in label else "->", **ends})
        middle = (x0 + x1) / 2, (y0 + y1) / 2
        axis.text(*middle, label, ha="center", va="center", family="monospace", backgroundcolor="white")
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {"members": members, "error": error, "data_flow": data_flow}


def main() -> None:
    """Draw all pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        figure = draw()
        figure.savefig(out / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
