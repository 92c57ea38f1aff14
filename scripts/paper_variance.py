"""Figure 1 of the Flipout paper: variance of the gradient against the batch size; and Theorem 2, measured.

python scripts/paper_variance.py --out results/paper_variance_<hardware>_<yyyy-mm>
python scripts/paper_variance.py --out ... --quick      # under a minute
python scripts/paper_variance.py --out ... --render     # only table.md and figure.png again

Three partially trained, then frozen networks with multiplicative Gaussian noise (sigma = 1): fully connected 512-512-10, a small
VGG-like convolutional network, and a two-layer character LSTM with noise on its hidden-to-hidden matrices. For each batch size
the gradient of the mean weights is drawn many times; every draw takes new examples (with replacement, as the theory assumes)
and new noise. The variance of a layer is the mean over its weights.

Theorem 2: alpha, beta and gamma are measured apart from that. alpha is N times the variance with independent weights
(equation 10). One batch with noise in common, split in halves: the covariance of the gradients of the two halves is gamma
with flipout, beta + gamma with one shared sample. Then equations 11 and 12 predict the variance for every N.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _data import load_images, load_text
from _paper import append, begin, done, mean_and_error, options_of, read_config
from _runs import read_csv
from torch import Tensor, nn
from torch.nn import functional as F

from es_flipout.nn import Estimator, FlipoutLSTM, MultiplicativeGaussian, NoisyLayer, flipout

NOISE = MultiplicativeGaussian(sigma=1.0)
COLORS = {"shared": "C3", "flipout": "C0", "local_reparameterization": "C2"}
NAMES = {"shared": "shared", "flipout": "flipout", "local_reparameterization": "local reparam."}


@dataclass(frozen=True)
class Protocol:
    """How much is drawn; the paper: 200 draws, repeated 50 times."""

    batch_sizes: tuple[int, ...] = (1, 4, 16, 64, 256, 1024, 4096, 8192)
    draws: int = 6
    repeats: int = 6
    alpha_batch: int = 16
    alpha_draws: int = 200
    half_batch: int = 512
    half_draws: int = 60
    accuracy: float = 0.85
    lstm_steps: int = 150


QUICK = Protocol((1, 8, 64), 4, 3, 4, 10, 32, 6, 0.6, 5)


@dataclass
class Net:
    """A frozen network, its data, and the weights whose gradient is looked at."""

    name: str
    size: str
    module: nn.Module
    loss: Callable[[nn.Module, Tensor], Tensor]  # of the examples with these indices, one loss each
    examples: int
    weights: list[Tensor]
    parts: Callable[[list[Tensor]], dict[str, Tensor]]  # gradients of the weights, by the name of the layer
    estimators: tuple[Estimator, ...]


def fully_connected(images: Any, protocol: Protocol) -> Net:
    """The paper's 512-512-10."""
    inputs = math.prod(images.shape)
    module: nn.Module = nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, images.classes)
    )
    module = flipout(module, NOISE)
    reached = train_classifier(module, images, protocol.accuracy)
    return Net(
        "FC",
        f"{inputs}-512-512-{images.classes}, {images.name}, training accuracy {reached:.0%}",
        module,
        lambda m, i: F.cross_entropy(m(images.train_x[i]), images.train_y[i], reduction="none"),
        len(images.train_x),
        [module.get_parameter("1.weight"), module.get_parameter("5.weight")],
        lambda grads: {"FC1": grads[0], "FC3": grads[1]},
        ("shared", "flipout", "local_reparameterization"),
    )


