r"""Time of one ES update: figure 5 of the Flipout paper (Wen et al., ICLR 2018), and what it leaves out.

python scripts/paper_update_time.py --quick                                              # seconds, into runs/
python scripts/paper_update_time.py --out results/paper_update_time_<hardware>_<yyyy-mm>     # about ten minutes on two cores
python scripts/paper_update_time.py --out ... --device cuda                              # all 5,000 samples, on a GPU
python scripts/paper_update_time.py --out ... --render                                   # only table.md and figure.png again

The paper's figure has flipout on a GPU (FlipES) beside standard ES on 40 cores (cpuES); it never compares flipout with
independent perturbations on the same device. Here stand side by side, for the same networks and 5,000 samples an update:

- ``flipout``: FlipES, 125 Gaussian bases of 40 flips each; and flipout as the engine does it by default, one base of ±1;
- ``independent``: every sample has its own weights, made chunk by chunk and made again from their seed for the gradient (all
  of them at once do not fit); the forward is a batched matrix product (convolutions: of patches) or ``torch.func.vmap``;
- ``low rank``: rank one (EGGROLL);
- ``cpuES``: a process for each core, sample after sample, noise from seeds; a worker sums up its own part of the gradient,
  so nothing of the size of the weights travels but the mean and that sum, through shared memory.

An update: noise, forward of all samples on one mini-batch, cross-entropy, centered ranks, gradient, Adam. From the paper:
networks (784-h-h-10; LeNet with 32 and 64 filters times the scale), 5,000 samples, 40 flips. It does not say the mini-batch:
here 64 images of 28x28 that all samples share (as in paper_es.py), of random numbers, because time does not depend on them;
and the convolutional net keeps its 1,024 hidden units at every scale.

On a CPU everything but cpuES has one thread. There the large networks are measured with fewer samples and scaled in proportion
to 5,000; ``table.md`` says which.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from _paper import append, begin, done, read_config
from _runs import default_processes, read_csv, run_script
from paper_es import FLIPS, ConvLe, fitness
from torch import Tensor, nn

from es_flipout import EvolutionStrategy
from es_flipout.errors import UserError
from es_flipout.perturbations import Family, Flipout, LowRank
from es_flipout.shaping import centered_ranks

SAMPLES = 5000
SIGMA, LEARNING_RATE, SEED = 0.1, 0.02, 0
PAPER_CORES = 40
CLASSES, SHAPE = 10, (1, 28, 28)
FLIPES, CPU_ES = "flipout, 40 flips a base", "cpuES"
FAMILIES: dict[str, Callable[[int], Family]] = {
    FLIPES: lambda samples: Flipout("gaussian", max(samples // FLIPS, 1)),
    "flipout ±1, one base": lambda samples: Flipout("rademacher", 1),
    "low rank 1": lambda samples: LowRank(1),
}
INDEPENDENT: dict[str, Literal["bmm", "vmap"]] = {"independent, bmm": "bmm", "independent, vmap": "vmap"}
METHODS = (*FAMILIES, *INDEPENDENT, CPU_ES)
# Size to seconds an update of the paper's FlipES (one GPU, not named) and cpuES (40 cores).
PAPER: dict[str, dict[float, tuple[float, float]]] = {
    "fc": {32: (0.12, 0.51), 128: (0.13, 1.22), 512: (0.18, 5.10), 2048: (1.86, 38.0)},
    "conv": {0.25: (2.3, 16.0), 0.75: (5.48, 46.0), 1.0: (7.12, 67.0), 1.5: (11.77, 132.0)},
}
# Samples measured on a CPU: what keeps an update of every network at a few seconds; multiples of 40.
CPU_SAMPLES: dict[str, dict[float, int]] = {
    "fc": {32: 2000, 128: 1000, 512: 200, 2048: 40},
    "conv": {0.25: 80, 0.75: 40, 1.0: 40, 1.5: 40},
}
COLUMNS = ("network", "size", "method", "samples", "processes", "round", "seconds", "commit")


def main() -> None:
    """Measure what is missing in ``--out`` and write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the two smallest networks, 40 samples, one round")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--fc", nargs="*", type=int, default=list(PAPER["fc"]), help="hidden units of the FC net")
    parser.add_argument("--conv", nargs="*", type=float, default=list(PAPER["conv"]), help="filter scales of the LeNet")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--samples", type=int, help="measured, for every network; default: by size on a CPU, 5,000 on a GPU"
    )
    parser.add_argument("--batch", type=int, default=64, help="images of a mini-batch")
    parser.add_argument("--rounds", type=int, default=3, help="timed updates; one more before them does not count")
    parser.add_argument("--processes", type=int, default=default_processes(), help="of cpuES")
    parser.add_argument(
        "--chunk-mib", type=int, help="memory of a chunk of independent samples; default: 256, on a GPU 8192"
    )
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    if options.out is None:
        if not options.quick:
            raise UserError("say where the results go: --out DIRECTORY (or --quick)")
        options.out = Path("runs/paper_update_time_quick")
    if options.quick:
        options.fc, options.conv, options.samples, options.rounds = [32], [0.25], FLIPS, 1
    if not options.render:
        measure_all(options)
    (options.out / "table.md").write_text(table(options.out), encoding="utf-8")
    figure(options.out)
    if options.quick:
        print(table(options.out))


