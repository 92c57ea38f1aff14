"""Tables 2 and 3 of the Flipout paper: language models with weight noise on the hidden-to-hidden matrices.

python scripts/paper_language_models.py --out results/paper_language_models_<hardware>_<yyyy-mm>
python scripts/paper_language_models.py --out ... --quick      # under a minute
python scripts/paper_language_models.py --out ... --render     # only table.md and figure.png again

A character LSTM with multiplicative Gaussian noise (sigma = 1; AMSGrad, orthogonal start, clipping at 1) and a word LSTM of two
layers with DropConnect (p = .5; SGD whose step is divided by 4 when validation gets worse, clipping at .25), each without noise,
with one noise sample for the batch, and with flipout. The noise is the only regulariser, and new for each batch. The epoch with
the best validation counts.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from _data import Text, load_text
from _paper import append, begin, done, options_of, read_config
from _runs import read_csv
from torch import Tensor, nn
from torch.nn import functional as F

from es_flipout.nn import DropConnect, Estimator, MultiplicativeGaussian, Noise, flipout

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
    """A language model and its training; the paper's figures in ``paper``."""

    level: Literal["character", "word"]
    units: int
    layers: int
    embedding: int
    vocabulary: int
    length: int
    batch: int
    train_symbols: int
    test_symbols: int
    epochs: int
    learning_rate: float
    clip: float
    paper: str


CHARACTERS = Model(
    level="character",
    units=128,
    layers=1,
    embedding=64,
    vocabulary=128,
    length=50,
    batch=32,
    train_symbols=60_000,
    test_symbols=30_000,
    epochs=40,
    learning_rate=0.002,
    clip=1.0,
    paper="1 layer of 1000, 100 symbols, batch 32",
)
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
MODELS = (CHARACTERS, WORDS)
_LESS: dict[str, Any] = {"units": 16, "embedding": 16, "length": 15, "batch": 10, "test_symbols": 1000, "epochs": 2}
QUICK = (replace(CHARACTERS, train_symbols=3000, **_LESS), replace(WORDS, train_symbols=1500, vocabulary=200, **_LESS))
SEEDS = 2


class LanguageModel(nn.Module):
    """Embedding, LSTM, linear."""

    def __init__(self, model: Model, symbols: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, model.embedding)
        self.lstm: nn.Module = nn.LSTM(model.embedding, model.units, model.layers)
        self.head = nn.Linear(model.units, symbols)
        for name, parameter in self.lstm.named_parameters():
            if "weight_hh" in name and model.level == "character":
                for gate in parameter.detach().chunk(4):
                    nn.init.orthogonal_(gate)

    def forward(self, symbols: Tensor, state: Any) -> tuple[Tensor, Any]:
        """``(time, batch)`` to logits ``(time, batch, symbols)`` and the state."""
        y, state = self.lstm(self.embed(symbols), state)
        return self.head(y), state


def columns(symbols: Tensor, batch: int) -> Tensor:
    """The text in ``batch`` columns, ``(time, batch)``."""
    time_ = len(symbols) // batch
    return symbols[: time_ * batch].view(batch, time_).T.contiguous()


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


def shown(level: str, nats: float) -> float:
    """Bits per character, perplexity per word."""
    return nats / math.log(2) if level == "character" else math.exp(nats)


def train(model: Model, variant: str, seed: int, text: Text, out: Path) -> None:
    """One run: epochs to ``curves.csv``, the best epoch to ``runs.csv``."""
    torch.manual_seed(seed)
    net = LanguageModel(model, len(text.vocabulary))
    if estimator := VARIANTS[variant]:
        net.lstm = flipout(net.lstm, NOISES[model.level], estimator, recurrent_only=True)
    word = model.level == "word"
    optimizer = (
        torch.optim.SGD(net.parameters(), model.learning_rate)
        if word
        else torch.optim.Adam(net.parameters(), model.learning_rate, amsgrad=True)
    )
    train_text = columns(text.train[: model.train_symbols], model.batch)
    name = {"level": model.level, "variant": variant, "seed": seed}
    best, best_test = math.inf, math.inf
    curves: list[dict[str, object]] = []
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
        valid = score(net, text.valid, model)
        curve = {"train": statistics.mean(losses), "valid": valid}
        curves.append({**name, "epoch": epoch, **{k: shown(model.level, v) for k, v in curve.items()}})
        if valid < best:
            best, best_test = valid, score(net, text.test, model)
        elif word:
            for group in optimizer.param_groups:
                group["lr"] /= 4
    seconds = time.perf_counter() - start_time
    values = {"valid": shown(model.level, best), "test": shown(model.level, best_test), "seconds": round(seconds, 1)}
    append(out / "curves.csv", curves)
    append(out / "runs.csv", [{**name, **values}])
    print(f"{model.level} {variant} seed {seed}: {values}", flush=True)


