"""Tables 2 and 3 of the Flipout paper: language models with weight noise on the hidden-to-hidden matrices.

python scripts/paper/language_models.py --out results/paper_language_models_<hardware>_<yyyy-mm>
python scripts/paper/language_models.py --quick              # under a minute, into runs/
python scripts/paper/language_models.py --out ... --render   # only table.md and figure.png

A character LSTM with multiplicative Gaussian noise (sigma = 1; AMSGrad, orthogonal start, clipping at 1) and a word LSTM of two
layers with DropConnect (p = .5; SGD whose step is divided by 4 when validation gets worse, clipping at .25), each without noise,
with one noise sample for the batch, and with flipout. The noise is the only regularizer, and is drawn anew for each batch. The
epoch with the best validation counts.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from es_flipout.nn import DropConnect, Estimator, MultiplicativeGaussian, Noise, flipout
from scripts import report
from scripts.paper._data import Text, load_text
from scripts.paper._paper import QUICKLY, LanguageModel, paper_parser

VARIANTS: dict[str, Estimator | None] = {"unregularized": None, "noise, shared": "shared", "noise, flipout": "flipout"}
NOISES: dict[str, Noise] = {"character": MultiplicativeGaussian(sigma=1.0), "word": DropConnect()}
COLORS = {"unregularized": "0.5", "noise, shared": "C3", "noise, flipout": "C0"}
PAPER = {
    "character": {
        "unregularized": ("1.468", "1.423"),
        "noise, shared": ("1.257", "1.230"),
        "noise, flipout": ("1.256", "1.227"),
    },
    "word": {
        "unregularized": ("132.23", "128.97"),
        "noise, shared": ("78.82", "75.71"),
        "noise, flipout": ("76.88", "73.20"),
    },
}


@dataclass(frozen=True)
class Model:
    """A language model and its training (by default the one of characters); ``paper`` says what the paper has."""

    level: Literal["character", "word"] = "character"
    units: int = 128
    layers: int = 1
    embedding: int = 64
    vocabulary: int = 128
    length: int = 50
    batch: int = 32
    train_symbols: int = 60_000
    test_symbols: int = 30_000
    epochs: int = 40
    learning_rate: float = 0.002
    clip: float = 1.0
    paper: str = "1 layer of 1000, 100 symbols, batch 32"


WORDS = Model(
    level="word",
    units=96,
    layers=2,
    embedding=96,
    vocabulary=2000,
    length=35,
    batch=20,
    train_symbols=40_000,
    test_symbols=15_000,
    epochs=12,
    learning_rate=20.0,
    clip=0.25,
    paper="2 layers of 650, 35 symbols, batch 40, 100 epochs",
)
MODELS = (Model(), WORDS)
_LESS: dict[str, Any] = {"units": 16, "embedding": 16, "length": 15, "batch": 10, "test_symbols": 1000, "epochs": 2}
QUICK = (replace(Model(), train_symbols=3000, **_LESS), replace(WORDS, train_symbols=1500, vocabulary=200, **_LESS))


@dataclass(frozen=True)
class Job(report.Job):
    """One run."""

    KEY = ("level", "variant", "seed")
    level: str
    variant: str
    seed: int
    model: Model
    text: Text


def columns(symbols: Tensor, batch: int) -> Tensor:
    """The text in ``batch`` columns, ``(time, batch)``."""
    length = len(symbols) // batch
    return symbols[: length * batch].view(batch, length).T.contiguous()


def score(net: LanguageModel, symbols: Tensor, model: Model) -> float:
    """Mean negative log-likelihood in nats with the mean weights."""
    text = columns(symbols[: model.test_symbols], 10)
    net.eval()
    total, state = 0.0, None
    with torch.no_grad():
        for start in range(0, len(text) - 1, model.length):
            x = text[start : start + model.length + 1]
            logits, state = net(x[:-1], state)
            total += float(F.cross_entropy(logits.flatten(0, 1), x[1:].flatten(), reduction="sum"))
    net.train()
    return total / (len(text) - 1) / 10


# From nats: bits per character, perplexity per word.
UNITS: dict[str, Callable[[float], float]] = {"character": lambda nats: nats / math.log(2), "word": math.exp}


def train(job: Job) -> dict[str, report.Rows]:
    """One run; the epoch with the best validation counts."""
    model, text, word, unit = job.model, job.text, job.level == "word", UNITS[job.level]
    torch.set_num_threads(1)
    torch.manual_seed(job.seed)
    net = LanguageModel(len(text.vocabulary), model.embedding, model.units, model.layers)
    for name, parameter in net.lstm.named_parameters():
        if "weight_hh" in name and not word:
            for gate in parameter.detach().chunk(4):
                nn.init.orthogonal_(gate)
    if estimator := VARIANTS[job.variant]:
        net.lstm = flipout(net.lstm, NOISES[job.level], estimator, recurrent_only=True)
    optimizer = torch.optim.Adam(net.parameters(), model.learning_rate, amsgrad=True)
    if word:
        optimizer = torch.optim.SGD(net.parameters(), model.learning_rate)
    train_text = columns(text.train[: model.train_symbols], model.batch)
    best, best_test = math.inf, math.inf
    curve: report.Rows = []
    start_time = time.perf_counter()
    for epoch in range(1, model.epochs + 1):
        state = None
        losses = []
        for start in range(0, len(train_text) - model.length, model.length):
            x = train_text[start : start + model.length + 1]
            logits, state = net(x[:-1], state)
            state = tuple(s.detach() for s in state)
            loss = F.cross_entropy(logits.flatten(0, 1), x[1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), model.clip)
            optimizer.step()
            losses.append(float(loss.detach()))
        valid, trained = score(net, text.valid, model), mean(losses)
        curve.append({**job.key, "epoch": epoch, "train": unit(trained), "valid": unit(valid)})
        if valid < best:
            best, best_test = valid, score(net, text.test, model)
        elif word:
            for group in optimizer.param_groups:
                group["lr"] /= 4
    seconds = round(time.perf_counter() - start_time, 1)
    return {"runs": [{**job.key, "valid": unit(best), "test": unit(best_test), "seconds": seconds}], "curves": curve}


def table(out: Path) -> str:
    """The paper's tables with ours beside them, in Markdown."""
    config, runs = report.read_json(out / "config.json"), report.read_csv(out / "runs.csv")
    parts = [f"Ours: {config['text']}; mean of the seeds ± half their range. The paper: Penn Treebank, single runs.\n"]
    for model in config["models"]:
        level = model["level"]
        unit, noise, more = (
            ("bits per character", "multiplicative Gaussian, sigma = 1", ".")
            if level == "character"
            else ("perplexity", "DropConnect, p = .5", ", and further dropout in the two rows with noise.")
        )
        parts += [
            f"**{level.capitalize()} level, {unit}** (lower is better; noise: {noise}, on hidden-to-hidden matrices)\n",
            f"Ours: {model['layers']} layer(s) of {model['units']}, {model['length']} symbols, batch {model['batch']}, "
            f"{config['symbols'][level]:,} different symbols, {model['train_symbols']:,} for training, {model['epochs']} epochs; "
            f"nothing but this noise. The paper: {model['paper']}{more}\n",
        ]
        rows = []
        for variant in VARIANTS:
            own = runs[(runs["level"] == level) & (runs["variant"] == variant)]
            ends = [with_range(list(own[split]), 3 if level == "character" else 1) for split in ("valid", "test")]
            rows.append((variant, len(own), *ends, *PAPER[level][variant]))
        header = "model | seeds | ours: valid | ours: test | paper (Penn Treebank): valid | paper (Penn Treebank): test"
        parts.append(report.markdown(header, rows))
    return "\n".join(parts)


