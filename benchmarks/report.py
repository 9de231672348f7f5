"""Tables and figures of what `benchmarks.measure` found, and whether the speed that was aimed at is reached.

Shapes: B queries, N bank rows, D features, C classes.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks import grid, providers
from benchmarks.grid import GRADIENT, LOSS, PRODUCTS, TRAFFIC, UPDATE
from benchmarks.measure import CASE, NOT_SUPPORTED, OK, OUT_OF_MEMORY, PROVIDERS

OURS = ("triton", "streaming", "ours")
"""Of these the first that ran is what a user gets."""
COMPUTES = {"loss": "all", "mean": "the means", "log sum": "log Σ", "product": "the products"}
PART = {"loss": "", "mean": " (means alone)", "log sum": " (log Σ alone)", "product": ""}
OPERATIONS = {LOSS: 2, GRADIENT: 4, PRODUCTS: 2}
"""Per query, row and feature; the loss and its gradient need two products with the bank."""
STYLES = {  # ours black; the others' colours are Paul Tol's "muted", made for the colour-blind
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


def derived(rows: pd.DataFrame) -> pd.DataFrame:
    """With seconds (on the device where it has a clock), operations and bytes per second, and the machine's share.

    The least a case can take is the larger of its operations at the rate of the machine's own matrix product in that
    arithmetic, and of one reading of the bank at the rate it copies or reads; `share` is that over the seconds.
    """
    rows = rows.copy()
    rows["seconds"] = rows.device_50.fillna(rows.wall_50)
    values = rows.B * rows.N * rows.D
    rows["flops"] = values * rows.what.map(OPERATIONS) / rows.seconds
    itemsize = rows.dtype.map({name: dtype.itemsize for name, dtype in providers.DTYPES.items()})
    rows["bandwidth"] = rows.N * rows.D * itemsize / rows.seconds
    rows.loc[rows.provider == "copy", "bandwidth"] *= 2  # it also writes
    ceiling = rows[rows.what == PRODUCTS].set_index("dtype").flops
    rows["flops_share"] = rows.flops / rows.dtype.map(ceiling)
    rows["bandwidth_share"] = rows.bandwidth / rows[rows.what == TRAFFIC].bandwidth.max()
    of_loss = rows.what.isin((LOSS, GRADIENT))
    rows["share"] = rows[["flops_share", "bandwidth_share"]].max(axis=1, skipna=False).where(of_loss)
    return rows


def ours(of_case: pd.DataFrame) -> pd.Series | None:
    """What a user gets, or None where none of ours ran."""
    ran = of_case[of_case.outcome == OK].set_index("provider")
    return next((ran.loc[name] for name in OURS if name in ran.index), None)


# Tables


def table(rows: pd.DataFrame, cases: list[grid.Case]) -> None:
    rows = derived(rows)
    first = rows.iloc[0]
    driver = f", driver {first.driver}, CUDA {first.cuda}" if first.driver else ""
    print(f"{first.machine}{driver}; torch {first.torch}, triton {first.triton}; {first.measured[:10]}. Medians.\n")
    for row in rows[rows.what == PRODUCTS].itertuples():
        print(f"- matrix product of {row.N}³, {row.dtype}: {rate(row.flops, 'FLOP/s')}")
    for row in rows[rows.what == TRAFFIC].itertuples():
        print(f"- {row.provider}: {rate(row.bandwidth, 'B/s')}")
    for (provider, why), _ in rows[rows.outcome == NOT_SUPPORTED].groupby(["provider", "why"], sort=False):
        print(f"- not supported, {provider}: {why}")
    chosen = rows[rows[CASE].apply(tuple, axis=1).isin(set(cases))]
    print_overview(chosen)
    print_against_attention(chosen)
    for case in cases:
        of_case = rows[(rows[CASE] == list(case)).all(axis=1)]
        if case.what not in (PRODUCTS, TRAFFIC) and len(of_case):
            print_case(case, of_case)


def print_overview(rows: pd.DataFrame) -> None:
    """Ours by B and N."""
    rows = rows[rows.what.isin((LOSS, GRADIENT))]
    rows = rows.assign(classes=rows.C.astype(str).where(rows.C != rows.N // 2, "N/2"))
    for (what, D, classes, dtype), some in rows.groupby(["what", "D", "classes", "dtype"], sort=False):
        sizes = sorted(some.N.unique())
        print(f"\n**{what}, D = {D}, {classes} classes, {dtype}: ours, and how many times as long naive takes**\n")
        print_head(["B", *(f"N = {N:,}" for N in sizes)])
        for B, of_batch in some.groupby("B"):
            print_row([f"{B:,}", *(_against_naive(of_batch[of_batch.N == N]) for N in sizes)])


def _against_naive(of_case: pd.DataFrame) -> str:
    fastest = ours(of_case)
    if fastest is None:
        return "" if of_case.empty else str(of_case.outcome[of_case.provider.isin(OURS)].iloc[0])
    cell = duration(fastest.seconds)
    for naive in of_case[of_case.provider == "naive"].itertuples():
        ratio = f"{naive.seconds / fastest.seconds:.1f} ×"
        cell += f", {ratio if naive.outcome == OK else f'naive {naive.outcome}'}"
    return cell


def print_against_attention(rows: pd.DataFrame) -> None:
    """Ours beside the fastest forward pass of attention in the same run, with the device's clock."""
    rows = rows[(rows.what == GRADIENT) & (rows.outcome == OK) & rows.device_50.notna()]
    for (D, C, dtype), some in rows.groupby(["D", "C", "dtype"], sort=False):
        lines = []
        for (N, B), of_case in some.groupby(["N", "B"]):
            attention = of_case[of_case.provider.str.startswith("SDPA")]
            fastest = ours(of_case)
            if fastest is None or attention.empty:
                continue
            naive = of_case.seconds[of_case.provider == "naive"]
            cells = [f"{B:,}", f"{N:,}", duration(fastest.seconds), duration(attention.seconds.min())]
            cells += [f"{fastest.seconds / attention.seconds.min():.2f}"]
            cells += ["" if naive.empty else f"{naive.iloc[0] / fastest.seconds:.0f} ×"]
            lines.append([*cells, rate(fastest.flops, "FLOP/s"), rate(fastest.bandwidth, "B/s")])
        if lines:
            print(f"\n**on the device, {GRADIENT}, D = {D}, {C:,} classes, {dtype}**\n")
            print_head(["B", "N", "ours", "attention's forward", "ours / it", "naive / ours", "rate", "reading"])
            for cells in lines:
                print_row(cells)


