"""Shared by the scripts that reproduce the Flipout paper (Wen et al., ICLR 2018): options, networks, fitness."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from es_flipout.nn import Estimator
from es_flipout.strategy.population import Population
from scripts import report
from scripts.paper._data import IMAGES, TEXTS

QUICKLY = "a much smaller version that takes less than a minute"
FLIPS = 40  # samples that share a base in the paper's evolution strategies
ESTIMATORS: dict[str, tuple[Estimator, ...]] = {  # of each network; local reparameterization is for linear layers only
    "FC": ("shared", "flipout", "local_reparameterization"),
    "Conv": ("shared", "flipout"),
    "LSTM": ("shared", "flipout"),
}
ESTIMATOR_NAMES = {"shared": "shared", "flipout": "flipout", "local_reparameterization": "local reparam."}
ESTIMATOR_COLORS = {"shared": "C3", "flipout": "C0", "local_reparameterization": "C2"}


def paper_parser(doc: str | None, quick: str, images: bool = False, texts: bool = False) -> argparse.ArgumentParser:
    """The options of these scripts: a results folder, a quick version, and where the data comes from."""
    parser = report.script_parser(doc, quick)
    parser.add_argument("--data-dir", type=Path, help="folder with the standard files of a public data set")
    if images:
        parser.add_argument("--images", choices=IMAGES, default="digits")
    if texts:
        parser.add_argument("--text", choices=TEXTS, default="docstrings")
    return parser


def fully_connected(shape: tuple[int, int, int], width: int, classes: int) -> nn.Sequential:
    """The paper's network with two hidden layers (512 units), on images ``(..., C, H, W)``."""
    return nn.Sequential(
        nn.Flatten(-3),
        nn.Linear(math.prod(shape), width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, classes),
    )


class ConvLe(nn.Module):
    """The paper's LeNet: 5x5 convolutions with padding, ReLU, 2x2 max pooling after each; two fully connected layers."""

    def __init__(self, shape: tuple[int, int, int], filters: int, hidden: int, classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        self.conv1 = nn.Conv2d(channels, filters, 5, padding=2)
        self.conv2 = nn.Conv2d(filters, 2 * filters, 5, padding=2)
        self.hidden = nn.Linear(2 * filters * (height // 4) * (width // 4), hidden)
        self.output = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, classes)``."""
        for convolution in (self.conv1, self.conv2):
            x = F.max_pool2d(convolution(x).relu(), 2)
        return self.output(self.hidden(x.flatten(1)).relu())


class LanguageModel(nn.Module):
    """Embedding, LSTM, linear."""

    def __init__(self, symbols: int, embedding: int, units: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, embedding)
        self.lstm: nn.Module = nn.LSTM(embedding, units, layers)
        self.head = nn.Linear(units, symbols)

    def forward(self, symbols: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """``(time, batch)`` to logits ``(time, batch, symbols)`` and the state."""
        y, state = self.lstm(self.embed(symbols), state)
        return self.head(y), state


def fitness(population: Population, x: Tensor, y: Tensor) -> Tensor:
    """Minus the cross-entropy of every sample on the same ``(B, C, H, W)`` images: ``(P,)``."""
    logits = population(x.expand(population.size, *x.shape))
    losses = F.cross_entropy(logits.flatten(0, 1), y.repeat(population.size), reduction="none")
    return -losses.view(population.size, -1).mean(1)