def with_range(values: list[float], digits: int) -> str:
    """Their mean, and half their range where there are several."""
    if not values:
        return "not run"
    half_range = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{half_range}"


def figure(out: Path) -> None:
    """Training (dashed) and validation against epochs, mean over the seeds."""
    levels = list(report.groups(report.read_csv(out / "curves.csv"), "level"))
    fig, axes = report.panels(len(levels), 5, 3.6)
    for axis, (level, curves) in zip(axes, levels, strict=True):
        for variant in VARIANTS:
            means = curves[curves["variant"] == variant].groupby("epoch")[["train", "valid"]].mean()
            axis.plot(means.index, means["valid"], color=COLORS[variant], label=variant)
            axis.plot(means.index, means["train"], "--", color=COLORS[variant])
        unit = "bits per character" if level == "character" else "perplexity"
        axis.set(title=f"{level} level", xlabel="epoch", ylabel=unit)
        if level == "word":
            axis.set_yscale("log")
    axes[0].legend(fontsize=8, title="solid: validation, dashed: training", title_fontsize=8)
    report.save(fig, out)


def main() -> None:
    """Train, and write the tables and the figure."""
    parser = paper_parser(__doc__, QUICKLY, texts=True)
    parser.add_argument("--seeds", type=int, default=2, help="runs of each model")
    options = report.parse(parser)
    if not options.render:
        models = QUICK if options.quick else MODELS
        texts = {m.level: load_text(options.text, options.data_dir, m.level, m.vocabulary) for m in models}
        config = {
            "text": texts["word"].source,
            "symbols": {level: len(text.vocabulary) for level, text in texts.items()},
            "models": [asdict(model) for model in models],
            "noises": {level: repr(noise) for level, noise in NOISES.items()},
        }
        report.begin(options.out, config)
        jobs = [
            Job(model.level, variant, seed, model, texts[model.level])
            for seed in range(1 if options.quick else options.seeds)
            for model in models
            for variant in VARIANTS
        ]
        report.run_missing(jobs, train, options.out)
    report.write_table(options.out, table(options.out))
    figure(options.out)


if __name__ == "__main__":
    report.run_script(main)
