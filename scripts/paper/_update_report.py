"""Table and figure of ``update_time.py``, beside figure 5 of the Flipout paper."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import NamedTuple

from scripts import report
from scripts.paper._update_methods import CPU_ES, FLIPES, METHODS

SAMPLES = 5000
PAPER_CORES = 40
# Size to seconds an update of the paper's FlipES (one GPU, not named) and cpuES (40 cores).
PAPER: dict[str, dict[float, tuple[float, float]]] = {
    "fc": {32: (0.12, 0.51), 128: (0.13, 1.22), 512: (0.18, 5.10), 2048: (1.86, 38.0)},
    "conv": {0.25: (2.3, 16.0), 0.75: (5.48, 46.0), 1.0: (7.12, 67.0), 1.5: (11.77, 132.0)},
}


class Network(NamedTuple):
    """What was measured of one network.

    Attributes:
        kind, size: see ``Task``.
        samples: that were measured, over all methods.
        seconds: for 5,000 samples, by method, in every round.
    """

    kind: str
    size: float
    samples: list[int]
    seconds: dict[str, list[float]]

    @property
    def name(self) -> str:
        """For tables."""
        return f"FC {self.size:g}" if self.kind == "fc" else f"LeNet x {self.size:g}"


def collected(out: Path) -> list[Network]:
    """Every network of ``runs.csv``."""
    runs = report.read_csv(out / "runs.csv")
    runs["scaled"] = runs["seconds"] * SAMPLES / runs["samples"]
    return [
        Network(
            kind,
            size,
            sorted(own["samples"].unique()),
            {method: list(rows["scaled"]) for method, rows in report.groups(own, "method")},
        )
        for (kind, size), own in report.groups(runs, "network", "size")
    ]


def table(out: Path) -> str:
    """Everything measured, in Markdown, beside the paper's figures."""
    config, networks = report.read_json(out / "config.json"), collected(out)
    cores, device = config["processes"], config["device"]
    where = "one thread of the CPU" if device == "cpu" else f"the GPU ({device})"
    text = (
        f"Time of one update of 5,000 samples on mini-batches of {config['batch']} images of 28x28 (the paper does not say "
        f"its mini-batch). cpuES ran on {cores} cores, one process each; everything else on {where}.\n\n"
        "**Figure 5 beside ours.** The paper's cpuES had 40 cores and its FlipES one GPU, neither named. Ours on 40 cores is "
        f"*computed*, time on {cores} cores x {cores} / 40, as if more cores cost nothing. The ratio is cpuES on 40 cores ÷ "
        "FlipES; “one device in cores” is that ratio x 40: how many cores of cpuES do the work of the device that runs FlipES."
        "\n\n"
    )
    header = (
        "network | paper: FlipES | paper: cpuES, 40 cores | paper: ratio | paper: one device in cores | ours: FlipES | "
    )
    header += f"ours: cpuES, {cores} cores | ours: cpuES, 40 cores (computed) | ours: ratio | ours: one device in cores"
    text += report.markdown(header, ((each.name, *_paper(each), *_ours(each, cores)) for each in networks))
    text += (
        "\n**All methods.** Seconds for 5,000 samples: median (least to most) of the rounds; in brackets ÷ FlipES. cpuES is "
        "given in core-seconds (time x cores).\n\n"
    )
    rows = ((each.name, *(_cell(each, method, cores) for method in METHODS)) for each in networks)
    text += report.markdown(" | ".join(("network", *METHODS)), rows)
    scaled = [each for each in networks if each.samples != [SAMPLES]]
    if scaled:
        counts = [f"{each.name} from {' and '.join(f'{n:,}' for n in each.samples)}" for each in scaled]
        text += (
            "\n**Extrapolated.** Measured with fewer samples and multiplied by 5,000 ÷ their number (what an update costs "
            f"once, whatever its samples, is multiplied too): {'; '.join(counts)}.\n"
        )
    return text


def _paper(network: Network) -> list[str]:
    if (pair := PAPER[network.kind].get(network.size)) is None:
        return [""] * 4
    ratio = pair[1] / pair[0]
    return [f"{pair[0]:g} s", f"{pair[1]:g} s", f"{ratio:.1f}", f"{ratio * PAPER_CORES:.0f}"]


def _ours(network: Network, cores: int) -> list[str]:
    if not {FLIPES, CPU_ES} <= network.seconds.keys():
        return [""] * 5
    flipes, cpu_es = (median(network.seconds[method]) for method in (FLIPES, CPU_ES))
    on_forty = cpu_es * cores / PAPER_CORES
    return [_time(flipes), _time(cpu_es), _time(on_forty), _ratio(on_forty / flipes), _ratio(cpu_es * cores / flipes)]


def _cell(network: Network, method: str, cores: int) -> str:
    seconds = [s * (cores if method == CPU_ES else 1) for s in network.seconds.get(method, [])]
    if not seconds:
        return ""
    text = report.spread(seconds, _time) if len(seconds) > 1 else _time(seconds[0])
    if method != FLIPES and FLIPES in network.seconds:
        text += f" [{_ratio(median(seconds) / median(network.seconds[FLIPES]))}]"
    return text


def figure(out: Path) -> None:
    """Seconds of an update against the size of the network, both axes logarithmic."""
    config, networks = report.read_json(out / "config.json"), collected(out)
    kinds = [kind for kind in PAPER if any(each.kind == kind for each in networks)]
    fig, axes = report.panels(len(kinds), 5.2, 4.2)
    for axis, kind in zip(axes, kinds, strict=True):
        for color, method in enumerate(METHODS):
            points = sorted(
                (each.size, median(each.seconds[method]))
                for each in networks
                if each.kind == kind and method in each.seconds
            )
            label = f"cpuES, {config['processes']} cores" if method == CPU_ES else method
            axis.plot(*zip(*points, strict=True), "o-", color=f"C{color}", label=label, ms=4, lw=1.3)
        sizes, pairs = list(PAPER[kind]), list(PAPER[kind].values())
        axis.plot(sizes, [flipes for flipes, _ in pairs], "k:", label="paper: FlipES, a GPU", lw=1)
        axis.plot(sizes, [cpu_es for _, cpu_es in pairs], "k--", label="paper: cpuES, 40 cores", lw=1)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axis.set_xlabel("hidden units" if kind == "fc" else "filters ÷ (32 and 64)")
        axis.set_title("FC 784-h-h-10" if kind == "fc" else "LeNet", fontsize=10)
    axes[0].set_ylabel("seconds for an update of 5,000 samples")
    axes[-1].legend(fontsize=7)
    fig.suptitle(f"{config['device']}, mini-batch {config['batch']}", fontsize=10)
    report.save(fig, out)


def _time(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds >= 100 else f"{seconds:.3g} s"


def _ratio(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.2g}" if ratio < 10 else f"{ratio:.0f}"
