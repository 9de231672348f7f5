"""Markdown tables of what was measured, beside the model, and of the steps that the model predicts for GPU clusters.

Shapes: W ranks, B queries of all, N images, D features, C classes.
"""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import cost
from benchmarks.markdown import print_head, print_row
from benchmarks.scale.measure import CORES, PARTS, B, C, D, Row
from benchmarks.scale.model import CAPACITY, CLUSTERS, this_machine


def table(path: Path) -> None:
    """Print all tables of a file of results.

    Raises:
        SystemExit: The file lacks parts.
    """
    run = json.loads(path.read_text()) if path.exists() else {}
    missing = [part for part in PARTS if part not in run]
    if missing:
        raise SystemExit(f"{path} lacks parts: python -m benchmarks.scale measure --part {' '.join(missing)}")
    print_rates(run["rates"])
    print_sizes(run["sizes"]["rows"], run["rates"]["rows"])
    print_ranks(run["ranks"]["rows"], run["rates"]["rows"])
    print_overlap(run["overlap"]["rows"], run["rates"]["rows"])
    print_storage(run["storage"]["rows"])
    print_predictions()


def print_rates(part: Row) -> None:
    """What the machine does, by kind of work."""
    m = part["machine"]
    print(f"{m['cpu']}, {m['cores']} cores, {m['vector_instructions']}; torch {m['torch']}; {m['date']}. Medians.\n")
    print("**What the machine does**\n")
    units = {"products": "GFLOP/s", "exponentials": "·10⁹/s", "reading": "GB/s", "all-to-all": "GB/s"}
    for row in part["rows"]:
        name = ", ".join(str(row[key]) for key in ("rate", "dtype") if key in row)
        where = f"threads: {row['threads']}" if "threads" in row else f"ranks: {row['ranks']}"
        seconds = statistics.median(row["seconds"])
        if row["rate"] in units:
            print(f"- {name}, {where}: {row['work'] / seconds / 1e9:.3g} {units[row['rate']]}")
        else:
            print(f"- {name} of one number, {where}: {seconds * 1e6:.0f} µs")
    print("\nThe model makes of these what a step should take (benchmarks/cost.py).")


def print_sizes(rows: list[Row], rates: list[Row]) -> None:
    """Steps of one process by the size of the bank."""
    print(f"\n**A step in one process of {CORES} threads, B = {B}, D = {D}, {C} classes**\n")
    print_rows(
        {
            "bank": row["dtype"],
            "N": f"{row['N']:,}",
            **against_model(row, rates),
            "beyond the bank": f"{row['peak_bytes'][0] / 2**20:.0f} MB",
            "the bank": f"{row['N'] * D * getattr(torch, row['dtype']).itemsize / 2**20:,.0f} MB",
        }
        for row in rows
    )


def print_ranks(rows: list[Row], rates: list[Row]) -> None:
    """The same step on more and more ranks."""
    first = statistics.median(slowest(rows[0]))
    print(f"\n**The same step on ranks of one thread, B = {B} in all, N = {rows[0]['N']:,}, bfloat16**\n")
    print("In collectives: the transfer, and waiting for the rank that comes last.\n")
    print_rows(
        {
            "ranks": f"{row['ranks']}" + (f" on {CORES} cores" if row["ranks"] > CORES else ""),
            **against_model(row, rates),
            "against one": f"{first / statistics.median(slowest(row)):.2f} × as fast",
            **in_collectives(row),
        }
        for row in rows
    )


def print_overlap(rows: list[Row], rates: list[Row]) -> None:
    """A step whose batch is gathered in more and more pieces."""
    print(f"\n**B = {rows[0]['B']} on {rows[0]['ranks']} ranks of one thread, gathered in pieces**\n")
    print_rows(
        {
            "N": f"{row['N']:,}",
            "pieces": str(row["B"] // row["piece"]),
            **against_model(row, rates),
            **in_collectives(row),
        }
        for row in rows
    )


def print_storage(rows: list[Row]) -> None:
    """What it costs in accuracy to keep the bank in fewer bits."""
    N, score = rows[0]["N"], rows[0]["mean_score"]
    print(f"\n**Relative error by the dtype of the bank, N = {N:,}, mean score {score:.2f}**\n")
    names = {"loss": "loss", "gradient": "gradient", "worst_row": "gradient of the worst query"}
    print_rows(
        {name: row[name] for name in ("dtype", "rounded", "against")}
        | {title: f"{row[name]:.1e}" for name, title in names.items()}
        for row in rows
        if row["dtype"] != row["against"]
    )


def print_predictions() -> None:
    """What the model says of GPU clusters."""
    print(f"\n**Predicted, never run: steps on H200 GPUs, B = {B} on each, D = {D}, {C} classes, bfloat16**\n")
    for W, gpu in CLUSTERS.items():
        if W > 1:
            print(f"{W} GPUs: {gpu.network / 1e9:.0f} GB/s each, {gpu.latency * 1e6:.0f} µs a collective.")
    print(
        "Each cell: the step, the share of it that waits for communication, memory of a GPU. What the chips allow: "
        "launches, the encoder, and how far kernels stay below the chip's rates are not in it.\n"
    )

    def cell(W: int, N: int) -> str:
        bytes_needed = sum(cost.memory(B, N, D, W, C, 2).values())
        if bytes_needed > CAPACITY:
            return f"does not fit: {bytes_needed / 1e9:,.0f} GB"
        step = cost.step(CLUSTERS[W], B, N, D, W, 2)
        return f"{duration(step.total)}, {1 - step.compute / step.total:.0%}, {bytes_needed / 1e9:.2g} GB"

    print_rows(
        {"N": f"{N:,}", **{f"{W} GPU{'s' if W > 1 else ''}": cell(W, N) for W in CLUSTERS}}
        for N in (10**6, 10**7, 10**8, 10**9)
    )


def slowest(row: Row) -> list[float]:
    """Seconds of each step on the rank that took longest."""
    return [max(seconds) for seconds in zip(*row["seconds"], strict=True)]


def against_model(row: Row, rates: list[Row]) -> dict[str, str]:
    """The measured step, and what the model predicts from the machine's rates."""
    W, seconds = row["ranks"], slowest(row)
    itemsize = getattr(torch, row["dtype"]).itemsize
    here = this_machine(rates, row["dtype"], W, row["threads"])
    expected = cost.step(here, row["B"] // W, row["N"], D, W, itemsize, row["piece"]).total
    median = statistics.median(seconds)
    return {
        "measured": duration(median),
        "least to most": f"{duration(min(seconds))} to {duration(max(seconds))}",
        "model": duration(expected),
        "model/measured": f"{expected / median:.0%}",
    }


def in_collectives(row: Row) -> dict[str, str]:
    """The time that each rank spends in collectives in a step."""
    medians = [statistics.median(seconds) for seconds in row["communication"]]
    return {"in collectives, by rank": " / ".join(map(duration, medians)) if row["ranks"] > 1 else "none"}


def duration(seconds: float) -> str:
    """In s or ms: steps are compared with each other, so µs are not used."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def print_rows(rows: Iterator[dict[str, str]]) -> None:
    """A table whose head is the keys of the rows."""
    for i, row in enumerate(rows):
        if i == 0:
            print_head(row)
        print_row(row.values())
