"""Markdown tables of what `benchmarks.measure` found.

Shapes: B queries, N bank rows, D features, C classes.
"""

from typing import Any

import numpy as np
import pandas as pd

from benchmarks import grid
from benchmarks.busy import beside
from benchmarks.grid import GRADIENT, LOSS, PRODUCTS, TRAFFIC
from benchmarks.markdown import duration, print_head, print_row, rate
from benchmarks.measure import PROVIDERS, describe
from benchmarks.rates import OURS, ours, with_rates
from benchmarks.rows import CASE, NOT_SUPPORTED, OK

COMPUTES = {"loss": "all", "mean": "the means", "log sum": "log Σ", "product": "the products"}


def print_tables(rows: pd.DataFrame, cases: list[grid.Case]) -> None:
    """What the machine can do, an overview, and a table for each of these cases."""
    rows = with_rates(rows)
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
    by_case = dict(iter(rows.groupby(CASE, sort=False)))
    for case in cases:
        if case.what in (PRODUCTS, TRAFFIC) or case not in by_case:
            continue
        if case.busy:
            print_load(case, by_case[case], by_case.get(case._replace(busy=0), rows[:0]))
        else:
            print_case(case, by_case[case])


def print_overview(rows: pd.DataFrame) -> None:
    """Our time by B and N, and how many times as long naive takes."""
    rows = rows[rows.what.isin((LOSS, GRADIENT))]
    rows = rows.assign(classes=rows.C.astype(str).where(rows.C != rows.N // 2, "N/2"))
    kind = ["what", "D", "classes", "dtype", "busy"]
    for (what, D, classes, dtype, busy), group in rows.groupby(kind, sort=False):
        sizes = sorted(group.N.unique())
        of = f"{what}, D = {D}, {classes} classes, {dtype}{beside(busy)}"
        print(f"\n**{of}: ours, and how many times as long naive takes**\n")
        print_head(["B", *(f"N = {N:,}" for N in sizes)])
        for B, in_batch in group.groupby("B"):
            print_row([f"{B:,}", *(_against_naive(in_batch[in_batch.N == N]) for N in sizes)])


def _against_naive(rows: pd.DataFrame) -> str:
    fastest = ours(rows)
    if fastest is None:
        return "" if rows.empty else str(rows.outcome[rows.provider.isin(OURS)].iloc[0])
    cell = duration(fastest.seconds)
    for naive in rows[rows.provider == "naive"].itertuples():
        ratio = f"{naive.seconds / fastest.seconds:.1f} ×"
        cell += f", {ratio if naive.outcome == OK else f'naive {naive.outcome}'}"
    return cell


def print_against_attention(rows: pd.DataFrame) -> None:
    """Ours beside the fastest forward pass of attention in the same run, by the device's clock."""
    rows = rows[(rows.what == GRADIENT) & (rows.outcome == OK) & rows.device_50.notna() & (rows.busy == 0)]
    for (D, C, dtype), group in rows.groupby(["D", "C", "dtype"], sort=False):
        lines = []
        for (N, B), in_case in group.groupby(["N", "B"]):
            attention = in_case[in_case.provider.str.startswith("SDPA")]
            fastest = ours(in_case)
            if fastest is None or attention.empty:
                continue
            naive = in_case.seconds[in_case.provider == "naive"]
            cells = [f"{B:,}", f"{N:,}", duration(fastest.seconds), duration(attention.seconds.min())]
            cells += [f"{fastest.seconds / attention.seconds.min():.2f}"]
            cells += ["" if naive.empty else f"{naive.iloc[0] / fastest.seconds:.0f} ×"]
            lines.append([*cells, rate(fastest.flops, "FLOP/s"), rate(fastest.bandwidth, "B/s")])
        if lines:
            print(f"\n**on the device, {GRADIENT}, D = {D}, {C:,} classes, {dtype}**\n")
            print_head(["B", "N", "ours", "attention's forward", "ours / it", "naive / ours", "rate", "reading"])
            for cells in lines:
                print_row(cells)


def print_case(case: grid.Case, rows: pd.DataFrame) -> None:
    """All providers of a case on the idle machine, and below the table how those ended that have no time."""
    print(f"\n**{describe(case)}**\n")
    fastest = ours(rows)
    on_gpu, is_loss = rows.device_50.notna().any(), case.what in (LOSS, GRADIENT)
    head = ["", *(["computes"] if is_loss else []), "median", "20 to 80 %", *(["on the device"] if on_gpu else [])]
    print_head([*head, "over ours", *(["rate", "reading", "share"] if is_loss else []), "memory", "error"])
    for row in rows[rows.outcome == OK].itertuples():
        cells = [row.provider, *([COMPUTES[PROVIDERS[case.what][row.provider].result]] if is_loss else [])]
        cells += [duration(row.wall_50), f"{duration(row.wall_20)} to {duration(row.wall_80)}"]
        cells += [duration(row.device_50)] if on_gpu else []
        cells.append("" if fastest is None else f"{row.seconds / fastest.seconds:.2f} ×")
        cells += [rate(row.flops, "FLOP/s"), rate(row.bandwidth, "B/s"), f"{row.share:.0%}"] if is_loss else []
        print_row([*cells, f"{row.peak_bytes / 2**20:,.0f} MB", "" if np.isnan(row.error) else f"{row.error:.1e}"])
    _print_missing(rows)


def print_load(case: grid.Case, loaded: pd.DataFrame, idle: pd.DataFrame) -> None:
    """All providers of a case beside busy processes, each beside its own time and ours on the idle machine."""
    print(f"\n**{describe(case)}**\n")
    print_head(["", "idle", "20 to 80 %", "over ours", "busy", "20 to 80 %", "over ours", "busy / idle"])
    of_idle = idle[idle.outcome == OK].set_index("provider")
    for row in loaded[loaded.outcome == OK].itertuples():
        alone = of_idle.loc[row.provider] if row.provider in of_idle.index else None
        before = ["", "", ""] if alone is None else _times_over_ours(alone, idle)
        ratio = "" if alone is None else f"{row.seconds / alone.seconds:.2f} ×"
        print_row([row.provider, *before, *_times_over_ours(row, loaded), ratio])
    _print_missing(loaded)


def _times_over_ours(row: Any, rows: pd.DataFrame) -> list[str]:
    """The median, the quantiles and how many times ours the median is, of a row of a case."""
    fastest = ours(rows)
    over = "" if fastest is None else f"{row.seconds / fastest.seconds:.2f} ×"
    return [duration(row.wall_50), f"{duration(row.wall_20)} to {duration(row.wall_80)}", over]


def _print_missing(rows: pd.DataFrame) -> None:
    """How the providers of a case ended that have no time."""
    missing = rows[~rows.outcome.isin((OK, NOT_SUPPORTED))].itertuples()
    text = "; ".join(f"{row.provider}: {row.outcome}{f' ({row.why})' if row.why else ''}" for row in missing)
    if text:
        print(f"\n{text}")
