"""Table and figure of ``es.py``: what was measured, beside figures 2b to 2d of the Flipout paper."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from statistics import mean

from es_flipout.perturbations import Dense, Family, Flipout
from scripts import report
from scripts.paper._data import load_images
from scripts.paper._es_runs import BACKPROP, FAMILIES, INDEPENDENT, PAPERS_OWN, Setting, network

FLIPOUT = PAPERS_OWN[1]
NETWORKS = {"fc": "FC", "conv": "ConvLe"}
SOURCES = {
    "digits": "scikit-learn's bundled 8x8 digits, 1,440 for training, 357 for testing",
    "mnist": "the standard files",
    "cifar10": "the standard files",
}

Group = tuple[str, int, str]  # network, samples, method


def table(out: Path) -> str:
    """Everything measured, in Markdown, with the paper's figures beside it."""
    setting, runs = Setting(**report.read_json(out / "config.json")), report.read_csv(out / "runs.csv")
    return "\n".join(
        (_learning(runs, setting), _gradients(report.read_csv(out / "draws.csv"), setting), _paper(runs, setting))
    )


def by_group(rows: report.Frame) -> dict[Group, report.Frame]:
    """The rows of each network, number of samples and method, in a fixed order, indexed by seed."""
    methods, networks = [BACKPROP, *FAMILIES], list(NETWORKS)
    found = {group: own.set_index("seed") for group, own in report.groups(rows, "network", "samples", "method")}
    return dict(
        sorted(found.items(), key=lambda item: (networks.index(item[0][0]), item[0][1], methods.index(item[0][2])))
    )


def _learning(runs: report.Frame, setting: Setting) -> str:
    found = by_group(runs)
    rows = []
    for (kind, samples, method), own in found.items():
        reference, backprop = found.get((kind, samples, INDEPENDENT)), found.get((kind, 0, BACKPROP))
        loss, reached, seconds = own["train_loss"], own["updates_to_goal"].dropna(), own["seconds_per_update"].median()
        rows.append(
            (
                *(NETWORKS[kind], f"{samples:,}" if samples else "", method, len(own), with_error(loss, ".3f")),
                ""
                if reference is None or method == INDEPENDENT
                else with_error(loss - reference["train_loss"], "+.3f"),
                *(with_error(own[name], ".1%") for name in ("train_error", "test_error")),
                with_error(reached, ".0f") if len(reached) == len(own) else f"{len(reached)} of {len(own)} seeds",
                f"{seconds:.4f}" if seconds < 0.01 else f"{seconds:.3f}",
                "" if backprop is None else f"{seconds / backprop['seconds_per_update'].median():,.0f}",
            )
        )
    header = "network | samples an update | perturbations | seeds | training loss | its difference to independent | "
    header += "training error | test error | updates to 10 % training error | seconds an update | ÷ backprop"
    unit = "CPU time of one thread, on a machine that was shared" if setting.device == "cpu" else f"on {setting.device}"
    return (
        f"Data: **{setting.data}** ({SOURCES[setting.data]}; the paper's is MNIST). "
        f"FC: {setting.width}-{setting.width}-10; Conv: LeNet with {setting.filters} and {2 * setting.filters} filters and "
        f"{setting.conv_hidden} hidden units. {setting.updates} updates (ConvLe: {setting.conv_updates}), "
        f"mini-batches of {setting.batch}, "
        f"sigma {setting.sigma}, Adam with step {setting.learning_rate} (backprop: {setting.backprop_learning_rate}). "
        "Mean ± standard error over the seeds; final values are means of the last five scorings. The difference is the mean "
        "of the differences of runs from the same seed.\n\n"
        + report.markdown(header, rows)
        + f"\nSeconds: median over the updates and then over the seeds; {unit}.\n"
    )


