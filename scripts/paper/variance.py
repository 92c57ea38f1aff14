"""Figure 1 of the Flipout paper: variance of the gradient against the batch size; and Theorem 2, measured.

python scripts/paper/variance.py --out results/paper_variance_<hardware>_<yyyy-mm>
python scripts/paper/variance.py --quick              # under a minute, into runs/
python scripts/paper/variance.py --out ... --render   # only table.md and figure.png

Three partially trained, then frozen networks with multiplicative Gaussian noise (sigma = 1): fully connected 512-512-10, a small
VGG-like convolutional network, and a two-layer character LSTM with noise on its hidden-to-hidden matrices. For each batch size
the gradient of the mean weights is drawn many times; every draw takes new examples (with replacement, as the theory assumes)
and new noise. The variance of a layer is the mean over its weights.

Theorem 2: alpha, beta and gamma are measured separately. alpha is N times the variance with independent weights
(equation 10). One batch with noise in common, split in halves: the covariance of the gradients of the two halves is gamma
with flipout, beta + gamma with one shared sample. Then equations 11 and 12 predict the variance for every N.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from es_flipout.nn import Estimator, MultiplicativeGaussian, NoisyLayer, flipout
from scripts import report
from scripts.paper._data import Images, Text, load_images, load_text
from scripts.paper._paper import ESTIMATORS, QUICKLY, LanguageModel, fully_connected, paper_parser
from scripts.paper._variance_report import figure, table

NOISE = MultiplicativeGaussian(sigma=1.0)


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


def classifier(
    name: str, layers: str, module: nn.Module, images: Images, accuracy: float, measured: dict[str, str]
) -> Net:
    """A classifier, trained until the mean weights have some accuracy; ``measured``: names of layers and their weights."""
    module, reached = flipout(module, NOISE), 0.0
    optimizer = torch.optim.Adam(module.parameters(), 0.0005)
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
    return Net(
        name,
        f"{layers}, {images.name}, training accuracy {reached:.0%}",
        module,
        lambda m, i: F.cross_entropy(m(images.train_x[i]), images.train_y[i], reduction="none"),
        len(images.train_x),
        [module.get_parameter(weight) for weight in measured.values()],
        lambda grads: dict(zip(measured, grads, strict=True)),
    )


def fc(images: Images, protocol: Protocol) -> Net:
    """The paper's 512-512-10."""
    layers = f"{math.prod(images.shape)}-512-512-{images.classes}"
    module = fully_connected(images.shape, 512, images.classes)
    return classifier("FC", layers, module, images, protocol.accuracy, {"FC1": "1.weight", "FC3": "5.weight"})


def vgg_like(images: Images, protocol: Protocol) -> Net:
    """Three blocks of two 3x3 convolutions, each block with a pool; VGG16 has 13 convolutions with 64 to 512 channels."""
    channels = [images.shape[0], 16, 16, 32, 32, 64, 64]
    layers: list[nn.Module] = []
    for i in range(6):
        layers += [nn.Conv2d(channels[i], channels[i + 1], 3, padding=1), nn.ReLU()]
        if i % 2:
            layers.append(nn.MaxPool2d(2))
    side = images.shape[1] // 8
    module = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * side * side, images.classes))
    described = f"3x3 convolutions {'-'.join(map(str, channels[1:]))}, linear {images.classes}"
    return classifier("Conv", described, module, images, protocol.accuracy, {"Conv1": "0.weight", "Conv6": "12.weight"})


def recurrent(text: Text, protocol: Protocol, length: int = 16) -> Net:
    """Two layers of 48 units; the paper has a two-layer word LSTM with 650 units on Penn Treebank."""
    symbols, offsets = text.train, torch.arange(length + 1)[:, None]
    module = LanguageModel(len(text.vocabulary), 24, 48, 2)
    module.lstm = flipout(module.lstm, NOISE, recurrent_only=True)

    def loss(m: nn.Module, starts: Tensor) -> Tensor:
        window = symbols[starts + offsets]
        logits, _ = m(window[:-1])
        return F.cross_entropy(logits.flatten(0, 1), window[1:].flatten(), reduction="none").view(length, -1).mean(0)

    optimizer = torch.optim.Adam(module.parameters(), 0.005)
    value = torch.zeros(())
    for _ in range(protocol.lstm_steps):
        optimizer.zero_grad()
        value = loss(module, torch.randint(len(symbols) - length, (64,))).mean()
        value.backward()
        optimizer.step()
    bits = float(value.detach()) / math.log(2)
    return Net(
        "LSTM",
        f"2 layers of 48 units, {length} characters, {text.name}, {bits:.2f} bits per character",
        module,
        loss,
        len(symbols) - length,
        [module.lstm.get_parameter("weight_hh_l0")],
        lambda grads: dict(zip(("LSTM Wi", "LSTM Wf", "LSTM Wc", "LSTM Wo"), grads[0].chunk(4), strict=True)),
    )


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
    before = report.done(out, ("net", "estimator", "quantity", "batch", "repeat"))

    def missing(*what: object) -> bool:
        return (net.name, *map(str, what)) not in before

    def keep(estimator: str, quantity: str, batch: int, repeat: int, values: dict[str, float]) -> None:
        fixed = {"estimator": estimator, "quantity": quantity, "batch": batch, "repeat": repeat}
        rows = [{"net": net.name, "layer": layer, **fixed, "value": value} for layer, value in values.items()]
        report.append_csv(out / "runs.csv", rows)

    for estimator in ESTIMATORS[net.name]:
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
    shared_noise: tuple[tuple[Estimator, str], ...] = (("flipout", "gamma"), ("shared", "beta+gamma"))
    for estimator, quantity in shared_noise:
        use(net.module, estimator)
        if missing(estimator, quantity, protocol.half_batch, 0):
            estimates = half_covariance(net, protocol.half_batch, protocol.half_draws)
            for repeat in range(min(map(len, estimates.values()))):
                values = {layer: v[repeat] for layer, v in estimates.items()}
                keep(estimator, quantity, protocol.half_batch, repeat, values)
    print(f"{net.name} ({net.size}): {time.perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    """Measure, and write the table and the figure."""
    options = report.parse(paper_parser(__doc__, QUICKLY, images=True, texts=True))
    if not options.render:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        protocol = QUICK if options.quick else Protocol()
        images = load_images(options.images, options.data_dir).standardized()
        text = load_text(options.text, options.data_dir, "character")
        nets = [fc(images, protocol), vgg_like(images, protocol), recurrent(text, protocol)]
        config = {
            "images": images.source,
            "text": text.source,
            "nets": {net.name: net.size for net in nets},
            "noise": repr(NOISE),
            "protocol": asdict(protocol),
        }
        report.begin(options.out, config)
        for net in nets:
            measure(net, protocol, options.out)
    report.write_table(options.out, table(options.out))
    figure(options.out)


if __name__ == "__main__":
    report.run_script(main)
