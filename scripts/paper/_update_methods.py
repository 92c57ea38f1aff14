"""The ways to make one ES update that ``update_time.py`` measures; ``Task`` says of what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, count, pairwise
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from es_flipout import EvolutionStrategy
from es_flipout.perturbations import Family, Flipout, LowRank
from es_flipout.strategy.shaping import centered_ranks
from scripts.paper._paper import FLIPS, ConvLe, fitness, fully_connected

SIGMA, LEARNING_RATE, SEED = 0.1, 0.02, 0
CLASSES, SHAPE = 10, (1, 28, 28)
FLIPES, CPU_ES = "flipout, 40 flips a base", "cpuES"
FAMILIES: dict[str, Callable[[int], Family]] = {
    FLIPES: lambda samples: Flipout("gaussian", max(samples // FLIPS, 1)),
    "flipout ±1, one base": lambda samples: Flipout("rademacher", 1),
    "low rank 1": lambda samples: LowRank(1),
}
INDEPENDENT: dict[str, Literal["bmm", "vmap"]] = {"independent, bmm": "bmm", "independent, vmap": "vmap"}
METHODS = (*FAMILIES, *INDEPENDENT, CPU_ES)


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
        return fully_connected(SHAPE, int(self.size), CLASSES).to(self.device)

    def images(self) -> tuple[Tensor, Tensor]:
        """``(B, 1, 28, 28)`` and ``(B,)``."""
        generator = torch.Generator().manual_seed(SEED)
        x = torch.randn(self.batch, *SHAPE, generator=generator)
        y = torch.randint(CLASSES, (self.batch,), generator=generator)
        return x.to(self.device), y.to(self.device)


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

    return lambda: strategy.tell(fitness(strategy.ask(), x, y))


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
        self.mean = Flat(task.module(), channels_last=True).vector.share_memory_()
        self.parts = torch.zeros(processes, len(self.mean)).share_memory_()
        self.shares = [range(a, b) for a, b in pairwise(samples * i // processes for i in range(processes + 1))]
        context = torch.multiprocessing.get_context("spawn")
        self.pool = context.Pool(processes, _start, (task, self.mean.detach(), samples, self.parts))
        self.optimizer = torch.optim.Adam([self.mean.requires_grad_()], LEARNING_RATE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.close()
        self.pool.join()

    def update(self) -> None:
        """One update of the mean."""
        values = self.pool.starmap(_fitness, [(self.generation, share) for share in self.shares], 1)
        ranks = centered_ranks(torch.tensor(list(chain.from_iterable(values)))).float()
        weights = [ranks[share.start : share.stop].tolist() for share in self.shares]
        self.pool.starmap(_sum, [(self.generation, *part) for part in zip(self.shares, weights, count())], 1)
        self.mean.grad = self.parts.sum(0) / (-self.samples * SIGMA)
        self.optimizer.step()
        self.generation += 1


# In a worker process: its worker, and the parts of the gradient.
_own: tuple[Worker, Tensor]


def _start(task: Task, mean: Tensor, samples: int, parts: Tensor) -> None:
    global _own
    torch.set_num_threads(1)
    _own = Worker(task, mean, samples), parts


def _fitness(generation: int, samples: range) -> list[float]:
    return _own[0].fitness(generation, samples)


def _sum(generation: int, samples: range, u: list[float], part: int) -> None:
    worker, parts = _own
    worker.weighted_sum(generation, samples, u, parts[part])