def _gradients(draws: report.Frame, setting: Setting) -> str:
    sigmas, found = sorted(draws["sigma"].unique()), by_group(draws)
    rows = []
    for (kind, samples, method), own in found.items():
        weights = count_weights(kind, setting)
        reference = predicted_cosine(weights, samples, Dense())
        expected = predicted_cosine(weights, samples, FAMILIES[method](samples))
        cells = [f"{expected:.4f} ({expected / reference:.3f})" if expected and reference else ""]
        independent = found.get((kind, samples, INDEPENDENT))
        for sigma in sigmas:
            cosines = own["cosine"][own["sigma"] == sigma]
            cell = with_error(cosines, ".4f")
            if independent is not None:
                cell += f" ({mean(cosines) / mean(independent['cosine'][independent['sigma'] == sigma]):.3f})"
            cells.append(cell)
        rows.append((NETWORKS[kind], f"{samples:,}", method, *cells))
    header = " | ".join(("network | samples | perturbations | predicted", *(f"sigma {sigma}" for sigma in sigmas)))
    return (
        "Cosine between one update's estimate and the true gradient of its mini-batch, at a network after 20 steps of "
        "backprop (mean ± standard error over draws and seeds; in brackets: ÷ independent), at a small sigma and at that of the "
        "runs. Predicted for a linear fitness without shaping: 1 / sqrt(1 + e), with D weights and M bases of N samples "
        "e = ((D + 1) / N + 2 (N - 1) / N) / M for Gaussian bases, (D - 1) / (M N) for ±1, (D + 1) / (M N) for independent "
        "samples. Ranks cost a little more; curvature, at the sigma of the runs, more.\n\n"
    ) + report.markdown(header, rows)


def count_weights(kind: str, setting: Setting) -> int:
    """Entries of the weight matrices and kernels (biases have noise of their own in every family)."""
    module = network(kind, 0, setting, load_images(setting.data, setting.data_dir))
    return sum(p.numel() for p in module.parameters() if p.ndim > 1)


def predicted_cosine(weights: int, samples: int, family: Family) -> float | None:
    """Of an estimate with the gradient of a linear fitness; None for low rank, for which we have no formula."""
    if isinstance(family, Dense):
        error = (weights + 1) / samples
    elif isinstance(family, Flipout):
        flips = samples / family.bases
        gaussian = ((weights + 1) / flips + 2 * (flips - 1) / flips) / family.bases
        error = gaussian if family.base == "gaussian" else (weights - 1) / samples
    else:
        return None
    return 1 / math.sqrt(1 + error)


def _paper(runs: report.Frame, setting: Setting) -> str:
    """What the paper says beside what was measured."""
    found, to_goal = by_group(runs), "updates to 10 % training error"
    cost = f"FC: {_times_backprop(found, 'fc')}; ConvLe: {_times_backprop(found, 'conv')}"
    goal_of_conv = f"{to_goal} (of {setting.conv_updates}): {_updates_to_goal(found, 'conv')}"
    no_loss, comparable = "“no loss in performance”, 12,000 updates", "“comparable” with backprop over 20,000 updates"
    return report.markdown(
        f"| paper (MNIST, 512-512-10 or LeNet 32-64-1024) | ours ({setting.data}, the sizes above)",
        (
            ("2b: flipout against independent, FC, 1,600 samples", no_loss, _difference(found, "fc")),
            ("the same on the convolutional net, 1,600 samples", "not shown", _difference(found, "conv")),
            ("2c: data efficiency, FC", comparable, f"{to_goal}: {_updates_to_goal(found, 'fc')}"),
            ("2d: data efficiency, convolutional net", "the same, 4,000 updates", goal_of_conv),
            ("cost of an update ÷ backprop", "about 60 (a GPU, not named)", cost),
            ("final error", "curves only, axes from 0 to 7 % (2b, 2c) and 5 % (2d)", "see the first table"),
        ),
    )


