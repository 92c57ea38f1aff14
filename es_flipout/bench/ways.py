"""``bench forward --device cuda``: every implementation ("way") of the population forward against plain inference.

All ways of a point share inputs and sizes, with one member per row, and are measured in turn. On CUDA a way is the
replay of its CUDA graph, which excludes launch overhead from Python, unless its name ends in ``eager``.
``plain_compiled`` is the unperturbed network compiled by ``torch.compile`` with ``max-autotune``, for the shape of the
point, and captured in the same kind of graph as the other ways. It is the reference of all ratios; where it cannot be
measured (on the CPU), ``plain`` is. A way that fails is left out, with the reason. ``ieee`` is float32 throughout;
``tf32`` and ``bf16`` are the formats of the inputs of matrix products, also in plain inference.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from rich.table import Table
from torch import Tensor, nn

from es_flipout.bench.timing import Measure, interleave, measured_points, reason, repeated_on
from es_flipout.errors import UserError
from es_flipout.kernels import MemberNoise, Precision, chosen
from es_flipout.perturbations import Dense, Family, Flipout, LowRank
from es_flipout.randomness import Address, Stream, signs
from es_flipout.strategy.evolution_strategy import EvolutionStrategy

if TYPE_CHECKING:
    from collections.abc import Iterator

Way = Literal[
    "plain_eager", "plain", "plain_compiled", "dense", "vmap", "low_rank", "low_rank_kernel", "flipout_eager",
    "flipout", "flipout_layers", "flipout_mlp",
]  # fmt: skip
WideWay = Literal["plain", "low_rank", "low_rank_kernel", "flipout", "flipout_layers", "flipout_library", "flipout_fp8"]
Forward = Callable[[], object]
WAYS: tuple[Way, ...] = get_args(Way)
_WIDE_WAYS: tuple[WideWay, ...] = get_args(WideWay)
_SIGMA = 0.03


@dataclass(frozen=True)
class Point:
    """One network, one batch, one precision."""

    device: torch.device
    precision: Precision
    module: nn.Module
    x: Tensor

    @property
    def narrow(self) -> Point:
        """The same point for torch, whose precision is that of the tensors."""
        if self.precision != "bf16":
            return self
        return replace(self, module=copy.deepcopy(self.module).bfloat16(), x=self.x.bfloat16())


def measure(
    ways: Sequence[str],
    make: Callable[[Point, Any], Forward],
    point: Point,
    rounds: int,
    seconds: float,
) -> dict[str, Any]:
    """Measure the rates of all ways at one point; ways that fail are left out, with the reason.

    The reference is None, and there are no ratios, if neither ``plain_compiled`` nor ``plain`` could be measured.
    """
    measures: dict[str, Measure] = {}
    left_out: dict[str, str] = {}
    with _matmul_precision(point.precision):
        for way in ways:
            try:
                forward = make(point, way)
                if not way.endswith("eager"):
                    forward = graphed(point.device, forward)
                measures[way] = repeated_on(point.device, forward, seconds)
            except Exception as error:  # a compiler or a driver may raise anything; the other ways still count
                left_out[way] = reason(error)
        timings = interleave(measures, rounds)
    reference = next((way for way in ("plain_compiled", "plain") if way in measures), None)
    others = [] if reference is None else [way for way in measures if way != reference]
    return {
        "precision": point.precision,
        "reference": reference,
        "seconds": {way: 1 / timings.rate(way).median for way in measures},
        "ratio": {way: asdict(timings.ratio(way, reference)) for way in others if reference is not None},
        "left_out": left_out,
    }


def network_way(vmap: Callable[[nn.Module, Tensor], Forward], point: Point, way: Way) -> Forward:
    """Return a network's forward in one way; ``vmap`` creates the one over stacked dense parameters."""
    own = point.narrow
    match way:
        case "plain" | "plain_eager":
            return _plain(own.module, own.x)
        case "plain_compiled":
            if point.device.type != "cuda":
                raise UserError("compilation with a CUDA graph requires a CUDA device")
            # Without a reset, the second shape would be compiled for any shape, and many shapes would end compilation.
            torch.compiler.reset()
            compiled = torch.compile(own.module, mode="max-autotune-no-cudagraphs", dynamic=False, fullgraph=True)
            return _plain(compiled, own.x)
        case "vmap":
            return vmap(own.module, own.x)
        case "dense":
            return _population(own, Dense(), "torch")
        case "low_rank":
            return _population(own, LowRank(), "torch")
        case "flipout" | "flipout_eager":
            return _population(own, Flipout(), "torch")
        case "low_rank_kernel":
            return _population(point, LowRank(), "triton")
        case "flipout_mlp" | "flipout_layers":
            return _population(point, Flipout(), "triton", layers=way == "flipout_layers")