def vgg_like(images: Any, protocol: Protocol) -> Net:
    """Three blocks of two 3x3 convolutions, each block with a pool; VGG16 has 13 convolutions with 64 to 512 channels."""
    channels = [images.shape[0], 16, 16, 32, 32, 64, 64]
    layers: list[nn.Module] = []
    for i in range(6):
        layers += [nn.Conv2d(channels[i], channels[i + 1], 3, padding=1), nn.ReLU()]
        if i % 2:
            layers.append(nn.MaxPool2d(2))
    side = images.shape[1] // 8
    module: nn.Module = flipout(
        nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * side * side, images.classes)), NOISE
    )
    reached = train_classifier(module, images, protocol.accuracy)
    convolutions = [m.weight for m in module.modules() if isinstance(m, nn.Conv2d)]
    return Net(
        "Conv",
        f"3x3 convolutions {'-'.join(map(str, channels[1:]))}, linear {images.classes}, {images.name}, "
        f"training accuracy {reached:.0%}",
        module,
        lambda m, i: F.cross_entropy(m(images.train_x[i]), images.train_y[i], reduction="none"),
        len(images.train_x),
        [convolutions[0], convolutions[5]],
        lambda grads: {"Conv1": grads[0], "Conv6": grads[1]},
        ("shared", "flipout"),
    )


class CharacterLSTM(nn.Module):
    """Two layers of 48 units, noise on the hidden-to-hidden matrices."""

    def __init__(self, symbols: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, 24)
        self.lstm = FlipoutLSTM(24, 48, 2, batch_first=True, noise=NOISE, recurrent_only=True)
        self.head = nn.Linear(48, symbols)

    def forward(self, symbols: Tensor) -> Tensor:
        """``(batch, time)`` to logits ``(batch, time, symbols)``."""
        return self.head(self.lstm(self.embed(symbols))[0])


def recurrent(text: Any, protocol: Protocol, length: int = 16) -> Net:
    """The paper has a two-layer word LSTM with 650 units on Penn Treebank."""
    symbols = text.train
    module = CharacterLSTM(len(text.vocabulary))
    offsets = torch.arange(length + 1)

    def loss(m: nn.Module, starts: Tensor) -> Tensor:
        window = symbols[starts[:, None] + offsets]
        logits = m(window[:, :-1])
        return F.cross_entropy(logits.transpose(1, 2), window[:, 1:], reduction="none").mean(1)

    optimizer = torch.optim.Adam(module.parameters(), 0.005)
    value = torch.zeros(())
    for _ in range(protocol.lstm_steps):
        optimizer.zero_grad()
        value = loss(module, torch.randint(len(symbols) - length, (64,))).mean()
        value.backward()
        optimizer.step()
    return Net(
        "LSTM",
        f"2 layers of 48 units, {length} characters, {text.name}, {float(value.detach()) / math.log(2):.2f} bits per character",
        module,
        loss,
        len(symbols) - length,
        [module.lstm.weight_hh_l0],  # pyright: ignore[reportArgumentType]
        lambda grads: dict(zip(("LSTM Wi", "LSTM Wf", "LSTM Wc", "LSTM Wo"), grads[0].chunk(4), strict=True)),
        ("shared", "flipout"),
    )


def train_classifier(module: nn.Module, images: Any, accuracy: float) -> float:
    """Train with flipout until the mean weights have this training accuracy; the accuracy reached."""
    optimizer = torch.optim.Adam(module.parameters(), 0.0005)
    reached = 0.0
    for _ in range(5000):
        i = torch.randint(len(images.train_x), (64,))
        optimizer.zero_grad()
        F.cross_entropy(module(images.train_x[i]), images.train_y[i]).backward()
        optimizer.step()
        module.eval()
        with torch.no_grad():
            reached = float((module(images.train_x[:1000]).argmax(1) == images.train_y[:1000]).double().mean())
        module.train()
        if reached >= accuracy:
            break
    return reached


def use(module: nn.Module, estimator: Estimator) -> None:
    """Change the estimator of all layers."""
    for layer in module.modules():
        if isinstance(layer, NoisyLayer):
            layer.estimator = estimator


def gradient(net: Net, batch: int) -> dict[str, Tensor]:
    """The gradient of the mean loss of ``batch`` examples, by layer, flat."""
    losses = net.loss(net.module, torch.randint(net.examples, (batch,)))
    grads = net.parts(list(torch.autograd.grad(losses.mean(), net.weights)))
    return {name: grad.flatten() for name, grad in grads.items()}