def _difference(found: dict[Group, report.Frame], kind: str) -> str:
    flipout, independent = (found.get((kind, 1600, method)) for method in (FLIPOUT, INDEPENDENT))
    if flipout is None or independent is None:
        return "not run"
    losses, errors = (flipout[name] - independent[name] for name in ("train_loss", "test_error"))
    differences = f"training loss {with_error(losses, '+.3f')}, test error {with_error(errors, '+.1%')}"
    return f"{differences} (flipout minus independent, final, {losses.count()} seeds)"


def _updates_to_goal(found: dict[Group, report.Frame], kind: str) -> str:
    cells = []
    for samples, method in ((0, BACKPROP), (1600, FLIPOUT), (5000, FLIPOUT)):
        if (own := found.get((kind, samples, method))) is not None:
            reached = own["updates_to_goal"].dropna()
            updates = f"{reached.mean():.0f}" if len(reached) else "not reached"
            some = f" ({len(reached)} of {len(own)} seeds)" if 0 < len(reached) < len(own) else ""
            cells.append(f"{f'flipout {samples:,}' if samples else BACKPROP}: {updates}{some}")
    return ", ".join(cells) or "not run"


def _times_backprop(found: dict[Group, report.Frame], kind: str) -> str:
    seconds = {group: own["seconds_per_update"].median() for group, own in found.items()}
    sizes = [n for n in (1600, 5000) if {(kind, n, FLIPOUT), (kind, 0, BACKPROP)} <= seconds.keys()]
    ratios = [f"{seconds[kind, n, FLIPOUT] / seconds[kind, 0, BACKPROP]:,.0f} ({n:,} samples)" for n in sizes]
    return ", ".join(ratios) or "not run"


def with_error(values: Iterable[float], form: str) -> str:
    """Mean ± standard error of the values that are there."""
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return ""
    middle, error = report.mean_and_error(values)
    return format(middle, form) + ("" if math.isnan(error) else f" ± {format(error, form.lstrip('+'))}")


def figure(out: Path) -> None:
    """Training loss of the mean against updates, mean and standard error over the seeds."""
    setting, found = Setting(**report.read_json(out / "config.json")), by_group(report.read_csv(out / "curves.csv"))
    wanted: dict[str, list[Group]] = {
        "FC, 1,600 samples (Fig. 2b)": [("fc", 1600, method) for method in FAMILIES],
        "FC (Fig. 2c)": [("fc", 1600, FLIPOUT), ("fc", 5000, FLIPOUT), ("fc", 5000, INDEPENDENT), ("fc", 0, BACKPROP)],
        "ConvLe, 1,600 samples (Fig. 2d)": [("conv", 1600 * (m != BACKPROP), m) for m in (*PAPERS_OWN, BACKPROP)],
    }
    if not any(samples == 1600 for _, samples, _ in found):  # a quick run
        wanted = {kind: [group for group in found if group[0] == kind] for kind in NETWORKS}
    shown = {title: [g for g in wanted[title] if g in found] for title in wanted}
    shown = {title: own for title, own in shown.items() if own}
    fig, axes = report.panels(len(shown), 4.6, 3.8)
    for axis, (title, own) in zip(axes, shown.items(), strict=True):
        sizes = {samples for _, samples, _ in own} - {0}
        for color, group in enumerate(own):
            losses = found[group].groupby("update")["train_loss"].agg(["mean", "sem"])
            label = f"{group[2]}, {group[1]:,}" if len(sizes) > 1 and group[1] else group[2]
            axis.plot(losses.index, losses["mean"], color=f"C{color}", label=label, lw=1.3)
            low, high = losses["mean"] - losses["sem"], losses["mean"] + losses["sem"]
            axis.fill_between(losses.index, low, high, color=f"C{color}", alpha=0.2, linewidth=0)
        axis.set_yscale("log")
        axis.set_title(f"{title}: {setting.data}", fontsize=10)
        axis.set_xlabel("updates")
        axis.legend(fontsize=7)
    axes[0].set_ylabel("training loss of the mean")
    report.save(fig, out)