def print_case(case: grid.Case, of_case: pd.DataFrame) -> None:
    shape = f"B = {case.B:,}, N = {case.N:,}, D = {case.D}, {case.C:,} classes"
    print(f"\n**{case.what}, {shape}, {case.dtype}**\n")
    fastest = ours(of_case)
    on_gpu, of_loss = of_case.device_50.notna().any(), case.what in (LOSS, GRADIENT)
    head = ["", *(["computes"] if of_loss else []), "median", "20 to 80 %", *(["on the device"] if on_gpu else [])]
    print_head([*head, "over ours", *(["rate", "reading", "share"] if of_loss else []), "memory", "error"])
    missing = []
    for row in of_case[of_case.outcome != NOT_SUPPORTED].itertuples():
        if row.outcome != OK:
            missing.append(f"{row.provider}: {row.outcome}{f' ({row.why})' if row.why else ''}")
            continue
        cells = [row.provider, *([COMPUTES[PROVIDERS[case.what][row.provider].result]] if of_loss else [])]
        cells += [duration(row.wall_50), f"{duration(row.wall_20)} to {duration(row.wall_80)}"]
        cells += [duration(row.device_50)] if on_gpu else []
        cells.append("" if fastest is None else f"{row.seconds / fastest.seconds:.2f} ×")
        cells += [rate(row.flops, "FLOP/s"), rate(row.bandwidth, "B/s"), f"{row.share:.0%}"] if of_loss else []
        print_row([*cells, f"{row.peak_bytes / 2**20:,.0f} MB", "" if np.isnan(row.error) else f"{row.error:.1e}"])
    if missing:
        print("\n" + "; ".join(missing))


# Targets


class Target(NamedTuple):
    says: str
    case: grid.Case
    found: float
    """Not a number where it, or what it is compared with, was not measured or failed."""
    limit: float
    is_least: bool
    unit: str

    @property
    def held(self) -> bool:
        return self.found >= self.limit if self.is_least else self.found <= self.limit


def print_targets(rows: pd.DataFrame) -> None:
    """Of the speed on a GPU that the project aims at, what holds."""
    found = list(targets(derived(rows)))
    print(f"{sum(target.held for target in found)} of {len(found)} hold\n")
    print_head(["target", "B", "N", "classes", "found", "holds"])
    for target in found:
        shape = [f"{target.case.B:,}", f"{target.case.N:,}", f"{target.case.C:,}"]
        value = "not measured" if np.isnan(target.found) else f"{target.found:.3g} {target.unit}"
        print_row([target.says, *shape, value, "yes" if target.held else "**no**"])