def variances(net: Net, batch: int, draws: int) -> dict[str, float]:
    """Variance over the draws, mean over the weights of each layer."""
    drawn = [gradient(net, batch) for _ in range(draws)]
    return {name: float(torch.stack([grads[name] for grads in drawn]).var(0).mean()) for name in drawn[0]}


def half_covariance(net: Net, half: int, draws: int) -> dict[str, list[float]]:
    """Covariance of the gradients of two half-batches that share the base, by layer; estimates from groups of draws."""
    firsts: dict[str, list[Tensor]] = {}
    seconds: dict[str, list[Tensor]] = {}
    for _ in range(draws):
        losses = net.loss(net.module, torch.randint(net.examples, (2 * half,)))
        for part, kept in ((losses[:half], firsts), (losses[half:], seconds)):
            for name, grad in net.parts(list(torch.autograd.grad(part.mean(), net.weights, retain_graph=True))).items():
                kept.setdefault(name, []).append(grad.flatten())
    groups = 6 if draws >= 24 else 2
    covariances = {}
    for name in firsts:
        pairs = list(
            zip(torch.stack(firsts[name]).chunk(groups), torch.stack(seconds[name]).chunk(groups), strict=True)
        )
        covariances[name] = [float(((a - a.mean(0)) * (b - b.mean(0))).sum(0).div(len(a) - 1).mean()) for a, b in pairs]
    return covariances