def measure_all(options: argparse.Namespace) -> None:
    """Measure what ``runs.csv`` does not hold yet.

    Raises:
        UserError: there is no GPU, or a number is out of range.
    """
    from es_flipout.runinfo import commit

    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here")
    for name in ("samples", "batch", "rounds", "processes"):
        value = getattr(options, name)
        if value is not None and value < (2 if name == "samples" else 1):
            raise UserError(f"--{name} must be at least {2 if name == 'samples' else 1}, got {value}")
    torch.set_num_threads(1)
    chunk_mib = options.chunk_mib or (8192 if options.device == "cuda" else 256)
    names = ("device", "batch", "rounds", "processes", "samples")
    begin(options.out, {name: getattr(options, name) for name in names} | {"chunk_mib": chunk_mib})
    measured = done(options.out, COLUMNS[:3])
    for network, size in [*(("fc", float(h)) for h in options.fc), *(("conv", s) for s in options.conv)]:
        if network == "fc":
            size = int(size)
        samples = options.samples or (CPU_SAMPLES[network].get(size, FLIPS) if options.device == "cpu" else SAMPLES)
        for method in options.methods:
            if (network, str(size), method) in measured:
                continue
            task = Task(network, size, options.batch, options.device)
            seconds = rounds(task, method, samples, options.rounds, options.processes, chunk_mib)
            fixed = {"network": network, "size": size, "method": method, "samples": samples}
            fixed["processes"] = options.processes if method == CPU_ES else 1
            append(
                options.out / "runs.csv",
                [{**fixed, "round": i, "seconds": s, "commit": commit()} for i, s in enumerate(seconds)],
            )
            print(f"{network} {size}, {method}: {statistics.median(seconds):.3f} s for {samples} samples", flush=True)


@dataclass(frozen=True)
class Task:
    """A network and a mini-batch; ``network`` is ``fc`` or ``conv``, ``size`` its hidden units or filter scale."""

    network: str
    size: float
    batch: int
    device: str

    def module(self) -> nn.Module:
        """The mean."""
        torch.manual_seed(SEED)
        if self.network == "conv":
            return ConvLe(SHAPE, round(32 * self.size), 1024, CLASSES).to(self.device)
        width, inputs = int(self.size), SHAPE[1] * SHAPE[2]
        return nn.Sequential(
            nn.Flatten(-3),
            nn.Linear(inputs, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, CLASSES),
        ).to(self.device)

    def images(self) -> tuple[Tensor, Tensor]:
        """``(B, 1, 28, 28)`` and ``(B,)``."""
        generator = torch.Generator().manual_seed(SEED)
        x = torch.randn(self.batch, *SHAPE, generator=generator)
        y = torch.randint(CLASSES, (self.batch,), generator=generator)
        return x.to(self.device), y.to(self.device)


