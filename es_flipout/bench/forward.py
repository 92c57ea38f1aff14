"""``bench forward``: the population forward against plain inference of the unperturbed network at the same batch size.

There is one member per row. Populations are prepared as in a rollout (members are selected once), and only forwards are
timed. ``vmap`` is ``torch.func.vmap`` over stacked dense parameters, as general-purpose toolboxes do it. Methods that
would exceed the memory limit are skipped, and the table shows the bytes they would need.

The second table is the memory of 65,536 members of a Humanoid policy: the bytes actually stored, found by walking all
tensors that a population (and a selection of it, with as many members as a rollout has slots) holds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from es_flipout.bench.timing import Measure, Record, interleave, measured_points, repeated
from es_flipout.bench.ways import WAYS, Point, Way, measure, measure_wide, network_way, table
from es_flipout.errors import UserError
from es_flipout.kernels import Precision
from es_flipout.perturbations import Dense, Family, Flipout, LowRank
from es_flipout.policies.networks import MLP
from es_flipout.rollout.memory import show_bytes, stored_bytes
from es_flipout.strategy.evolution_strategy import EvolutionStrategy

FamilyName = Literal["flipout", "flipout_gaussian_8", "low_rank", "dense", "vmap"]
Forward = Callable[[], object]

_OBS_DIM, _ACTION_DIM, _SIGMA = 17, 6, 0.03
_FAMILIES: dict[str, Family] = {
    "flipout": Flipout(),
    "flipout_gaussian_8": Flipout(base="gaussian", bases=8),
    "low_rank": LowRank(rank=1),
    "dense": Dense(),
}
_DENSE_COPIES = {"dense": 1.5, "vmap": 1.0}  # copies of all members' weights: dense also keeps its noise sources
_FLOAT_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class ForwardBench:
    """Compare the population forward with plain inference of the unperturbed network, on one thread."""

    widths: tuple[int, ...] = (32, 64, 128, 256, 512)
    """Widths of the two hidden layers."""
    populations: tuple[int, ...] = (256, 4096, 65536)
    """Population sizes, which are also the batch sizes of plain inference."""
    families: tuple[FamilyName, ...] = ("flipout", "low_rank", "dense", "vmap")
    """Perturbation families to compare with plain inference."""
    rounds: int = 5
    """Number of rounds; medians over rounds are shown."""
    seconds_per_point: float = 0.2
    """Target duration of one measurement; a single forward may take longer."""
    memory_limit_gib: float = 4.0
    """Skip methods that need more memory than this."""
    memory_members: int = 65536
    """Members in the memory table; 0 omits the table."""
    memory_hidden: tuple[int, ...] = (256, 256)
    """Hidden layer sizes in the memory table."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device; on CUDA all implementations (ways), with and without kernels, are measured instead of families."""
    ways: tuple[Way, ...] | None = None
    """Implementations to compare with plain inference; by default all of them on CUDA and none on the CPU."""
    precisions: tuple[Precision, ...] = ("ieee", "tf32", "bf16")
    """Precisions of matrix products to measure the implementations in."""
    wide: int = 8192
    """Width of the single bf16 layer that is measured with each implementation; 0 omits it."""
    wide_batch: int = 1024
    """Batch size of the wide layer."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the result to this file, after every point."""
    resume: bool = False
    """Keep the points that this file already holds, and measure the others."""


def run(options: ForwardBench, console: Console) -> dict[str, Any]:
    """Measure, print tables, and return the JSON-serializable result."""
    ways = options.ways if options.ways is not None else WAYS if options.device == "cuda" else ()
    if ways:
        return _run_ways(options, ways, console)
    record = Record("bench forward", asdict(options), ("forward", "memory"), options.json, options.resume)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        points: list[dict[str, Any]] = []
        for width, population in product(options.widths, options.populations):
            with console.status(f"width {width}, population {population}"):
                sizes = {"width": width, "population": population}
                points.append(record.point("forward", sizes, partial(_measure_point, options, width, population)))
        console.print(_forward_table(options, points))
        memory: list[dict[str, Any]] = []
        if options.memory_members:
            with console.status("memory"):
                rows = _measure_memory(options)
            memory = [record.point("memory", {"family": row["family"]}, lambda row=row: row) for row in rows]
            console.print(_memory_table(options, memory))
    finally:
        torch.set_num_threads(threads)
    return record.write()


def _run_ways(options: ForwardBench, ways: tuple[Way, ...], console: Console) -> dict[str, Any]:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda was requested, but torch finds no CUDA GPU; use --device cpu")
    device = torch.device(options.device)
    limit = options.memory_limit_gib * 2**30

    def make(point: Point, way: Way) -> Forward:
        numbers = sum(parameter.numel() for parameter in point.module.parameters())
        needed = len(point.x) * numbers * _FLOAT_BYTES * _DENSE_COPIES.get(way, 0)
        if needed > limit:
            raise UserError(f"needs {show_bytes(round(needed))}")
        return network_way(_vmap, point, way)

    record = Record("bench forward", asdict(options), ("ways", "wide"), options.json, options.resume)
    rounds, seconds = options.rounds, options.seconds_per_point

    def measured(width: int, population: int, precision: Precision) -> dict[str, Any]:
        return measure(ways, make, _ways_point(device, width, population, precision), rounds, seconds)

    points: list[dict[str, Any]] = []
    for width, population, precision in product(options.widths, options.populations, options.precisions):
        with console.status(f"width {width}, population {population}, {precision}"):
            sizes = {"width": width, "population": population, "precision": precision}
            points.append(record.point("ways", sizes, partial(measured, **sizes)))
    console.print(table("Population forward ÷ plain inference of the unperturbed network, by implementation", points))
    if options.wide:
        with console.status("wide layer"):
            sizes = {"width": options.wide, "population": options.wide_batch}
            size = (options.wide, options.wide_batch)
            wide = record.point("wide", sizes, partial(measure_wide, device, *size, rounds, seconds))
        console.print(table("One wide layer ÷ the unperturbed layer", [wide]))
    return record.write()