def measure(net: Net, protocol: Protocol, out: Path) -> None:
    """All rows of one network that ``runs.csv`` does not hold yet."""
    start = time.perf_counter()

    def missing(estimator: str, what: str, batch: int, repeat: int) -> bool:
        key = (net.name, estimator, what, str(batch), str(repeat))
        return key not in done(out, ("net", "estimator", "quantity", "batch", "repeat"))

    def keep(estimator: str, what: str, batch: int, repeat: int, values: dict[str, float]) -> None:
        append(out / "runs.csv", [row(net, layer, estimator, what, batch, repeat, v) for layer, v in values.items()])

    for estimator in net.estimators:
        use(net.module, estimator)
        for batch in protocol.batch_sizes:
            for repeat in range(protocol.repeats):
                if missing(estimator, "variance", batch, repeat):
                    keep(estimator, "variance", batch, repeat, variances(net, batch, protocol.draws))
    use(net.module, "independent")
    batch = protocol.alpha_batch
    for repeat in range(5):
        if missing("independent", "alpha", batch, repeat):
            drawn = variances(net, batch, protocol.alpha_draws // 5)
            keep("independent", "alpha", batch, repeat, {layer: batch * value for layer, value in drawn.items()})
    in_common: tuple[tuple[Estimator, str], ...] = (("flipout", "gamma"), ("shared", "beta+gamma"))
    for estimator, what in in_common:
        use(net.module, estimator)
        if missing(estimator, what, protocol.half_batch, 0):
            groups = half_covariance(net, protocol.half_batch, protocol.half_draws)
            for repeat in range(min(map(len, groups.values()))):
                keep(estimator, what, protocol.half_batch, repeat, {layer: v[repeat] for layer, v in groups.items()})
    print(f"{net.name} ({net.size}): {time.perf_counter() - start:.0f} s", flush=True)


def row(net: Net, layer: str, estimator: str, what: str, batch: int, repeat: int, value: float) -> dict[str, object]:
    """A row of ``runs.csv``."""
    return {
        "net": net.name,
        "layer": layer,
        "estimator": estimator,
        "quantity": what,
        "batch": batch,
        "repeat": repeat,
        "value": value,
    }


Curves = dict[tuple[str, str], dict[int, tuple[float, float]]]  # (layer, estimator) -> batch -> mean, standard error
Constants = dict[tuple[str, str], tuple[float, float]]  # (layer, quantity) -> mean, standard error


def collected(out: Path) -> tuple[Curves, Constants, list[str]]:
    """The means of ``runs.csv``, and the layers in order."""
    values: dict[tuple[str, str, str, int], list[float]] = {}
    layers: dict[str, None] = {}
    for line in read_csv(out / "runs.csv"):
        layers[line["layer"]] = None
        key = (line["layer"], line["estimator"], line["quantity"], int(line["batch"]))
        values.setdefault(key, []).append(float(line["value"]))
    curves: Curves = {}
    constants: Constants = {}
    for (layer, estimator, quantity, batch), group in values.items():
        if quantity == "variance":
            curves.setdefault((layer, estimator), {})[batch] = mean_and_error(group)
        else:
            constants[layer, quantity] = mean_and_error(group)
    return curves, constants, list(layers)


def slope(curve: dict[int, tuple[float, float]], smallest: int = 1, largest: float = math.inf) -> float:
    """Of log variance against log batch size, by least squares."""
    chosen = {batch: value for batch, (value, _) in curve.items() if smallest <= batch <= largest}
    points = [(math.log(batch), math.log(value)) for batch, value in chosen.items()]
    x, y = np.array(points).reshape(-1, 2).T
    return float(np.polyfit(x, y, 1)[0]) if len(points) > 1 else math.nan


def predicted(constants: Constants, layer: str, estimator: str, batch: int) -> float:
    """Equations 11 (shared) and 12 (flipout)."""
    floor = max(0.0, constants[layer, "gamma" if estimator == "flipout" else "beta+gamma"][0])
    return constants[layer, "alpha"][0] / batch + (batch - 1) / batch * floor


def table(out: Path) -> str:
    """Slopes, constants, and prediction against measurement, in Markdown."""
    curves, constants, layers = collected(out)
    config = read_config(out)
    largest = max(batch for curve in curves.values() for batch in curve)
    protocol: Any = config["protocol"]
    lines = [
        f"Data: {config['images']}; {config['text']}.",
        "",
        *(f"- {name}: {size}" for name, size in dict(config["nets"]).items()),  # type: ignore[call-overload]
        "",
        f"Each variance: {protocol['draws']} draws, repeated {protocol['repeats']} times (the paper: 200 and 50), "
        "± one standard error.",
        "",
        "**Figure 1: how the variance falls with the batch size N** (slope of log variance against log N; -1 is 1/N)",
        "",
        f"| layer | estimator | slope, N ≤ 256 | slope, N ≥ 256 | slope, all | variance, N = {largest} | ÷ flipout "
        "| paper |",
        "|---|---|---|---|---|---|---|---|",
    ]
    paper = {
        "shared": "flattens, N = 100 to 1000",
        "flipout": "1/N throughout",
        "local_reparameterization": "below flipout",
    }
    for layer in layers:
        for estimator in ("shared", "flipout", "local_reparameterization"):
            if curve := curves.get((layer, estimator)):
                value, error = curve[largest]
                slopes = " | ".join(f"{s:.2f}" for s in (slope(curve, 1, 256), slope(curve, 256), slope(curve)))
                lines.append(
                    f"| {layer} | {NAMES[estimator]} | {slopes} | "
                    f"{value:.2e} ± {error:.0e} | {value / curves[layer, 'flipout'][largest][0]:.1f} | {paper[estimator]} |"
                )
    lines += [
        "",
        "Local reparameterization lies below already at N = 1: its gradient of the mean weights passes through the",
        "standard deviation of an output, where the noises of all inputs are averaged. Where flipout bends, gamma shows",
        "(below); the paper's layers, in which it did not show up to N = 8192, are much larger. Conv1 has one input channel, so",
        "only one input sign for the whole filter bank.",
        "",
        "**Theorem 2: the constants** (the paper: alpha ≫ beta ≫ gamma, without figures)",
        "",
        "| layer | alpha | beta + gamma | gamma | shared bends at N ≈ alpha ÷ beta | flipout bends at N ≈ alpha ÷ gamma |",
        "|---|---|---|---|---|---|",
    ]
    known = [layer for layer in layers if all((layer, q) in constants for q in ("alpha", "beta+gamma", "gamma"))]
    for layer in known:
        (alpha, alpha_error), (both, both_error), (gamma, gamma_error) = (
            constants[layer, q] for q in ("alpha", "beta+gamma", "gamma")
        )
        bend = f"{alpha / gamma:,.0f}" if gamma > 2 * gamma_error else "gamma not resolved"
        lines.append(
            f"| {layer} | {alpha:.2e} ± {alpha_error:.0e} | {both:.2e} ± {both_error:.0e} | "
            f"{gamma:.1e} ± {gamma_error:.0e} | {alpha / (both - max(0.0, gamma)):,.0f} | {bend} |"
        )
    lines += [
        "",
        "**Theorem 2: prediction and measurement** (variance ÷ alpha, so that 1/N is the variance with independent weights)",
        "",
        "| layer | N | 1/N (10) | flipout predicted (12) | flipout measured | shared predicted (11) | shared measured |",
        "|---|---|---|---|---|---|---|",
    ]
    for layer in known:
        alpha = constants[layer, "alpha"][0]
        for batch in curves[layer, "flipout"]:
            cells = []
            for estimator in ("flipout", "shared"):
                value, error = curves[layer, estimator][batch]
                cells.append(f"{predicted(constants, layer, estimator, batch) / alpha:.2e}")
                cells.append(f"{value / alpha:.2e} ± {error / alpha:.0e}")
            lines.append(f"| {layer} | {batch} | {1 / batch:.2e} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def figure(out: Path) -> None:
    """One panel for each layer: measured points, predicted lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves, constants, layers = collected(out)
    columns = 4
    rows = -(-len(layers) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(3.5 * columns, 3.1 * rows), squeeze=False)
    for axis, layer in zip(axes.flat, layers, strict=False):
        for (own, estimator), curve in curves.items():
            if own != layer:
                continue
            batches = list(curve)
            means, errors = zip(*curve.values(), strict=True)
            axis.errorbar(
                batches, means, 2 * np.array(errors), fmt="o", ms=4, color=COLORS[estimator], label=NAMES[estimator]
            )
            if estimator == "local_reparameterization" or (layer, "gamma") not in constants:
                axis.plot(batches, means, color=COLORS[estimator], lw=1)
            else:
                grid = np.geomspace(1, max(batches), 60)
                line = [predicted(constants, layer, estimator, n) for n in grid]
                axis.plot(grid, line, color=COLORS[estimator], lw=1)
        batches = list(curves[layer, "flipout"])
        if (layer, "alpha") in constants:
            axis.plot(batches, [constants[layer, "alpha"][0] / n for n in batches], "k:", lw=1, label="alpha / N")
        axis.set(xscale="log", yscale="log", title=layer)
        axis.set_xlabel("batch size N")
    for axis in axes.flat[len(layers) :]:
        axis.remove()
    axes[0, 0].set_ylabel("variance of the gradient")
    axes[0, 0].legend(fontsize=8)
    fig.suptitle(
        "Points: measured (± 2 standard errors). Lines: Theorem 2 (local reparameterization: only joined)", fontsize=10
    )
    fig.tight_layout()
    fig.savefig(out / "figure.png", dpi=110)
    plt.close(fig)


def main() -> None:
    """Measure, and write the table and the figure."""
    options = options_of(__doc__, images=True, texts=True).parse_args()
    if not options.render:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        protocol = QUICK if options.quick else Protocol()
        images = load_images(options.images, options.data_dir).standardised()
        text = load_text(options.text, options.data_dir, "character")
        nets = [fully_connected(images, protocol), vgg_like(images, protocol), recurrent(text, protocol)]
        config = {
            "images": images.source,
            "text": text.source,
            "nets": {net.name: net.size for net in nets},
            "noise": repr(NOISE),
            "protocol": asdict(protocol),
        }
        begin(options.out, config)
        for net in nets:
            measure(net, protocol, options.out)
    (options.out / "table.md").write_text(table(options.out))
    figure(options.out)


if __name__ == "__main__":
    main()