def rounds(task: Task, method: str, samples: int, count: int, processes: int, chunk_mib: int) -> list[float]:
    """Seconds of ``count`` updates, after one that does not count."""
    if method == CPU_ES:
        with Workers(Task(task.network, task.size, task.batch, "cpu"), samples, processes) as workers:
            return [_seconds("cpu", workers.update) for _ in range(count + 1)][1:]
    if method in FAMILIES:
        update = population_update(task, FAMILIES[method](samples), samples)
    else:
        update = Independent(task, samples, INDEPENDENT[method], chunk_mib << 20).update
    return [_seconds(task.device, update) for _ in range(count + 1)][1:]


def _seconds(device: str, update: Callable[[], object]) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    update()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def population_update(task: Task, family: Family, samples: int) -> Callable[[], object]:
    """A generation of the engine; samples that share a base share a block of rows, else the engine chooses."""
    x, y = task.images()
    flipes = isinstance(family, Flipout) and family.base == "gaussian"
    strategy = EvolutionStrategy(
        task.module(),
        samples,
        SIGMA,
        family,
        learning_rate=LEARNING_RATE,
        antithetic=False,
        seed=SEED,
        row_block=FLIPS if flipes else None,
    )

    def update() -> None:
        population = strategy.ask()
        strategy.tell(fitness(population, x, y))

    return update


class Flat:
    """The parameters of a module as one vector of ``D`` numbers; kernels optionally as channels-last, faster on a CPU."""

    def __init__(self, module: nn.Module, channels_last: bool = False) -> None:
        self.channels_last = channels_last
        self.shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
        values = [parameter.detach() for parameter in module.parameters()]
        self.vector = torch.cat([(v.permute(0, 2, 3, 1) if self._turned(v.shape) else v).flatten() for v in values])

    def _turned(self, shape: torch.Size) -> bool:
        return self.channels_last and len(shape) == 4

    def split(self, vectors: Tensor) -> dict[str, Tensor]:
        """``(..., D)`` to the parameters by name, ``(..., *shape)``; views."""
        views, start = {}, 0
        for name, shape in self.shapes.items():
            part = vectors[..., start : start + shape.numel()]
            start += shape.numel()
            if self._turned(shape):
                out, channels, *kernel = shape
                views[name] = part.view(*vectors.shape[:-1], out, *kernel, channels).movedim(-1, -3)
            else:
                views[name] = part.view(*vectors.shape[:-1], *shape)
        return views