def _population(point: Point, family: Family, kernels: Literal["torch", "triton"], layers: bool = False) -> Forward:
    n = len(point.x)
    strategy = EvolutionStrategy(
        point.module, n, _SIGMA, family, row_block=n, kernels=kernels, precision=point.precision
    )
    population = strategy.ask()
    network = population._network
    if layers and network is not None:
        network.in_one_kernel = False
    elif network is not None and not network.in_one_kernel:
        raise UserError("the network is too wide or too deep for one kernel")
    selection = population.select(torch.arange(n, device=point.device))
    return lambda: selection(point.x)


def _plain(module: Callable[[Tensor], Tensor], x: Tensor) -> Forward:
    @torch.no_grad()
    def forward() -> Tensor:
        return module(x)

    return forward


def graphed(device: torch.device, forward: Forward) -> Forward:
    """Return the replay of a CUDA graph of ``forward``; on the CPU, return ``forward`` itself."""
    if device.type != "cuda":
        return forward
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):  # warm-up: kernels are compiled and tuned, libraries allocate their workspaces
            forward()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward()
    return graph.replay


@contextmanager
def _matmul_precision(precision: Precision) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision.startswith("tf32") else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def measure_wide(device: torch.device, width: int, batch: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Measure one square linear layer in bf16, with one member per row."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(width, width, generator=generator) / width**0.5).bfloat16().to(device)
    x = torch.randn(batch, width, generator=generator).bfloat16().to(device)
    point = Point(device, "bf16", nn.Identity(), x)

    def make(_: Point, way: WideWay) -> Forward:
        return _wide_way(way, x, weight)

    return measure(_WIDE_WAYS, make, point, rounds, seconds)


def _wide_way(way: WideWay, x: Tensor, weight: Tensor) -> Forward:
    device, (batch, width) = x.device, x.shape
    sources, members = torch.arange(batch // 2, device=device), torch.arange(batch, device=device)
    if way == "plain":
        return lambda: nn.functional.linear(x, weight)
    if way.startswith("low_rank"):
        left, right = (torch.randn(len(sources), 1, width, device=device).bfloat16() for _ in range(2))
        if way == "low_rank_kernel":
            chosen("triton", device, torch.float32)
            from es_flipout.kernels.low_rank import low_rank_linear

            return lambda: low_rank_linear(x, weight, left, right, MemberNoise(members, 2, _SIGMA))
        scale = (_SIGMA * (1 - 2 * (members % 2))).bfloat16()[:, None]
        of_left, of_right = left[members // 2, 0] * scale, right[members // 2, 0]
        return lambda: torch.addcmul(x @ weight.T, (x * of_right).sum(-1, keepdim=True), of_left)
    base = signs(Address(0), Stream.BASE, torch.zeros(1, dtype=torch.int64, device=device), width * width)
    base = base.view(width, width).bfloat16()
    if way == "flipout":
        r, s = (signs(Address(0), of, sources, width) for of in (Stream.OUTPUT_SIGNS, Stream.INPUT_SIGNS))
        flips = s[members // 2].bfloat16()
        scaled = (_SIGMA * r[members // 2] * (1 - 2 * (members % 2))[:, None]).bfloat16()
        return lambda: (x @ weight.T).addcmul_(scaled, (x * flips) @ base.T)
    chosen("triton", device, torch.float32)
    from es_flipout.kernels.linear import FlipoutLayer, linear, linear_by_library
    from es_flipout.kernels.signs import sign_words

    if way == "flipout_fp8":
        if device.type != "cuda":
            raise UserError("fp8 matrix products require a CUDA device")
        base = base.to(torch.float8_e4m3fn)
    r, s = (sign_words(Address(0), of, sources, width) for of in (Stream.OUTPUT_SIGNS, Stream.INPUT_SIGNS))
    layer = FlipoutLayer(weight, base[None], r, s)
    if way == "flipout_layers":
        return lambda: linear(x, layer, MemberNoise(members, 2, _SIGMA, "bf16"))
    return lambda: linear_by_library(x, layer, MemberNoise(members, 2, _SIGMA))


def table(title: str, points: Sequence[dict[str, Any]]) -> Table:
    """Return a table of ratios to plain inference, with one row per point."""
    ways = list(
        dict.fromkeys(way for point in measured_points(points) for way in (*point["seconds"], *point["left_out"]))
    )
    found = Table(
        title=title, caption="Rates ÷ the reference, median over rounds; - was skipped (the JSON gives the reason)."
    )
    for name in ("width", "population", "precision", "reference ms", *ways):
        found.add_column(name, justify="right")
    for point in measured_points(points):
        reference = point["reference"]
        cells = [
            "1" if way == reference else f"{point['ratio'][way]['median']:.2f}" if way in point["ratio"] else "-"
            for way in ways
        ]
        row = (str(point["width"]), str(point["population"]), point["precision"])
        found.add_row(*row, "-" if reference is None else f"{1e3 * point['seconds'][reference]:.3f}", *cells)
    return found
