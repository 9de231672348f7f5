"""Figures of what `benchmarks.measure` found: time and memory over N, and the share of the machine's rate over B.

Shapes: B queries, N bank rows, D features, C classes.
"""

import math
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.grid import GRADIENT
from benchmarks.measure import PROVIDERS
from benchmarks.rates import with_rates
from benchmarks.rows import OK, OUT_OF_MEMORY

PART = {"loss": "", "mean": " (means alone)", "log sum": " (log Σ alone)", "product": ""}
"""What the legend adds to the name of a provider, by its result."""
STYLES: dict[str, dict[str, Any]] = {  # ours black; the others in Paul Tol's "muted", made for the colour-blind
    "triton": {"color": "#000000", "linewidth": 2.5},
    "triton, plain labels": {"color": "#000000", "linestyle": ":"},
    "streaming": {"color": "#882255", "linewidth": 2.5},
    "streaming, plain labels": {"color": "#882255", "linestyle": ":"},
    "naive": {"color": "#CC6677"},
    "naive in 16 bits": {"color": "#CC6677", "linestyle": "--"},
    "naive, compiled": {"color": "#CC6677", "linestyle": ":"},
    "chunked": {"color": "#DDCC77"},
    "flex attention": {"color": "#117733"},
    "SDPA flash": {"color": "#332288", "linestyle": "--"},
    "SDPA flash, folded": {"color": "#332288"},
    "SDPA cuDNN": {"color": "#88CCEE", "linestyle": "--"},
    "SDPA cuDNN, folded": {"color": "#88CCEE"},
    "SDPA efficient, folded": {"color": "#999933"},
    "Liger": {"color": "#44AA99"},
    "cut cross-entropy": {"color": "#AA4499"},
    "product alone": {"color": "#777777", "linestyle": "-."},
}
"""Lines of the providers of the loss, in the order of the legend."""


def plot(rows: pd.DataFrame, folder: Path, name: str) -> list[Path]:
    """Write the three figures of loss and gradient into a folder, and return their files.

    They are of an idle machine, and of the width, classes and arithmetic of which there are most rows.

    Raises:
        SystemExit: No loss with its gradient has been measured yet.
    """
    rows = with_rates(rows)
    rows = rows[(rows.what == GRADIENT) & (rows.busy == 0)]
    if not (rows.outcome == OK).any():
        raise SystemExit("no loss with its gradient has been measured yet")
    D, C, dtype = rows[["D", "C", "dtype"]].value_counts().index[0]
    rows = rows[(rows[["D", "C", "dtype"]] == [D, C, dtype]).all(axis=1)]
    subtitle = f"{rows.machine.iloc[0]}; loss and gradient, D = {D}, {C:,} classes, {dtype}"
    figures = {"time": time_by_N(rows), "memory": memory_by_N(rows), "share": share_by_B(rows)}
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for kind, figure in figures.items():
        figure.suptitle(subtitle, fontsize=9, color="#555555")
        written.append(folder / f"{name}-{kind}.png")
        figure.savefig(written[-1], dpi=110)
    return written


def time_by_N(rows: pd.DataFrame) -> Figure:
    """A panel for each B."""
    batches = sorted(rows.B.unique())
    figure = Figure(figsize=(10.5, 6.6) if len(batches) > 3 else (10.5, 3.8), layout="constrained")
    axes = figure.subplots(math.ceil(len(batches) / 3), 3, sharex=True, sharey=True, squeeze=False).ravel()
    for axis, B in zip(axes, batches, strict=False):
        draw(axis, rows[rows.B == B], "N", "seconds")
        axis.set(title=f"B = {B:,}", xscale="log", yscale="log")
        axis.tick_params(labelbottom=True)
    for axis in axes[len(batches) :]:
        axis.set_axis_off()
    figure.supylabel("seconds")
    figure.supxlabel("N, bank rows")
    return with_legend(figure, rows)


def memory_by_N(rows: pd.DataFrame) -> Figure:
    """For 256 queries, else for the most that were measured."""
    B = 256 if 256 in set(rows.B) else rows.B.max()
    rows = rows[rows.B == B].assign(megabytes=rows.peak_bytes / 2**20)
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axis = figure.subplots()
    draw(axis, rows, "N", "megabytes")
    title = f"Memory beyond bank and queries, B = {B:,}"
    axis.set(title=title, xlabel="N, bank rows", ylabel="MB", xscale="log")
    axis.set_yscale("symlog", linthresh=1)
    axis.set_ylim(bottom=0)
    return with_legend(figure, rows)


def share_by_B(rows: pd.DataFrame) -> Figure:
    """For the largest N that was measured with three batch sizes, else with the most there are."""
    sizes = rows[rows.outcome == OK].groupby("N").B.nunique()
    N = max(N for N, batches in sizes.items() if batches >= min(sizes.max(), 3))
    rows = rows[rows.N == N].assign(percent=100 * rows.share)
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axis = figure.subplots()
    draw(axis, rows, "B", "percent")
    axis.set(title=f"Share of what the machine can do, N = {N:,}", xlabel="B, queries", ylabel="%", xscale="log")
    batches = sorted(rows.B.unique())
    axis.set_xticks(batches, [f"{B:,}" for B in batches], minor=False)
    axis.set_xticks([], minor=True)
    axis.set_ylim(0, max(100, 1.05 * rows.percent.max()))
    return with_legend(figure, rows)


def draw(axis: Axes, rows: pd.DataFrame, x: str, y: str) -> None:
    """Draw a line for each provider; × marks the size at which its memory ran out, on the line continued to there."""
    axis.grid(alpha=0.3)
    for name, group in rows.groupby("provider", sort=False):
        group = group.sort_values(x)
        ran = group[group.outcome == OK]
        if ran.empty:
            continue
        axis.plot(ran[x], ran[y], marker="o", markersize=4, **STYLES[name])
        out = group[(group.outcome == OUT_OF_MEMORY) & (group[x] > ran[x].max())]
        if len(out) and y != "percent":
            last, size = ran.iloc[-1], out[x].iloc[0]
            axis.plot([size], [last[y] * size / last[x]], marker="x", markersize=9, color=STYLES[name]["color"])


def with_legend(figure: Figure, rows: pd.DataFrame) -> Figure:
    """The figure with a legend of the providers that ran."""
    names = [name for name in STYLES if name in set(rows[rows.outcome == OK].provider)]
    handles = [Line2D([], [], marker="o", markersize=4, **STYLES[name]) for name in names]
    labels = [f"{name}{PART[PROVIDERS[GRADIENT][name].result]}" for name in names]
    if OUT_OF_MEMORY in set(rows.outcome):
        handles.append(Line2D([], [], marker="x", markersize=9, color="#555555", linestyle=""))
        labels.append("out of memory")
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    return figure