class Independent:
    """Independent perturbations on the device, in chunks that fit into ``chunk_bytes`` of weights and activations."""

    def __init__(self, task: Task, samples: int, how: Literal["bmm", "vmap"], chunk_bytes: int) -> None:
        self.module, (self.x, self.y), self.samples = task.module(), task.images(), samples
        self.flat = Flat(self.module)
        self.mean = self.flat.vector.clone().requires_grad_()
        self.optimizer = torch.optim.Adam([self.mean], LEARNING_RATE)
        self.generator = torch.Generator(task.device)
        self.forward = self._vmap if how == "vmap" else self._bmm
        patches = 14 * 14 * 25 * round(32 * task.size) if task.network == "conv" else 2 * int(task.size)
        self.chunk = max(min(chunk_bytes // (4 * (self.mean.numel() + task.batch * patches)), samples), 1)
        self.generation = 0

    def update(self) -> None:
        """One update of the mean."""
        values = torch.cat([self.fitness(start) for start in range(0, self.samples, self.chunk)])
        self.mean.grad = -self.gradient(centered_ranks(values).to(self.mean.dtype))
        self.optimizer.step()
        self.generation += 1

    def noise(self, start: int) -> Tensor:
        """Of the chunk of samples from ``start`` on, ``(chunk, D)``."""
        self.generator.manual_seed(self.generation * self.samples + start)
        rows = min(self.chunk, self.samples - start)
        return torch.randn(rows, self.mean.numel(), generator=self.generator, device=self.mean.device)

    @torch.no_grad()
    def fitness(self, start: int) -> Tensor:
        """Minus the cross-entropy of a chunk of samples, ``(chunk,)``."""
        weights = self.noise(start).mul_(SIGMA).add_(self.mean)
        logits = self.forward(self.flat.split(weights))
        losses = F.cross_entropy(logits.flatten(0, 1), self.y.repeat(len(logits)), reduction="none")
        return -losses.view(len(logits), -1).mean(1)

    def gradient(self, u: Tensor) -> Tensor:
        """Of the mean, from the weights ``u`` ``(P,)`` of the samples."""
        total = torch.zeros_like(self.mean, requires_grad=False)
        for start in range(0, self.samples, self.chunk):
            noise = self.noise(start)
            total += u[start : start + len(noise)] @ noise
        return total / (self.samples * SIGMA)

    def _vmap(self, weights: dict[str, Tensor]) -> Tensor:
        one = lambda own: torch.func.functional_call(self.module, own, (self.x,))  # noqa: E731
        return torch.func.vmap(one)(weights)

    def _bmm(self, weights: dict[str, Tensor]) -> Tensor:
        """Layer after layer for all samples of the chunk: ``(chunk, B, classes)``."""
        layers = [(weights[name], weights[name[:-6] + "bias"]) for name in weights if name.endswith("weight")]
        h = self.x.expand(len(layers[0][0]), *self.x.shape)
        for i, (weight, bias) in enumerate(layers):
            if weight.ndim == 5:
                h = self._convolution(h, weight, bias).relu_()
                h = F.max_pool2d(h.flatten(0, 1), 2).unflatten(0, h.shape[:2])
                continue
            h = torch.baddbmm(bias[:, None], h.flatten(2), weight.transpose(1, 2))
            h = h.relu_() if i + 1 < len(layers) else h
        return h

    def _convolution(self, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """5x5 with padding: ``(chunk, B, C, H, W)`` to ``(chunk, B, out, H, W)``, as products with patches."""
        shared = h.stride(0) == 0  # the images are the same for all samples, and so are their patches
        patches = F.unfold(h[0] if shared else h.flatten(0, 1), 5, padding=2)
        patches = patches.unflatten(0, (1, -1) if shared else h.shape[:2])
        y = weight.flatten(2)[:, None] @ patches
        return y.add_(bias[:, None, :, None]).unflatten(3, h.shape[3:])


class Worker:
    """One core of cpuES: a dense perturbed copy of the mean, sample after sample."""

    def __init__(self, task: Task, mean: Tensor, samples: int) -> None:
        self.module, (self.x, self.y), self.mean, self.samples = task.module(), task.images(), mean, samples
        flat = Flat(self.module, channels_last=True)
        self.vector = flat.vector
        views = flat.split(self.vector)
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(False)
            parameter.data = views[name]
        self.buffer, self.generator = torch.empty_like(mean), torch.Generator()

    def noise(self, generation: int, sample: int) -> Tensor:
        """Of one sample, ``(D,)``; overwritten by the next."""
        # Measured on one core: 140M numbers a second, NumPy's SFC64 and PCG64 60M.
        self.generator.manual_seed(generation * self.samples + sample)
        return self.buffer.normal_(generator=self.generator)

    @torch.no_grad()
    def fitness(self, generation: int, samples: range) -> list[float]:
        """Minus the cross-entropy of each of the samples."""
        values = []
        for sample in samples:
            torch.add(self.mean, self.noise(generation, sample), alpha=SIGMA, out=self.vector)
            values.append(-float(F.cross_entropy(self.module(self.x), self.y)))
        return values

    def weighted_sum(self, generation: int, samples: range, u: list[float], out: Tensor) -> None:
        """The samples' noise times their ``u``, into ``out`` ``(D,)``."""
        out.zero_()
        for sample, weight in zip(samples, u, strict=True):
            out.add_(self.noise(generation, sample), alpha=weight)


class Workers:
    """cpuES: a process for each core; the mean and the parts of the gradient lie in shared memory."""

    def __init__(self, task: Task, samples: int, processes: int) -> None:
        self.samples, self.generation = samples, 0
        vector = Flat(task.module(), channels_last=True).vector
        self.mean = vector.share_memory_()
        self.parts = torch.zeros(processes, len(vector)).share_memory_()
        self.optimizer = torch.optim.Adam([self.mean.requires_grad_()], LEARNING_RATE)
        bounds = [samples * i // processes for i in range(processes + 1)]
        self.shares = [range(a, b) for a, b in pairwise(bounds)]
        context = torch.multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes: list[BaseProcess] = []
        for part, share in zip(self.parts, self.shares, strict=True):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(there, task, self.mean.detach(), part, share, samples), daemon=True
            )
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join()

    def update(self) -> None:
        """One update of the mean."""
        values = torch.tensor(list(chain.from_iterable(self._ask([self.generation] * len(self.pipes)))))
        ranks = centered_ranks(values).float()
        self._ask([ranks[share.start : share.stop].tolist() for share in self.shares])
        self.mean.grad = self.parts.sum(0) / (-self.samples * SIGMA)
        self.optimizer.step()
        self.generation += 1

    def _ask(self, what: list[Any]) -> list[Any]:
        for pipe, message in zip(self.pipes, what, strict=True):
            pipe.send(message)
        return [pipe.recv() for pipe in self.pipes]


def _serve(pipe: Connection, task: Task, mean: Tensor, part: Tensor, share: range, samples: int) -> None:
    """A worker process: a number asks for the fitness of that generation, a list for the sum with these weights."""
    torch.set_num_threads(1)
    worker, generation = Worker(task, mean, samples), 0
    while (message := pipe.recv()) is not None:
        if isinstance(message, int):
            generation = message
            pipe.send(worker.fitness(generation, share))
        else:
            worker.weighted_sum(generation, share, message, part)
            pipe.send(None)


# Table and figure


def collected(out: Path) -> Iterator[tuple[str, str, dict[str, tuple[float, list[float]]]]]:
    """Every network: its name, its size, and by method the samples measured and the seconds for 5,000."""
    rows = read_csv(out / "runs.csv")
    for network, size in dict.fromkeys((r["network"], r["size"]) for r in rows):
        own = [r for r in rows if (r["network"], r["size"]) == (network, size)]
        methods: dict[str, tuple[float, list[float]]] = {}
        for method in [m for m in METHODS if any(r["method"] == m for r in own)]:
            here = [r for r in own if r["method"] == method]
            samples = int(here[0]["samples"])
            methods[method] = (samples, [float(r["seconds"]) * SAMPLES / samples for r in here])
        yield network, size, methods


def table(out: Path) -> str:
    """Everything measured, in Markdown, beside the paper's figures."""
    config = read_config(out)
    cores, device, batch = int(str(config["processes"])), config["device"], config["batch"]
    counts = {samples for _, _, methods in collected(out) for samples, _ in methods.values()}
    scaled = counts != {SAMPLES}
    where = "one thread of the CPU" if device == "cpu" else f"the GPU ({device})"
    lines = [
        f"Time of one update of 5,000 samples on mini-batches of {batch} images of 28x28 (the paper does not say "
        f"its mini-batch). cpuES ran on {cores} cores, one process each; everything else on {where}.",
        "",
        "**Figure 5 beside ours.** The paper's cpuES had 40 cores and its FlipES one GPU, neither named. Ours on 40 cores is "
        f"*computed*, time on {cores} cores x {cores} / 40, as if more cores cost nothing. The ratio is cpuES on 40 cores ÷ "
        "FlipES; “one device in cores” is that ratio x 40: how many cores of cpuES do the work of the device that runs FlipES.",
        "",
        "| network | paper: FlipES | paper: cpuES, 40 cores | paper: ratio | paper: one device in cores | ours: FlipES | "
        f"ours: cpuES, {cores} cores | ours: cpuES, 40 cores (computed) | ours: ratio | ours: one device in cores |",
        "|---|" + "---|" * 9,
    ]
    for network, size, methods in collected(out):
        paper = PAPER[network].get(float(size))
        cells = ["", "", "", ""]
        if paper:
            ratio = paper[1] / paper[0]
            cells = [f"{paper[0]:g} s", f"{paper[1]:g} s", f"{ratio:.1f}", f"{ratio * PAPER_CORES:.0f}"]
        if FLIPES in methods and CPU_ES in methods:
            flipes, cpu_es = (statistics.median(methods[m][1]) for m in (FLIPES, CPU_ES))
            on_forty = cpu_es * cores / PAPER_CORES
            ours = [_time(flipes), _time(cpu_es), _time(on_forty), _ratio(on_forty / flipes)]
            cells += [*ours, _ratio(cpu_es * cores / flipes)]
        else:
            cells += [""] * 5
        lines.append(f"| {_name(network, size)} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "**All methods.** Seconds for 5,000 samples: median (least to most) of the rounds; in brackets ÷ FlipES. cpuES is "
        "given in core-seconds (time x cores).",
        "",
        "| network | " + " | ".join(METHODS) + " |",
        "|---|" + "---|" * len(METHODS),
    ]
    for network, size, methods in collected(out):
        reference = statistics.median(methods[FLIPES][1]) if FLIPES in methods else None
        cells = []
        for method in METHODS:
            seconds = [s * (cores if method == CPU_ES else 1) for s in methods[method][1]] if method in methods else []
            cells.append(_cell(seconds, reference if method != FLIPES else None))
        lines.append(f"| {_name(network, size)} | " + " | ".join(cells) + " |")
    if scaled:
        lines += [
            "",
            "**Extrapolated.** Measured with fewer samples and multiplied by 5,000 ÷ their number (what an update costs "
            "once, whatever its samples, is multiplied too): "
            + "; ".join(
                f"{_name(network, size)} from {_counts({s for s, _ in methods.values()})}"
                for network, size, methods in collected(out)
                if {s for s, _ in methods.values()} != {SAMPLES}
            )
            + ".",
        ]
    return "\n".join(lines) + "\n"


def figure(out: Path) -> None:
    """Seconds of an update against the size of the network, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    config = read_config(out)
    cores = int(str(config["processes"]))
    points = list(collected(out))
    networks = [n for n in PAPER if any(network == n for network, _, _ in points)]
    fig, axes = plt.subplots(1, len(networks), figsize=(5.2 * len(networks), 4.2), squeeze=False)
    for axis, network in zip(axes.flat, networks, strict=True):
        for color, method in enumerate(METHODS):
            own = [
                (float(size), methods[method][1]) for n, size, methods in points if n == network and method in methods
            ]
            own.sort()
            middle = [statistics.median(seconds) for _, seconds in own]
            label = f"cpuES, {cores} cores" if method == CPU_ES else method
            axis.plot([size for size, _ in own], middle, "o-", color=f"C{color}", label=label, ms=4, lw=1.3)
        for column, (label, style) in enumerate((("paper: FlipES, a GPU", "k:"), ("paper: cpuES, 40 cores", "k--"))):
            axis.plot(
                list(PAPER[network]), [pair[column] for pair in PAPER[network].values()], style, label=label, lw=1
            )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(list(PAPER[network]), [f"{size:g}" for size in PAPER[network]])
        axis.set_xlabel("hidden units" if network == "fc" else "filters ÷ (32 and 64)")
        axis.set_title("FC 784-h-h-10" if network == "fc" else "LeNet", fontsize=10)
    axes.flat[0].set_ylabel("seconds for an update of 5,000 samples")
    axes.flat[-1].legend(fontsize=7)
    fig.suptitle(f"{config['device']}, mini-batch {config['batch']}", fontsize=10)
    fig.tight_layout()
    fig.savefig(out / "figure.png", dpi=110)


def _name(network: str, size: str) -> str:
    return f"FC {size}" if network == "fc" else f"LeNet x {float(size):g}"


def _time(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds >= 100 else f"{seconds:.3g} s"


def _ratio(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.2g}" if ratio < 10 else f"{ratio:.0f}"


def _cell(seconds: list[float], reference: float | None) -> str:
    if not seconds:
        return ""
    middle = statistics.median(seconds)
    spread = f" ({_time(min(seconds))} to {_time(max(seconds))})" if len(seconds) > 1 else ""
    return _time(middle) + spread + (f" [{_ratio(middle / reference)}]" if reference else "")


def _counts(counts: set[float]) -> str:
    return " and ".join(f"{int(count):,}" for count in sorted(counts))


if __name__ == "__main__":
    run_script(main)
