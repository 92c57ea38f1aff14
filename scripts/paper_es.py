r"""Evolution strategies on a classifier: figures 2b to 2d of the Flipout paper (Wen et al., ICLR 2018, sections 4.4 and E.3).

python scripts/paper_es.py --quick                                           # under a minute, into runs/paper_es_quick
python scripts/paper_es.py --out results/paper_es_<hardware>_<yyyy-mm>       # a quarter of an hour of one core
python scripts/paper_es.py --out ... --render                                # only table.md and figure.png again
python scripts/paper_es.py --out ... --data mnist --data-dir DIR --width 512 --filters 32 --conv-hidden 1024 \
    --updates 12000 --conv-updates 4000 --device cuda --processes 1          # the paper's own sizes

The question is whether flipout loses anything, update by update, against an independent perturbation for every sample. From
the paper: the shapes of the networks, 1,600 and 5,000 samples for each update, N = 40 flips for each base, neither antithetic
pairs nor weight decay. Chosen here, because the paper does not say: the fitness is minus the cross-entropy of a mini-batch that
all samples share; its centered ranks are the weights of the update; Adam; sigma, the steps and the batch as in ``Setting``. Runs
of one seed start from the same weights and see the same mini-batches, whatever the perturbations.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from _data import IMAGES, Images, load_images
from _runs import append_csv, default_processes, read_csv, run_script, write_environment
from torch import Tensor, nn

from es_flipout import EvolutionStrategy
from es_flipout.errors import UserError
from es_flipout.perturbations import Dense, Family, Flipout, LowRank
from es_flipout.population import Population
from es_flipout.shaping import centered_ranks

FLIPS = 40
GOAL = 0.1  # training error whose first update is tabulated
SMALL_SIGMA = 0.01  # where the fitness is nearly linear
BACKPROP = "backprop"
INDEPENDENT = "independent"
FAMILIES: dict[str, Callable[[int], Family]] = {
    INDEPENDENT: lambda samples: Dense(),
    "flipout, 40 flips a base": lambda samples: Flipout("gaussian", samples // FLIPS),
    "flipout ±1, 40 flips a base": lambda samples: Flipout("rademacher", samples // FLIPS),
    "flipout, one base": lambda samples: Flipout("gaussian", 1),
    "flipout ±1, one base": lambda samples: Flipout("rademacher", 1),
    "low rank 1": lambda samples: LowRank(1),
}
PAPERS_OWN = (INDEPENDENT, "flipout, 40 flips a base")
RUN_COLUMNS = (
    "network",
    "samples",
    "method",
    "seed",
    "updates",
    "train_loss",
    "train_error",
    "test_error",
    "updates_to_goal",
    "seconds_per_update",
    "commit",
)
CURVE_COLUMNS = ("network", "samples", "method", "seed", "update", "train_loss", "train_error", "test_error")
DRAW_COLUMNS = ("network", "samples", "method", "seed", "sigma", "draw", "cosine")


@dataclass(frozen=True)
class Setting:
    """Everything that all methods of a run share.

    Attributes:
        data, data_dir: images, and where their files are.
        width: hidden units of FC (paper: 512).
        filters: of ConvLe's first convolution, the second has twice as many (paper: 32).
        conv_hidden: hidden units of ConvLe (paper: 1024).
        batch: images of a mini-batch.
        sigma: perturbation standard deviation.
        learning_rate, backprop_learning_rate: of Adam.
        updates: of one run of FC.
        conv_updates: of one run of ConvLe.
        score_every: updates between two scorings of the mean on all images.
        draws: gradient estimates compared with the true gradient, for each seed.
        device: where to compute; CPU runs use one thread each.
    """

    data: str = "digits"
    data_dir: str | None = None
    width: int = 32
    filters: int = 8
    conv_hidden: int = 32
    batch: int = 64
    sigma: float = 0.1
    learning_rate: float = 0.02
    backprop_learning_rate: float = 0.01
    updates: int = 100
    conv_updates: int = 40
    score_every: int = 2
    draws: int = 6
    device: str = "cpu"


@dataclass(frozen=True)
class Job:
    """One run: ``network`` is ``fc`` or ``conv``; ``samples`` is 0 for backprop."""

    network: str
    samples: int
    method: str
    seed: int
    setting: Setting


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


def main() -> None:
    """Run what is missing in ``--out`` and write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the updates, 400 samples, one seed, no 5,000")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--data", choices=IMAGES, default="digits")
    parser.add_argument("--data-dir")
    parser.add_argument("--networks", nargs="+", choices=("fc", "conv"), default=["fc", "conv"])
    parser.add_argument("--width", type=int, default=Setting.width, help="hidden units of FC")
    parser.add_argument("--filters", type=int, default=Setting.filters, help="of ConvLe's first convolution")
    parser.add_argument("--conv-hidden", type=int, default=Setting.conv_hidden, help="hidden units of ConvLe")
    parser.add_argument("--updates", type=int, default=Setting.updates, help="of FC")
    parser.add_argument("--conv-updates", type=int, default=Setting.conv_updates, help="of ConvLe")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=default_processes())
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    if options.out is None:
        if not options.quick:
            raise UserError("say where the results go: --out DIRECTORY (or --quick)")
        options.out = Path("runs/paper_es_quick")
    if not options.render:
        fewest = min(options.updates, options.conv_updates)
        if fewest < 10:
            raise UserError(f"updates must be at least 10, got {fewest}")
        load_images(options.data, options.data_dir)  # complains now about missing files
        setting = Setting(
            data=options.data,
            data_dir=options.data_dir,
            width=options.width,
            filters=options.filters,
            conv_hidden=options.conv_hidden,
            updates=options.updates,
            conv_updates=options.conv_updates,
            score_every=max(min(options.updates, options.conv_updates) // 50, 2),
            device=options.device,
        )
        run_all(list(jobs_of(options, setting)), options.out, options.processes)
    text = table(options.out)
    (options.out / "table.md").write_text(text, encoding="utf-8")
    figure(options.out)
    if options.quick:
        print(text)


def jobs_of(options: argparse.Namespace, setting: Setting) -> Iterator[Job]:
    """The runs, those of one seed together; the costly ones have fewer seeds or methods."""
    if options.quick:
        setting = dataclasses.replace(setting, updates=10, conv_updates=10, score_every=2, draws=2)
        for network in options.networks:
            for method in (*PAPERS_OWN, BACKPROP):
                yield Job(network, 0 if method == BACKPROP else 10 * FLIPS, method, 0, setting)
        return
    few = options.seeds[:3]
    for seed in options.seeds:
        if "fc" in options.networks:
            yield Job("fc", 0, BACKPROP, seed, setting)
            for method in FAMILIES:
                yield Job("fc", 1600, method, seed, setting)
    for seed in few:
        if "fc" in options.networks:
            for method in (*PAPERS_OWN, "flipout ±1, one base", "low rank 1"):
                yield Job("fc", 5000, method, seed, setting)
    for seed in few:
        if "conv" in options.networks:
            yield Job("conv", 0, BACKPROP, seed, setting)
            for method in PAPERS_OWN:
                yield Job("conv", 1600, method, seed, setting)


def run_all(jobs: list[Job], out: Path, processes: int) -> None:
    """Run the jobs that ``out/runs.csv`` does not hold yet; a directory holds runs of one setting only.

    Raises:
        UserError: the directory holds runs of another setting.
    """
    out.mkdir(parents=True, exist_ok=True)
    config = json.dumps(dataclasses.asdict(jobs[0].setting), indent=2) + "\n"
    path = out / "config.json"
    if path.exists() and path.read_text() != config:
        raise UserError(f"{path} is another setting: choose another --out")
    path.write_text(config)
    done = {(r["network"], r["samples"], r["method"], r["seed"]) for r in read_csv(out / "runs.csv")}
    todo = [job for job in jobs if (job.network, str(job.samples), job.method, str(job.seed)) not in done]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(run, job) for job in todo]):
            row, curve, draws = future.result()
            append_csv(out / "curves.csv", CURVE_COLUMNS, curve)
            append_csv(out / "draws.csv", DRAW_COLUMNS, draws)
            append_csv(out / "runs.csv", RUN_COLUMNS, [row])
            print(
                f"{row['network']}, {row['samples']} samples, {row['method']}, seed {row['seed']}: "
                f"training loss {row['train_loss']:.3f}, {row['seconds_per_update']:.3f} s an update",
                flush=True,
            )
    write_environment(out)