def table(out: Path) -> str:
    """The paper's tables with ours beside them, in Markdown."""
    config: Any = read_config(out)
    rows = read_csv(out / "runs.csv")
    lines = [
        f"Ours: {config['text']}; mean of the seeds ± half their range. The paper: Penn Treebank, single runs.",
        "",
    ]
    for model in config["models"]:
        level = model["level"]
        unit, noise = (
            ("bits per character", "multiplicative Gaussian, sigma = 1")
            if level == "character"
            else (
                "perplexity",
                "DropConnect, p = .5",
            )
        )
        lines += [
            f"**{level.capitalize()} level, {unit}** (lower is better; noise: {noise}, on hidden-to-hidden matrices)",
            "",
            f"Ours: {model['layers']} layer(s) of {model['units']}, {model['length']} symbols, batch {model['batch']}, "
            f"{config['symbols'][level]:,} different symbols, {model['train_symbols']:,} for training, {model['epochs']} epochs; "
            f"nothing but this noise. The paper: {model['paper']}"
            + (", and further dropout in the two rows with noise." if level == "word" else "."),
            "",
            "| model | seeds | ours: valid | ours: test | paper (Penn Treebank): valid | paper (Penn Treebank): test |",
            "|---|---|---|---|---|---|",
        ]
        for variant in VARIANTS:
            own = [row for row in rows if (row["level"], row["variant"]) == (level, variant)]
            cells = [f"{len(own)}", *(_seeds([float(row[split]) for row in own], level) for split in ("valid", "test"))]
            lines.append(f"| {variant} | {' | '.join((*cells, *PAPER[level][variant]))} |")
        lines.append("")
    return "\n".join(lines)


def _seeds(values: list[float], level: str) -> str:
    """Their mean, and half their range where there are several."""
    if not values:
        return "not run"
    digits = 3 if level == "character" else 1
    spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def figure(out: Path) -> None:
    """Training (dashed) and validation against epochs, mean over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_csv(out / "curves.csv")
    levels = list(dict.fromkeys(row["level"] for row in rows))
    fig, axes = plt.subplots(1, len(levels), figsize=(5 * len(levels), 3.6), squeeze=False)
    for axis, level in zip(axes.flat, levels, strict=True):
        for variant in VARIANTS:
            own = [row for row in rows if (row["level"], row["variant"]) == (level, variant)]
            epochs = sorted({int(row["epoch"]) for row in own})
            for split, style in (("valid", "-"), ("train", "--")):
                means = [statistics.mean(float(r[split]) for r in own if int(r["epoch"]) == epoch) for epoch in epochs]
                axis.plot(epochs, means, style, color=COLORS[variant], label=variant if split == "valid" else None)
        axis.set(
            title=f"{level} level",
            xlabel="epoch",
            ylabel="bits per character" if level == "character" else "perplexity",
        )
        if level == "word":
            axis.set_yscale("log")
    axes[0, 0].legend(fontsize=8, title="solid: validation, dashed: training", title_fontsize=8)
    fig.tight_layout()
    fig.savefig(out / "figure.png", dpi=110)
    plt.close(fig)


def main() -> None:
    """Train, and write the tables and the figure."""
    parser = options_of(__doc__, texts=True)
    parser.add_argument("--seeds", type=int, default=SEEDS, help="runs of each model")
    options = parser.parse_args()
    if not options.render:
        torch.set_num_threads(1)
        models = QUICK if options.quick else MODELS
        texts = {m.level: load_text(options.text, options.data_dir, m.level, m.vocabulary) for m in models}
        config = {
            "text": texts["word"].source,
            "symbols": {level: len(text.vocabulary) for level, text in texts.items()},
            "models": [asdict(model) for model in models],
            "noises": {level: repr(noise) for level, noise in NOISES.items()},
        }
        begin(options.out, config)
        for seed in range(1 if options.quick else options.seeds):
            for model in models:
                for variant in VARIANTS:
                    if (model.level, variant, str(seed)) in done(options.out, ("level", "variant", "seed")):
                        continue
                    train(model, variant, seed, texts[model.level], options.out)
    (options.out / "table.md").write_text(table(options.out))
    figure(options.out)


if __name__ == "__main__":
    main()
