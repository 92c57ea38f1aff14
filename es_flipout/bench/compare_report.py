"""The report of ``bench compare``: equivalent cores, prices, sentences, tables and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from rich.table import Table

from es_flipout.bench.contenders import STAGES, Contender
from es_flipout.bench.timing import SideBySide, Spread

Splits = Mapping[str, Mapping[str, float | None]]
# Label and color of an engine in the figure.
_ENGINES = {
    "engine_cpu": ("engine, CPU", "tab:blue"),
    "engine_ray": ("engine on Ray, CPU", "tab:orange"),
    "engine_cuda": ("engine, GPU", "tab:red"),
}
_STAGE_COLORS = ("#4477aa", "#ccbb44", "#ee6677", "#228833")


@dataclass(frozen=True)
class Prices:
    """Prices in dollars per hour of one core and of a machine with one GPU; None if unknown."""

    core_hour: float | None
    gpu_hour: float | None

    def of(self, contender: Contender) -> float | None:
        """Return the price of a contender in dollars per hour."""
        if contender.on_gpu:
            return self.gpu_hour
        return None if self.core_hour is None else self.core_hour * contender.cores


class PowerLaw(NamedTuple):
    """``rate = factor * workers ** exponent``."""

    factor: float
    exponent: float

    def workers_for(self, rate: float) -> float:
        """Return the number of workers that reach a rate."""
        return (rate / self.factor) ** (1 / self.exponent)


def rate_per_worker(workers: Sequence[int], rates: Sequence[float]) -> float:
    """Return the slope of the least-squares line through the origin."""
    n, y = np.asarray(workers, np.float64), np.asarray(rates, np.float64)
    return float((n * y).sum() / (n * n).sum())


def power_law(workers: Sequence[int], rates: Sequence[float]) -> PowerLaw | None:
    """Fit a power law by least squares on logarithms; return None for fewer than two numbers of workers."""
    if len(set(workers)) < 2:
        return None
    exponent, intercept = np.polyfit(np.log(workers), np.log(rates), 1)
    return PowerLaw(float(np.exp(intercept)), float(exponent))


def dollars(rate: float, price_hour: float) -> float:
    """Return the price of 10^9 steps at ``rate`` steps per second."""
    return 1e9 / rate / 3600 * price_hour


def evaluate(
    contenders: Sequence[Contender],
    timings: SideBySide,
    splits: Splits,
    prices: Prices,
    cores: int,
) -> dict[str, Any]:
    """Compute everything that the tables, the sentences and the plot show.

    Args:
        contenders: what was measured.
        timings: rates of the contenders.
        splits: split of time of each contender.
        prices: prices per hour.
        cores: cores of the cluster of classic workers.
    """
    counts = [each.workers for each in contenders if each.workers is not None]
    rounds = len(timings.rates[contenders[0].name])
    # Workers that share a core are measured, but tell nothing about the rate of a core.
    fitted = [n for n in counts if n <= cores] or counts
    by_round = [[timings.rates[f"classic_{n}"][number] for n in fitted] for number in range(rounds)]
    slopes = [rate_per_worker(fitted, rates) for rates in by_round]
    laws = [law for rates in by_round if (law := power_law(fitted, rates)) is not None]
    equivalent: dict[str, Any] = {}
    for each in contenders:
        if each.workers is not None:
            continue
        rates = timings.rates[each.name]
        linear = Spread.of([rate / slope for rate, slope in zip(rates, slopes, strict=True)])
        power = [law.workers_for(rate) for rate, law in zip(rates, laws, strict=True)] if laws else []
        equivalent[each.name] = {
            "linear": asdict(linear),
            "power_law": asdict(Spread.of(power)) if power else None,
            "extrapolated": linear.max > max(fitted),
            "to_classic": {f"classic_{n}": asdict(timings.ratio(each.name, f"classic_{n}")) for n in counts},
        }
    results = {
        "contenders": {each.name: _point(each, timings, splits[each.name], prices) for each in contenders},
        "scaling": {
            "workers": fitted,
            "per_worker": asdict(Spread.of(slopes)),
            "exponent": asdict(Spread.of([law.exponent for law in laws])) if laws else None,
            "factor": asdict(Spread.of([law.factor for law in laws])) if laws else None,
        },
        "equivalent_cores": equivalent,
    }
    return {**results, "sentences": _sentences(results)}


def _point(each: Contender, timings: SideBySide, split: Mapping[str, float | None], prices: Prices) -> dict[str, Any]:
    price, rates = prices.of(each), timings.rates[each.name]
    return {
        "cores": each.cores,
        "workers": each.workers,
        "device": "cuda" if each.on_gpu else "cpu",
        "steps_per_s": asdict(timings.rate(each.name)),
        "steps_per_s_by_round": list(rates),
        "mean_length": float(np.mean(each.lengths)),
        "split": dict(split),
        "dollars_per_1e9": None if price is None else asdict(Spread.of([dollars(rate, price) for rate in rates])),
    }


def _sentences(results: Mapping[str, Any]) -> list[str]:
    """Return the conclusions as sentences. An asterisk marks what is extrapolated; one sentence explains it."""
    most, equivalent = max(results["scaling"]["workers"]), results["equivalent_cores"]
    sentences = []
    for name, found in equivalent.items():
        mark = "*" if found["extrapolated"] else ""
        sentences.append(f"{name} does the work of {_spread(found['linear'], mark)} classic cores.")
    beyond = {name: found["power_law"] for name, found in equivalent.items() if found["extrapolated"]}
    if beyond:
        sentences.append(f"* More than {most} classic workers were not measured: extrapolated by linear scaling.")
        if all(beyond.values()):
            exponent = results["scaling"]["exponent"]["median"]
            found = ", ".join(f"{name} {_spread(power)}" for name, power in beyond.items())
            sentences[-1] += f" With the measured scaling (workers to the power of {exponent:.2f}): {found}."
    if any(point["device"] == "cuda" and point["dollars_per_1e9"] for point in results["contenders"].values()):
        sentences.append("The price of the GPU is that of its whole machine.")
    return sentences


def _spread(spread: Mapping[str, float], mark: str = "") -> str:
    return f"{spread['median']:.1f}{mark} ({spread['min']:.1f} to {spread['max']:.1f})"


def tables(results: Mapping[str, Any]) -> list[Table]:
    """Return two tables: rates with equivalent cores and prices, and the split of time."""
    rates = Table(
        title=f"{results['env_id']}, population {results['population_size']}, {results['mean_policy']} mean policy",
        caption="Live environment steps per second: median over rounds (smallest-largest)",
    )
    shares = Table(caption="Fractions of the time of one extra generation")
    columns = ("cores", "steps/s", "equivalent classic cores", "$ per 10⁹ steps")
    for table, names in ((rates, columns), (shares, STAGES)):
        table.add_column("contender")
        for name in names:
            table.add_column(name, justify="right")
    for name, point in results["contenders"].items():
        rate, price = point["steps_per_s"], point["dollars_per_1e9"]
        equal = results["equivalent_cores"].get(name)
        rates.add_row(
            name,
            str(point["cores"]),
            f"{rate['median']:,.0f} ({rate['min']:,.0f}-{rate['max']:,.0f})",
            "-" if equal is None else f"{equal['linear']['median']:.1f}" + "*" * equal["extrapolated"],
            "-" if price is None else f"{price['median']:,.2f}",
        )
        split = [point["split"][part] for part in STAGES]
        shares.add_row(name, *("-" if value is None else f"{value:.2f}" for value in split))
    return [rates, shares]


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Write :func:`figure_of` to a PNG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure_of(results).savefig(path, dpi=150)


def figure_of(results: Mapping[str, Any]) -> Figure:
    """Return a figure of rates against cores, with the fit and a line per engine, and of the split of time."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    rates, shares = figure.subplots(1, 2)
    points, scaling = results["contenders"], results["scaling"]
    classic = [point for point in points.values() if point["workers"] is not None]
    engines = {name: point for name, point in points.items() if point["workers"] is None}
    counts = [point["workers"] for point in classic]
    spreads = [point["steps_per_s"] for point in classic]
    medians = [spread["median"] for spread in spreads]
    errors = [[s["median"] - s["min"] for s in spreads], [s["max"] - s["median"] for s in spreads]]
    rates.errorbar(counts, medians, errors, fmt="o", color="black", label="classic workers on Ray")
    most = max([max(counts), *(e["linear"]["median"] for e in results["equivalent_cores"].values())]) * 1.2
    slope, measured = scaling["per_worker"]["median"], max(counts)
    rates.plot([1, measured], [slope, slope * measured], color="black", linewidth=1)
    rates.plot(
        [measured, most],
        [slope * measured, slope * most],
        color="black",
        linestyle=":",
        label="linear extrapolation",
    )
    for name, point in engines.items():
        rate, (label, color) = point["steps_per_s"], _ENGINES[name]
        rates.axhline(rate["median"], color=color, label=f"{label}: {rate['median']:,.0f}")
        rates.axhspan(rate["min"], rate["max"], color=color, alpha=0.2)
    rates.set(xscale="log", yscale="log", xlabel="classic workers (cores)", ylabel="live environment steps per second")
    rates.set_xlim(left=0.9)
    for axis in (rates.xaxis, rates.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.set_minor_formatter(NullFormatter())
    rates.set_title(f"{results['env_id']}, population {results['population_size']}")
    rates.legend(fontsize=8)
    split = {name: point["split"] for name, point in points.items() if point["split"]["physics"] is not None}
    left = np.zeros(len(split))
    for part, color in zip(STAGES, _STAGE_COLORS, strict=True):
        widths = [parts[part] for parts in split.values()]
        shares.barh(list(split), widths, left=left, color=color, label=part)
        left += widths
    shares.set(xlabel="fraction of a generation's time", xlim=(0, 1))
    shares.invert_yaxis()
    shares.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=4, frameon=False)
    return figure