def run(job: Job) -> tuple[dict[str, object], list[dict[str, object]], list[dict[str, object]]]:
    """One run: rows of ``runs.csv``, ``curves.csv`` and ``draws.csv``."""
    from es_flipout.runinfo import commit

    torch.set_num_threads(1)
    setting = job.setting
    updates = setting.conv_updates if job.network == "conv" else setting.updates
    data = on_device(load_images(setting.data, setting.data_dir).standardised(), setting.device)
    module = network(job, data)
    name = {"network": job.network, "samples": job.samples, "method": job.method, "seed": job.seed}
    update = backprop(module, job) if job.samples == 0 else evolution(module, job)
    curve: list[dict[str, object]] = []
    seconds = []
    for i, (x, y) in enumerate(batches(data, setting.batch, updates, job.seed)):
        start = clock(setting.device)
        mean = update(x, y)
        seconds.append(clock(setting.device) - start)
        if (i + 1) % setting.score_every == 0:
            curve.append({**name, "update": i + 1, **scores(mean(), data)})
    last = curve[-5:]  # the step size stays, so single scorings jump
    row: dict[str, object] = {
        **name,
        "updates": updates,
        **{
            key: statistics.mean(float(str(r[key])) for r in last)
            for key in ("train_loss", "train_error", "test_error")
        },
        "updates_to_goal": next((r["update"] for r in curve if float(str(r["train_error"])) <= GOAL), ""),
        "seconds_per_update": statistics.median(seconds),
        "commit": commit(),
    }
    return row, curve, [{**name, **draw} for draw in gradient_draws(job, data)] if job.samples else []


