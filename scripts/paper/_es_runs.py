"""The runs of ``es.py``: evolution strategies and backprop on a classifier, and their gradient estimates."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import mean, median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from es_flipout import EvolutionStrategy
from es_flipout.perturbations import Dense, Family, Flipout, LowRank
from es_flipout.runinfo import commit
from es_flipout.strategy.shaping import centered_ranks
from scripts import report
from scripts.paper._data import Images, load_images
from scripts.paper._paper import FLIPS, ConvLe, fitness, fully_connected

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


@dataclass(frozen=True)
class Setting:
    """Everything that all methods of a run share."""

    data: str = "digits"
    data_dir: str | None = None
    width: int = 32  # hidden units of FC (paper: 512)
    filters: int = 8  # of ConvLe's first convolution, the second has twice as many (paper: 32)
    conv_hidden: int = 32  # hidden units of ConvLe (paper: 1024)
    batch: int = 64  # images of a mini-batch
    sigma: float = 0.1
    learning_rate: float = 0.02
    backprop_learning_rate: float = 0.01
    updates: int = 100  # of one run of FC
    conv_updates: int = 40  # of one run of ConvLe
    score_every: int = 2  # updates between two scorings of the mean on all images
    draws: int = 6  # gradient estimates compared with the true gradient, for each seed
    device: str = "cpu"  # where one thread is used


@dataclass(frozen=True)
class Job(report.Job):
    """One run: ``network`` is ``fc`` or ``conv``; ``samples`` is 0 for backprop."""

    KEY = ("network", "samples", "method", "seed")
    network: str
    samples: int
    method: str
    seed: int
    setting: Setting


def run(job: Job) -> dict[str, report.Rows]:
    """One run."""
    torch.set_num_threads(1)
    setting = job.setting
    updates = setting.conv_updates if job.network == "conv" else setting.updates
    data = on_device(load_images(setting.data, setting.data_dir).standardized(), setting.device)
    module = network(job.network, job.seed, setting, data)
    update = evolution(module, job) if job.samples else backprop(module, setting)
    scored: list[dict[str, float]] = []
    seconds = []
    for i, (x, y) in enumerate(batches(data, setting.batch, updates, job.seed)):
        start = clock(setting.device)
        mean_module = update(x, y)
        seconds.append(clock(setting.device) - start)
        if (i + 1) % setting.score_every == 0:
            scored.append({"update": i + 1, **scores(mean_module(), data)})
    last = scored[-5:]  # the step size is constant, so single scores are noisy
    row = {
        **job.key,
        "updates": updates,
        **{name: mean(values[name] for values in last) for name in ("train_loss", "train_error", "test_error")},
        "updates_to_goal": next((values["update"] for values in scored if values["train_error"] <= GOAL), None),
        "seconds_per_update": median(seconds),
        "commit": commit(),
    }
    draws = gradient_draws(job, data) if job.samples else []
    return {
        "runs": [row],
        "curves": [{**job.key, **values} for values in scored],
        "draws": [{**job.key, **draw} for draw in draws],
    }


def network(kind: str, seed: int, setting: Setting, data: Images) -> nn.Module:
    """The mean from which the runs of one seed start."""
    torch.manual_seed(seed)
    if kind == "conv":
        module = ConvLe(data.shape, setting.filters, setting.conv_hidden, data.classes)
    else:
        module = fully_connected(data.shape, setting.width, data.classes)
    return module.to(setting.device)


def batches(data: Images, size: int, count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """``count`` mini-batches drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        index = torch.randint(len(data.train_x), (size,), generator=generator).to(data.train_x.device)
        yield data.train_x[index], data.train_y[index]


Update = Callable[[Tensor, Tensor], Callable[[], nn.Module]]
"""One update on a mini-batch; returns a function that returns the trained module."""


def backprop(module: nn.Module, setting: Setting) -> Update:
    """A step of Adam on the mini-batch."""
    optimizer = torch.optim.Adam(module.parameters(), setting.backprop_learning_rate)

    def update(x: Tensor, y: Tensor) -> Callable[[], nn.Module]:
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimizer.step()
        return lambda: module

    return update


def strategy_for(module: nn.Module, job: Job) -> EvolutionStrategy:
    """The paper's evolution strategy; a block of rows holds the samples that share a base."""
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


def evolution(module: nn.Module, job: Job) -> Update:
    """A generation on the mini-batch."""
    strategy = strategy_for(module, job)

    def update(x: Tensor, y: Tensor) -> Callable[[], nn.Module]:
        strategy.tell(fitness(strategy.ask(), x, y))
        return strategy.mean_module

    return update


def gradient_draws(job: Job, data: Images) -> report.Rows:
    """Cosine between the estimated and the true gradient of one mini-batch, at a partially trained network."""
    module = network(job.network, job.seed, job.setting, data)
    update = backprop(module, job.setting)
    for x, y in batches(data, job.setting.batch, 20, job.seed + 1000):
        update(x, y)
    x, y = next(batches(data, job.setting.batch, 1, job.seed + 2000))
    module.zero_grad()
    (-F.cross_entropy(module(x), y)).backward()
    true = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
    rows: report.Rows = []
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