def targets(rows: pd.DataFrame) -> Iterator[Target]:
    """Speed is judged by the device's clock, but for small banks, where launches take longest, by the user's."""
    for case in grid.targets():
        of_case = rows[(rows[CASE] == list(case)).all(axis=1) & (rows.outcome == OK)].set_index("provider")

        def found(provider: str, column: str = "seconds", of_case: pd.DataFrame = of_case) -> float:
            return float(of_case[column].get(provider, np.nan))

        if case.what == UPDATE:
            ours = found("ours")
            yield Target("update in at most 10 µs", case, 1e6 * ours, 10, False, "µs")
            yield Target("update at least 5 × as fast as PyTorch", case, found("PyTorch") / ours, 5, True, "×")
            continue
        ours = found("triton")
        if case.N == 10**4:
            ratio = found("naive", "wall_50") / found("triton", "wall_50")
            yield Target("no slower than naive, launches included", case, ratio, 1, True, "×")
            continue
        if case.B >= 256 and case.N < 10**8:
            attention = of_case.seconds[of_case.index.str.startswith("SDPA")].min()
            limit = 1.5 if case.C == 2 else 0.8 if case.B == 256 else 0.75
            yield Target(f"at most {limit} × attention's forward", case, ours / attention, limit, False, "×")
        if case.B >= 1024 and case.C == 45:
            yield Target("at least 70 % of the matrix rate", case, 100 * found("triton", "flops_share"), 70, True, "%")
        if case.B <= 64:
            least = 85 if case.B == 64 else 75
            share = 100 * found("triton", "bandwidth_share")
            yield Target(f"at least {least} % of bandwidth", case, share, least, True, "%")
        if (case.B, case.N) == (256, 10**8):
            yield Target("in at most 18 ms", case, 1e3 * ours, 18, False, "ms")
        if (case.B, case.N, case.C) == (256, 10**6, 45):
            for name, least in (("naive", 15), ("naive, compiled", 5)):
                yield Target(f"at least {least} × as fast as {name}", case, found(name) / ours, least, True, "×")
        if case.N == 10**8:
            yield Target("at most 64 MB of memory", case, found("triton", "peak_bytes") / 2**20, 64, False, "MB")


# Figures


def plot(rows: pd.DataFrame, folder: Path, name: str) -> list[Path]:
    """Time against N, memory against N, and the share of what the machine can do against B."""
    rows = derived(rows)
    rows = rows[rows.what == GRADIENT]
    if not (rows.outcome == OK).any():
        raise SystemExit("no loss with its gradient has been measured yet")
    D, C, dtype = rows[["D", "C", "dtype"]].value_counts().index[0]  # of which there is most
    rows = rows[(rows[["D", "C", "dtype"]] == [D, C, dtype]).all(axis=1)]
    below = f"{rows.machine.iloc[0]}; loss and gradient, D = {D}, {C:,} classes, {dtype}"
    figures = {"time": time_by_N(rows), "memory": memory_by_N(rows), "share": share_by_B(rows)}
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for kind, figure in figures.items():
        figure.suptitle(below, fontsize=9, color="#555555")
        written.append(folder / f"{name}-{kind}.png")
        figure.savefig(written[-1], dpi=110)
    return written


def time_by_N(rows: pd.DataFrame) -> Figure:
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
    """A line for each provider; × is where its memory ran out, beyond its last point."""
    axis.grid(alpha=0.3)
    for name, of_provider in rows.groupby("provider", sort=False):
        of_provider = of_provider.sort_values(x)
        ran = of_provider[of_provider.outcome == OK]
        if ran.empty:
            continue
        axis.plot(ran[x], ran[y], marker="o", markersize=4, **STYLES[name])
        out = of_provider[(of_provider.outcome == OUT_OF_MEMORY) & (of_provider[x] > ran[x].max())]
        if len(out) and y != "percent":
            last = ran.iloc[-1]
            place = out[x].iloc[0]
            axis.plot([place], [last[y] * place / last[x]], marker="x", markersize=9, color=STYLES[name]["color"])


def with_legend(figure: Figure, rows: pd.DataFrame) -> Figure:
    names = [name for name in STYLES if name in set(rows[rows.outcome == OK].provider)]
    handles = [Line2D([], [], marker="o", markersize=4, **STYLES[name]) for name in names]
    labels = [f"{name}{PART[PROVIDERS[GRADIENT][name].result]}" for name in names]
    if OUT_OF_MEMORY in set(rows.outcome):
        handles.append(Line2D([], [], marker="x", markersize=9, color="#555555", linestyle=""))
        labels.append("out of memory")
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    return figure


# Words


def duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def rate(value: float, unit: str) -> str:
    return f"{value / 1e12:.3g} T{unit}" if value >= 1e12 else f"{value / 1e9:.3g} G{unit}"


def print_head(cells: list[str]) -> None:
    print_row(cells)
    print("|" + "---|" * len(cells))


def print_row(cells: list[str]) -> None:
    print("| " + " | ".join(cells) + " |")