def _ways_point(device: torch.device, width: int, population: int, precision: Precision) -> Point:
    module = MLP(_OBS_DIM, _ACTION_DIM, (width, width), generator=torch.Generator().manual_seed(0)).to(device)
    x = torch.randn(population, _OBS_DIM, generator=torch.Generator().manual_seed(1)).to(device)
    return Point(device, precision, module, x)


def _measure_point(options: ForwardBench, width: int, population: int) -> dict[str, Any]:
    module = MLP(_OBS_DIM, _ACTION_DIM, (width, width), generator=torch.Generator().manual_seed(0))
    x = torch.randn(population, _OBS_DIM, generator=torch.Generator().manual_seed(1))
    parameters = sum(parameter.numel() for parameter in module.parameters())
    needed = {
        name: round(population * parameters * _FLOAT_BYTES * _DENSE_COPIES[name])
        for name in options.families
        if name in _DENSE_COPIES
    }
    left_out = {name: size for name, size in needed.items() if size > options.memory_limit_gib * 2**30}
    measures: dict[str, Measure] = {"plain": repeated(_plain(module, x), options.seconds_per_point)}
    for name in options.families:
        if name not in left_out:
            forward = _vmap(module, x) if name == "vmap" else _population(module, _FAMILIES[name], x)
            measures[name] = repeated(forward, options.seconds_per_point)
    timings = interleave(measures, options.rounds)
    return {
        "seconds": {name: 1 / timings.rate(name).median for name in measures},
        "ratio": {name: asdict(timings.ratio(name, "plain")) for name in measures if name != "plain"},
        "left_out_bytes": left_out,
    }


def _plain(module: nn.Module, x: Tensor) -> Forward:
    @torch.no_grad()
    def forward() -> Tensor:
        return module(x)

    return forward


def _population(module: nn.Module, family: Family, x: Tensor) -> Forward:
    population = EvolutionStrategy(module, len(x), _SIGMA, perturbation=family).ask()
    selection = population.select(torch.arange(len(x)))
    return lambda: selection(x)


def _vmap(module: nn.Module, x: Tensor) -> Forward:
    generator = torch.Generator().manual_seed(2)
    stacked = {
        name: parameter.detach()
        + torch.randn(len(x), *parameter.shape, generator=generator).mul_(_SIGMA).to(parameter.device, parameter.dtype)
        for name, parameter in module.named_parameters()
    }
    skeleton = copy.deepcopy(module).to("meta")
    batched = torch.func.vmap(lambda weights, row: torch.func.functional_call(skeleton, weights, (row,)))

    @torch.no_grad()
    def forward() -> Tensor:
        return batched(stacked, x)

    return forward


def _measure_memory(options: ForwardBench) -> list[dict[str, Any]]:
    sizes = (348, *options.memory_hidden, 17)
    weights = sum((size_in + 1) * size_out for size_in, size_out in pairwise(sizes))
    module = MLP(sizes[0], sizes[-1], options.memory_hidden, generator=torch.Generator().manual_seed(0))
    slots = torch.arange(min(1024, options.memory_members))
    rows: list[dict[str, Any]] = []
    for name in ("flipout", "low_rank"):
        population = EvolutionStrategy(module, options.memory_members, _SIGMA, perturbation=_FAMILIES[name]).ask()
        stored = stored_bytes(population)
        selected = stored_bytes(population, population.select(slots)) - stored
        rows.append({"family": name, "layers": sizes, "population_bytes": stored, "selection_bytes": selected})
    dense = options.memory_members * weights * _FLOAT_BYTES
    return [*rows, {"family": "dense", "layers": sizes, "population_bytes": dense, "selection_bytes": None}]


def _forward_table(options: ForwardBench, points: list[dict[str, Any]]) -> Table:
    table = Table(
        title="Population forward ÷ plain inference of the unperturbed network (rates)",
        caption=f"Median of {options.rounds} rounds (smallest-largest); - was skipped, with the memory it would need.",
    )
    for name in ("width", "population", "plain ms", *options.families):
        table.add_column(name, justify="right")
    for point in measured_points(points):
        cells = [
            f"- ({show_bytes(point['left_out_bytes'][name])})"
            if name in point["left_out_bytes"]
            else "{median:.2f} ({min:.2f}-{max:.2f})".format(**point["ratio"][name])
            for name in options.families
        ]
        plain_ms = f"{1e3 * point['seconds']['plain']:.3f}"
        table.add_row(str(point["width"]), str(point["population"]), plain_ms, *cells)
    return table


def _memory_table(options: ForwardBench, rows: list[dict[str, Any]]) -> Table:
    layers = "-".join(str(size) for size in rows[0]["layers"])
    table = Table(
        title=f"Memory of {options.memory_members:,} members, {layers}",
        caption="Stored for the population, and for a selection of 1024 slots; dense is calculated, not allocated.",
    )
    for name in ("family", "population", "selection"):
        table.add_column(name, justify="left" if name == "family" else "right")
    for row in rows:
        selection = "-" if row["selection_bytes"] is None else show_bytes(row["selection_bytes"])
        table.add_row(row["family"], show_bytes(row["population_bytes"]), selection)
    return table