def network(job: Job, data: Images) -> nn.Module:
    """The mean that the runs of one seed start from."""
    torch.manual_seed(job.seed)
    if job.network == "conv":
        setting = job.setting
        return ConvLe(data.shape, setting.filters, setting.conv_hidden, data.classes).to(setting.device)
    width = job.setting.width
    return nn.Sequential(
        nn.Flatten(-3),
        nn.Linear(math.prod(data.shape), width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, data.classes),
    ).to(job.setting.device)


def batches(data: Images, size: int, count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """``count`` mini-batches drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        index = torch.randint(len(data.train_x), (size,), generator=generator).to(data.train_x.device)
        yield data.train_x[index], data.train_y[index]


def backprop(module: nn.Module, job: Job) -> Callable[[Tensor, Tensor], Callable[[], nn.Module]]:
    """A step of Adam on the mini-batch, as a function that returns the way to the trained module."""
    optimizer = torch.optim.Adam(module.parameters(), job.setting.backprop_learning_rate)

    def update(x: Tensor, y: Tensor) -> Callable[[], nn.Module]:
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimizer.step()
        return lambda: module

    return update


def strategy_for(module: nn.Module, job: Job) -> EvolutionStrategy:
    """The paper's evolution strategy; a block of rows is as many samples as share a base."""
    return EvolutionStrategy(
        module,
        population_size=job.samples,
        sigma=job.setting.sigma,
        perturbation=FAMILIES[job.method](job.samples),
        learning_rate=job.setting.learning_rate,
        antithetic=False,
        seed=job.seed,
        row_block=FLIPS,
    )


def evolution(module: nn.Module, job: Job) -> Callable[[Tensor, Tensor], Callable[[], nn.Module]]:
    """A generation on the mini-batch, as a function that returns the way to the mean module."""
    strategy = strategy_for(module, job)

    def update(x: Tensor, y: Tensor) -> Callable[[], nn.Module]:
        population = strategy.ask()
        strategy.tell(fitness(population, x, y))
        return strategy.mean_module

    return update


def fitness(population: Population, x: Tensor, y: Tensor) -> Tensor:
    """Minus the cross-entropy of every sample on the same ``(B, C, H, W)`` images: ``(P,)``."""
    logits = population(x.expand(population.size, *x.shape))
    losses = F.cross_entropy(logits.flatten(0, 1), y.repeat(population.size), reduction="none")
    return -losses.view(population.size, -1).mean(1)


def gradient_draws(job: Job, data: Images) -> list[dict[str, object]]:
    """Cosine between the estimated and the true gradient of one mini-batch, at a partially trained network."""
    module = network(job, data)
    update = backprop(module, job)
    for x, y in batches(data, job.setting.batch, 20, job.seed + 1000):
        update(x, y)
    x, y = next(batches(data, job.setting.batch, 1, job.seed + 2000))
    module.zero_grad()
    (-F.cross_entropy(module(x), y)).backward()
    true = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
    rows: list[dict[str, object]] = []
    strategy = strategy_for(module, job)
    for strategy.sigma in (SMALL_SIGMA, job.setting.sigma):
        for strategy.generation in range(job.setting.draws):
            population = strategy.ask()
            total = population.weighted_sum(centered_ranks(fitness(population, x, y)))
            estimate = torch.cat([total[name].flatten() for name, _ in module.named_parameters()])
            cosine = float(F.cosine_similarity(estimate, true, 0))
            rows.append({"sigma": strategy.sigma, "draw": strategy.generation, "cosine": cosine})
    return rows


@torch.no_grad()
def scores(module: nn.Module, data: Images) -> dict[str, float]:
    """Loss and error (in [0, 1]) of the module on all images."""
    train, test = module(data.train_x), module(data.test_x)
    return {
        "train_loss": float(F.cross_entropy(train, data.train_y)),
        "train_error": float((train.argmax(1) != data.train_y).float().mean()),
        "test_error": float((test.argmax(1) != data.test_y).float().mean()),
    }


def on_device(data: Images, device: str) -> Images:
    """The images on the device."""
    tensors = {name: getattr(data, name).to(device) for name in ("train_x", "train_y", "test_x", "test_y")}
    return dataclasses.replace(data, **tensors)


def clock(device: str) -> float:
    """Seconds: of this process's CPU time (others use the machine too), or on the wall once the GPU has finished."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


# Table and figure


def table(out: Path) -> str:
    """Everything measured, in Markdown, with the paper's figures beside it."""
    setting = Setting(**json.loads((out / "config.json").read_text()))
    rows = read_csv(out / "runs.csv")
    return "\n".join([*_learning(rows, setting), "", *_gradients(out, setting), "", *_paper(rows, setting)]) + "\n"


def _learning(rows: list[dict[str, str]], setting: Setting) -> list[str]:
    lines = [
        f"Data: **{setting.data}** ({_SOURCES[setting.data]}; the paper's is MNIST). "
        f"FC: {setting.width}-{setting.width}-10; Conv: LeNet with {setting.filters} and {2 * setting.filters} filters and "
        f"{setting.conv_hidden} hidden units. {setting.updates} updates (ConvLe: {setting.conv_updates}), "
        f"mini-batches of {setting.batch}, "
        f"sigma {setting.sigma}, Adam with step {setting.learning_rate} (backprop: {setting.backprop_learning_rate}). "
        "Mean ± standard error over the seeds; final values are means of the last five scorings. The difference is the mean "
        "of the differences of runs from the same seed.",
        "",
        "| network | samples an update | perturbations | seeds | training loss | its difference to independent | training error |"
        " test error | updates to 10 % training error | seconds an update | ÷ backprop |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for network_name, samples, method in _groups(rows):
        own = _runs_of(rows, network_name, samples, method)
        backprop_s = [float(r["seconds_per_update"]) for r in _runs_of(rows, network_name, "0", BACKPROP).values()]
        seconds = statistics.median(float(r["seconds_per_update"]) for r in own.values())
        reference = _runs_of(rows, network_name, samples, INDEPENDENT)
        differences = [
            float(r["train_loss"]) - float(reference[s]["train_loss"]) for s, r in own.items() if s in reference
        ]
        reached = [float(r["updates_to_goal"]) for r in own.values() if r["updates_to_goal"]]
        cells = [
            _NETWORKS[network_name],
            "" if samples == "0" else f"{int(samples):,}",
            method,
            str(len(own)),
            _mean([float(r["train_loss"]) for r in own.values()], ".3f"),
            _mean(differences, "+.3f") if differences and method != INDEPENDENT else "",
            _mean([float(r["train_error"]) for r in own.values()], ".1%"),
            _mean([float(r["test_error"]) for r in own.values()], ".1%"),
            _mean(reached, ".0f") if len(reached) == len(own) else f"{len(reached)} of {len(own)} seeds",
            f"{seconds:.4f}" if seconds < 0.01 else f"{seconds:.3f}",
            f"{seconds / statistics.median(backprop_s):,.0f}" if backprop_s else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    unit = "CPU time of one thread, on a machine that was shared" if setting.device == "cpu" else f"on {setting.device}"
    return [*lines, "", f"Seconds: median over the updates and then over the seeds; {unit}."]


def _gradients(out: Path, setting: Setting) -> list[str]:
    rows = read_csv(out / "draws.csv")
    sigmas = sorted({r["sigma"] for r in rows}, key=float)
    lines = [
        "Cosine between one update's estimate and the true gradient of its mini-batch, at a network after 20 steps of "
        "backprop (mean ± standard error over draws and seeds; in brackets: ÷ independent), at a small sigma and at that of the "
        "runs. Predicted for a linear fitness without shaping: 1 / sqrt(1 + e), with D weights and M bases of N samples "
        "e = ((D + 1) / N + 2 (N - 1) / N) / M for Gaussian bases, (D - 1) / (M N) for ±1, (D + 1) / (M N) for independent "
        "samples. Ranks cost a little more; curvature, at the sigma of the runs, more.",
        "",
        "| network | samples | perturbations | predicted | " + " | ".join(f"sigma {sigma}" for sigma in sigmas) + " |",
        "|---|---|---|---|" + "---|" * len(sigmas),
    ]
    for group in _groups(rows):
        network_name, samples, method = group
        weights = _weights(network_name, setting)
        reference = predicted_cosine(weights, int(samples), Dense())
        predicted = predicted_cosine(weights, int(samples), FAMILIES[method](int(samples)))
        cells = [f"{predicted:.4f} ({predicted / reference:.3f})" if predicted and reference else ""]
        for sigma in sigmas:
            own = [float(r["cosine"]) for r in _rows_of(rows, *group) if r["sigma"] == sigma]
            beside = _rows_of(rows, network_name, samples, INDEPENDENT)
            independent = [float(r["cosine"]) for r in beside if r["sigma"] == sigma]
            ratio = f" ({statistics.mean(own) / statistics.mean(independent):.3f})" if independent else ""
            cells.append(_mean(own, ".4f") + ratio)
        lines.append(f"| {_NETWORKS[network_name]} | {int(samples):,} | {method} | " + " | ".join(cells) + " |")
    return lines


def predicted_cosine(weights: int, samples: int, family: Family) -> float | None:
    """Of an estimate with the gradient of a linear fitness; None where no formula is at hand (low rank)."""
    if isinstance(family, Dense):
        error = (weights + 1) / samples
    elif isinstance(family, Flipout):
        flips = samples / family.bases
        gaussian = ((weights + 1) / flips + 2 * (flips - 1) / flips) / family.bases
        error = gaussian if family.base == "gaussian" else (weights - 1) / samples
    else:
        return None
    return 1 / math.sqrt(1 + error)


def _paper(rows: list[dict[str, str]], setting: Setting) -> list[str]:
    """What the paper says beside what was measured."""

    def loss_of(network_name: str) -> str:
        flipped = _runs_of(rows, network_name, "1600", PAPERS_OWN[1])
        reference = _runs_of(rows, network_name, "1600", INDEPENDENT)
        shared = [s for s in flipped if s in reference]
        if not shared:
            return "not run"
        loss = _mean([float(flipped[s]["train_loss"]) - float(reference[s]["train_loss"]) for s in shared], "+.3f")
        error = _mean([float(flipped[s]["test_error"]) - float(reference[s]["test_error"]) for s in shared], "+.1%")
        return f"training loss {loss}, test error {error} (flipout minus independent, final, {len(shared)} seeds)"

    def times_backprop(network_name: str) -> str:
        cells = []
        for samples in ("1600", "5000"):
            own = _runs_of(rows, network_name, samples, PAPERS_OWN[1]).values()
            steps = _runs_of(rows, network_name, "0", BACKPROP).values()
            if own and steps:
                ratio = statistics.median(float(r["seconds_per_update"]) for r in own) / statistics.median(
                    float(r["seconds_per_update"]) for r in steps
                )
                cells.append(f"{ratio:,.0f} ({int(samples):,} samples)")
        return ", ".join(cells) or "not run"

    def updates_of(network_name: str) -> str:
        cells = []
        for samples, method in (("0", BACKPROP), ("1600", PAPERS_OWN[1]), ("5000", PAPERS_OWN[1])):
            own = _runs_of(rows, network_name, samples, method).values()
            if own:
                label = "backprop" if samples == "0" else f"flipout {int(samples):,}"
                reached = [float(r["updates_to_goal"]) for r in own if r["updates_to_goal"]]
                mean = f"{statistics.mean(reached):.0f}" if reached else "not reached"
                some = f" ({len(reached)} of {len(own)} seeds)" if 0 < len(reached) < len(own) else ""
                cells.append(f"{label}: {mean}{some}")
        return ", ".join(cells) or "not run"

    return [
        f"| | paper (MNIST, 512-512-10 or LeNet 32-64-1024) | ours ({setting.data}, the sizes above) |",
        "|---|---|---|",
        "| 2b: flipout against independent, FC, 1,600 samples | “no loss in performance”, 12,000 updates | "
        f"{loss_of('fc')} |",
        f"| the same on the convolutional net, 1,600 samples | not shown | {loss_of('conv')} |",
        f"| 2c: data efficiency, FC | “comparable” with backprop over 20,000 updates | updates to 10 % training error: "
        f"{updates_of('fc')} |",
        f"| 2d: data efficiency, convolutional net | the same, 4,000 updates | updates to 10 % training error "
        f"(of {setting.conv_updates}): {updates_of('conv')} |",
        f"| cost of an update ÷ backprop | about 60 (a GPU, not named) | FC: {times_backprop('fc')}; ConvLe: "
        f"{times_backprop('conv')} |",
        "| final error | curves only, axes from 0 to 7 % (2b, 2c) and 5 % (2d) | see the first table |",
    ]


def figure(out: Path) -> None:
    """Training loss of the mean against updates, mean and standard error over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    setting = Setting(**json.loads((out / "config.json").read_text()))
    curves = read_csv(out / "curves.csv")
    flipout = PAPERS_OWN[1]
    panels = {
        "FC, 1,600 samples (Fig. 2b)": [("fc", "1600", method) for method in FAMILIES],
        "FC (Fig. 2c)": [
            ("fc", "1600", flipout),
            ("fc", "5000", flipout),
            ("fc", "5000", INDEPENDENT),
            ("fc", "0", BACKPROP),
        ],
        "ConvLe, 1,600 samples (Fig. 2d)": [("conv", "1600", method) for method in PAPERS_OWN]
        + [("conv", "0", BACKPROP)],
    }
    if not any(r["samples"] == "1600" for r in curves):
        panels = {name: [g for g in _groups(curves) if g[0] == name] for name in ("fc", "conv")}
    panels = {t: [g for g in groups if _rows_of(curves, *g)] for t, groups in panels.items()}
    panels = {title: groups for title, groups in panels.items() if groups}
    fig, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.8), squeeze=False)
    for axis, (title, groups) in zip(axes.flat, panels.items(), strict=True):
        for color, (network_name, samples, method) in enumerate(groups):
            own = _rows_of(curves, network_name, samples, method)
            updates = sorted({int(r["update"]) for r in own})
            losses = [[float(r["train_loss"]) for r in own if int(r["update"]) == u] for u in updates]
            means = [statistics.mean(values) for values in losses]
            errors = [_standard_error(values) for values in losses]
            many = len({g[1] for g in groups} - {"0"}) > 1 and samples != "0"
            axis.plot(
                updates, means, color=f"C{color}", label=f"{method}, {int(samples):,}" if many else method, lw=1.3
            )
            low, high = ([m + sign * e for m, e in zip(means, errors, strict=True)] for sign in (-1, 1))
            axis.fill_between(updates, low, high, color=f"C{color}", alpha=0.2, linewidth=0)
        axis.set_yscale("log")
        axis.set_title(f"{title}: {setting.data}", fontsize=10)
        axis.set_xlabel("updates")
        axis.legend(fontsize=7)
    axes.flat[0].set_ylabel("training loss of the mean")
    fig.tight_layout()
    fig.savefig(out / "figure.png", dpi=110)


_NETWORKS = {"fc": "FC", "conv": "ConvLe"}
_SOURCES = {
    "digits": "scikit-learn's bundled 8x8 digits, 1,440 for training, 357 for testing",
    "mnist": "the standard files",
    "cifar10": "the standard files",
}


def _groups(rows: list[dict[str, str]]) -> list[tuple[str, str, str]]:
    """Network, samples and method, in a fixed order."""
    methods = [BACKPROP, *FAMILIES]
    groups = {(r["network"], r["samples"], r["method"]) for r in rows}
    return sorted(groups, key=lambda g: (("fc", "conv").index(g[0]), int(g[1]), methods.index(g[2])))


def _rows_of(rows: list[dict[str, str]], *group: str) -> list[dict[str, str]]:
    return [r for r in rows if (r["network"], r["samples"], r["method"]) == group]


def _runs_of(rows: list[dict[str, str]], *group: str) -> dict[str, dict[str, str]]:
    """By seed."""
    return {r["seed"]: r for r in _rows_of(rows, *group)}


def _weights(network_name: str, setting: Setting) -> int:
    """Entries of the weight matrices and kernels (biases have noise of their own in every family)."""
    data = load_images(setting.data, setting.data_dir)
    module = network(Job(network_name, 0, BACKPROP, 0, setting), data)
    return sum(p.numel() for p in module.parameters() if p.ndim > 1)


def _standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def _mean(values: list[float], form: str) -> str:
    """Mean ± standard error."""
    if not values:
        return ""
    mean, error = format(statistics.mean(values), form), _standard_error(values)
    return mean if math.isnan(error) else f"{mean} ± {format(error, form.lstrip('+'))}"


if __name__ == "__main__":
    run_script(main)
