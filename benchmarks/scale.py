"""How the loss scales with the bank, with ranks and with pieces, against the model of `benchmarks.cost`.

python -m benchmarks.scale measure       about ten minutes; into benchmarks/results/scale.json, --part for some of it
python -m benchmarks.scale table         Markdown: measured, modelled, and predicted for machines that nobody ran it on

A step is the loss of a batch, its gradient, and update_bank. It is timed in fresh processes, ranks joined by Gloo
through a file; its time is that of the slowest rank.

Shapes: W ranks, b queries of each, B of all, N images, D features, C classes.
"""

import argparse
import datetime
import json
import math
import multiprocessing
import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, distributed, nn

from benchmarks import cost, memory
from ntdne_kernels import LabelIndex, NTDNELoss
from ntdne_kernels.functional import leave_one_out_log_scores, ntdne_loss
from ntdne_kernels.ops import sharded
from ntdne_kernels.ops.products import exp_, scaled_scores_, weighted_rows
from ntdne_kernels.ops.streaming import TILE_ELEMENTS

RESULTS = Path(__file__).parent / "results" / "scale.json"
B, D, C = 256, 128, 45
CORES = 2
SIZES = {"bfloat16": (10**5, 3 * 10**5, 10**6, 3 * 10**6, 10**7), "float32": (10**5, 3 * 10**5, 10**6)}
REPEATS = 7
COLLECTIVES = {
    "all-gather": (sharded, "_all_gather"),
    "all-reduce": (distributed, "all_reduce"),
    "all-to-all": (distributed, "all_to_all_single"),
}
"""Where the sharded loss finds those that it calls."""
Row = dict[str, Any]


def seconds_of(function: Callable[[], Any], repeats: int, before: Callable[[], Any] = lambda: None) -> list[float]:
    """Of each call, after one that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        before()
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def on_ranks(W: int, threads: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What function(*arguments) returns on each rank; one alone has no process group."""
    fresh = multiprocessing.get_context("forkserver")  # forked from a process that has done nothing but import
    fresh.set_forkserver_preload(["ntdne_kernels", "torch._dynamo"])
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(W, fresh) as pool:
        store = f"file://{folder}/store"
        futures = [pool.submit(_rank, store, rank, W, threads, function, arguments) for rank in range(W)]
        return [future.result() for future in futures]


def _rank(store: str, rank: int, W: int, threads: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    torch.set_num_threads(threads)
    if W == 1:
        return function(*arguments)
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=W)
    try:
        return function(*arguments)
    finally:
        distributed.destroy_process_group()  # the others, if this one failed, do not wait


# What this machine can do


def rates(shrink: int) -> Iterator[Row]:
    for threads in range(1, CORES + 1):
        for row in on_ranks(1, threads, core_rates, (1 << 28) // shrink)[0]:
            yield {"threads": threads, **row}
    for W in (2, 4):
        yield from on_ranks(W, 1, network_rates, (1 << 20) // shrink)[0]


def core_rates(elements: int) -> list[Row]:
    """Of a tile of the streaming backend the two products, and what it does to the logits between them; reading."""
    length = TILE_ELEMENTS["cpu"] // B
    weights = torch.randn(B, length)
    logits, found = weights.clone(), []
    for dtype in ("float32", "bfloat16"):
        queries, tile = (torch.randn(rows, D).to(getattr(torch, dtype)) for rows in (B, length))

        def products(queries: Tensor = queries, tile: Tensor = tile) -> None:
            scaled_scores_(logits, queries, tile, 10)
            weighted_rows(weights, tile)

        found.append(
            {"rate": "products", "dtype": dtype, "work": 4 * B * length * D, "seconds": seconds_of(products, 101)}
        )

    def exponentials() -> None:
        exp_(logits)
        logits.sum(dim=1)

    seconds = seconds_of(exponentials, 101, before=lambda: logits.copy_(weights))
    found.append({"rate": "exponentials", "work": B * length, "seconds": seconds})
    x = torch.ones(elements)
    found.append({"rate": "reading", "work": x.nbytes, "seconds": seconds_of(x.sum, 15)})
    return found


def network_rates(elements: int) -> list[Row]:
    """An all-reduce of one number, and an all-to-all of so many for each rank."""
    W = distributed.get_world_size()
    outgoing = torch.ones(W * elements)
    incoming, small = torch.empty_like(outgoing), torch.ones(1)

    def all_reduce() -> None:
        distributed.all_reduce(small)

    def all_to_all() -> None:
        distributed.all_to_all_single(incoming, outgoing)

    sent = 4 * elements * (W - 1)
    return [
        {"rate": "all-reduce", "ranks": W, "work": 1, "seconds": seconds_of(all_reduce, 101, distributed.barrier)},
        {"rate": "all-to-all", "ranks": W, "work": sent, "seconds": seconds_of(all_to_all, 15, distributed.barrier)},
    ]


# Steps


def sizes(shrink: int) -> Iterator[Row]:
    """One process."""
    for dtype, Ns in SIZES.items():
        for N in Ns:
            yield trained(N // shrink, B, dtype, 1, CORES)


def ranks(shrink: int) -> Iterator[Row]:
    """The same batch and bank on more ranks, of one thread each."""
    for W in (1, 2, 4):
        yield trained(10**6 // shrink, B, "bfloat16", W, 1)


def overlap(shrink: int) -> Iterator[Row]:
    """A large batch, gathered in more and more pieces."""
    for N in (10**4, 10**5):
        for pieces in (1, 2, 4):
            yield trained(N // shrink, 4096, "bfloat16", 2, 1, 4096 // pieces)


def trained(N: int, batch: int, dtype: str, W: int, threads: int, piece: int = sharded.PIECE["cpu"]) -> Row:
    of_ranks = on_ranks(W, threads, train, N, batch, dtype, piece)
    measured = {name: [of_rank[name] for of_rank in of_ranks] for name in of_ranks[0]}
    return {"N": N, "B": batch, "dtype": dtype, "ranks": W, "threads": threads, "piece": piece, **measured}


def train(N: int, batch: int, dtype: str, piece: int) -> Row:
    """Seconds of each step of this rank, those of it in collectives, and the bytes that a step adds to what is kept."""
    sharded.PIECE["cpu"] = piece
    rank, W = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    source = torch.Generator().manual_seed(rank)
    in_collectives = time_collectives()

    def make(N: int) -> NTDNELoss:
        group = distributed.group.WORLD if W > 1 else None
        start = torch.Generator().manual_seed(0)
        labels = torch.arange(N) % C
        return NTDNELoss(labels, D, k=None, generator=start, dtype=getattr(torch, dtype), process_group=group)

    def step(criterion: NTDNELoss) -> tuple[float, float]:
        features = torch.randn(batch // W, D, generator=source, requires_grad=True)
        index = torch.randint(len(criterion.memory), (batch // W,), generator=source)
        if W > 1:
            distributed.barrier()
        in_collectives.clear()
        start = time.perf_counter()
        criterion(features, index).backward()
        criterion.update_bank(features, index)
        return time.perf_counter() - start, sum(in_collectives)

    step(make(4 * batch))  # libraries allocate on first use
    criterion = make(N)
    peak = memory.added_by(lambda: step(criterion))
    seconds, communication = zip(*(step(criterion) for _ in range(REPEATS)), strict=True)
    return {"seconds": seconds, "communication": communication, "peak_bytes": peak}


def time_collectives() -> list[float]:
    """From here on: seconds of each call of a collective, and of each wait for one that was begun."""
    spent: list[float] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments, **options)
            spent.append(time.perf_counter() - start)
            return SimpleNamespace(wait=timed(result.wait)) if isinstance(result, distributed.Work) else result

        return call

    for module, name in COLLECTIVES.values():
        setattr(module, name, timed(getattr(module, name)))
    return spent


# What the dtype of the storage costs


def storage(shrink: int) -> Iterator[Row]:
    """Relative errors of the loss and its gradient: rows rounded, and rounded rows in that dtype's arithmetic."""
    source = torch.Generator().manual_seed(0)
    N = 10**5 // shrink
    labels = torch.arange(N).mul(C).div(N, rounding_mode="floor")
    centres = nn.functional.normalize(torch.randn(C, D, generator=source, dtype=torch.float64), dim=1)
    spread = 1.5 / math.sqrt(D)  # of a cosine of 0.3 within a class
    rows = centres[labels] + spread * torch.randn(N, D, generator=source, dtype=torch.float64)
    rows = nn.functional.normalize(rows, dim=1)
    index = torch.randint(N, (B,), generator=source)
    classes = LabelIndex.from_labels(labels)

    def loss_and_gradient(bank: Tensor) -> tuple[Tensor, Tensor]:
        features = rows[index].clone().requires_grad_()
        loss = ntdne_loss(features, bank, labels[index], classes, index)
        loss.backward()
        assert features.grad is not None
        return loss.detach().double(), features.grad

    banks = {name: rows.to(getattr(torch, name)) for name in ("float64", "float32", "bfloat16", "float16")}
    found = {name: loss_and_gradient(bank) for name, bank in banks.items()}
    p = leave_one_out_log_scores(rows[index], rows, labels[index], classes, index).exp()
    for name in ("float32", "bfloat16", "float16"):
        references = {"float64": found["float64"], "float32": found["float32"]}
        rounded = loss_and_gradient(banks[name].double())
        compared = [("rows", against, rounded, reference) for against, reference in references.items()]
        compared += [
            ("rows and arithmetic", against, found[name], reference) for against, reference in references.items()
        ]
        for what, against, (loss, gradient), (true_loss, true_gradient) in compared:
            difference = gradient - true_gradient
            yield {
                "dtype": name,
                "rounded": what,
                "against": against,
                "N": N,
                "mean_score": float(p.mean()),
                "loss": float((loss - true_loss).abs() / true_loss),
                "gradient": float(difference.norm() / true_gradient.norm()),
                "worst_row": float((difference.norm(dim=1) / true_gradient.norm(dim=1)).max()),
            }


PARTS: dict[str, Callable[[int], Iterator[Row]]] = {
    "rates": rates,
    "sizes": sizes,
    "ranks": ranks,
    "overlap": overlap,
    "storage": storage,
}


def machine() -> Row:
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "load_before": os.getloadavg()[0],
    }


def measure(parts: list[str], path: Path, shrink: int) -> None:
    """Each part replaces what the file has of it, once it is done."""
    for part in parts:
        here, start = machine(), time.perf_counter()
        rows = list(PARTS[part](shrink))
        print(f"{part}: {len(rows)} rows in {time.perf_counter() - start:.0f} s", flush=True)
        run = json.loads(path.read_text()) if path.exists() else {}
        written = path.with_suffix(".new")
        written.write_text(json.dumps(run | {part: {"machine": here, "shrink": shrink, "rows": rows}}, indent=1) + "\n")
        written.replace(path)


# Tables


def table(path: Path) -> None:
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


def print_rates(of_part: Row) -> None:
    m = of_part["machine"]
    print(f"{m['cpu']}, {m['cores']} cores, {m['vector_instructions']}; torch {m['torch']}; {m['date']}. Medians.\n")
    print("**What the machine does**\n")
    units = {"products": "GFLOP/s", "exponentials": "·10⁹/s", "reading": "GB/s", "all-to-all": "GB/s"}
    for row in of_part["rows"]:
        name = ", ".join(str(row[key]) for key in ("rate", "dtype") if key in row)
        where = f"threads: {row['threads']}" if "threads" in row else f"ranks: {row['ranks']}"
        seconds = statistics.median(row["seconds"])
        if row["rate"] in units:
            print(f"- {name}, {where}: {row['work'] / seconds / 1e9:.3g} {units[row['rate']]}")
        else:
            print(f"- {name} of one number, {where}: {seconds * 1e6:.0f} µs")
    print("\nThe model makes of these what a step should take (benchmarks/cost.py).")


def print_sizes(rows: list[Row], measured: list[Row]) -> None:
    print(f"\n**A step in one process of {CORES} threads, B = {B}, D = {D}, {C} classes**\n")
    print_rows(
        {
            "bank": row["dtype"],
            "N": f"{row['N']:,}",
            **against_model(row, measured),
            "beyond the bank": f"{row['peak_bytes'][0] / 2**20:.0f} MB",
            "the bank": f"{row['N'] * D * getattr(torch, row['dtype']).itemsize / 2**20:,.0f} MB",
        }
        for row in rows
    )


def print_ranks(rows: list[Row], measured: list[Row]) -> None:
    first = statistics.median(slowest(rows[0]))
    print(f"\n**The same step on ranks of one thread, B = {B} in all, N = {rows[0]['N']:,}, bfloat16**\n")
    print("In collectives: the transfer, and waiting for the rank that comes last.\n")
    print_rows(
        {
            "ranks": f"{row['ranks']}" + (f" on {CORES} cores" if row["ranks"] > CORES else ""),
            **against_model(row, measured),
            "against one": f"{first / statistics.median(slowest(row)):.2f} × as fast",
            **in_collectives(row),
        }
        for row in rows
    )


def print_overlap(rows: list[Row], measured: list[Row]) -> None:
    print(f"\n**B = {rows[0]['B']} on {rows[0]['ranks']} ranks of one thread, gathered in pieces**\n")
    print_rows(
        {
            "N": f"{row['N']:,}",
            "pieces": str(row["B"] // row["piece"]),
            **against_model(row, measured),
            **in_collectives(row),
        }
        for row in rows
    )


def print_storage(rows: list[Row]) -> None:
    N, score = rows[0]["N"], rows[0]["mean_score"]
    print(f"\n**Relative error by the dtype of the bank, N = {N:,}, mean score {score:.2f}**\n")
    names = {"loss": "loss", "gradient": "gradient", "worst_row": "gradient of the worst query"}
    print_rows(
        {name: row[name] for name in ("dtype", "rounded", "against")}
        | {title: f"{row[name]:.1e}" for name, title in names.items()}
        for row in rows
        if row["dtype"] != row["against"]
    )


H200 = cost.Machine(
    flops=790e12, bandwidth=4.3e12, exponentials=3.9e12, network=math.inf, latency=math.nan, at_once=True
)
"""Measured with PyTorch: matrix products in bfloat16, reading, and exponentials."""
CLUSTERS = {
    1: H200,
    # NVLink 4, one direction. NCCL's own table of latencies (src/graph/tuning.cc, protocol LL): 6.6 µs and 0.6 µs for
    # each of the 7 steps of an all-gather's ring are 11 µs, both ways of an all-reduce's tree 15 µs; 5 µs to launch it.
    8: H200._replace(network=450e9, latency=20e-6),
    # InfiniBand NDR, one 400 Gbit/s adapter for each GPU; rings that use all eight adapters of a machine may be faster.
    # 56 steps in the machines of 1.1 µs and 7 between them of 2.7 µs are 86 µs for an all-gather; an all-reduce 52 µs.
    64: H200._replace(network=50e9, latency=90e-6),
}
CAPACITY = 141e9


def print_predictions() -> None:
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
    """Seconds of each step, of the rank that took longest."""
    return [max(of_ranks) for of_ranks in zip(*row["seconds"], strict=True)]


def against_model(row: Row, measured: list[Row]) -> dict[str, str]:
    """The measured step beside the one that the machine's rates foretell."""
    W, seconds = row["ranks"], slowest(row)
    itemsize = getattr(torch, row["dtype"]).itemsize
    here = this_machine(measured, row["dtype"], W, row["threads"])
    expected = cost.step(here, row["B"] // W, row["N"], D, W, itemsize, row["piece"]).total
    median = statistics.median(seconds)
    return {
        "measured": duration(median),
        "least to most": f"{duration(min(seconds))} to {duration(max(seconds))}",
        "model": duration(expected),
        "model/measured": f"{expected / median:.0%}",
    }


def in_collectives(row: Row) -> dict[str, str]:
    """What each rank spends in collectives in a step."""
    medians = [statistics.median(of_rank) for of_rank in row["communication"]]
    return {"in collectives, by rank": " / ".join(map(duration, medians)) if row["ranks"] > 1 else "none"}


def this_machine(measured: list[Row], dtype: str, W: int, threads: int) -> cost.Machine:
    """What one of W ranks has: they share what all their threads reach together, on as many cores as there are."""

    def rate(name: str, **facts: Any) -> float:
        facts = {"rate": name, **facts}
        (row,) = (row for row in measured if facts.items() <= row.items())
        return float(row["work"] / statistics.median(row["seconds"]))

    together = min(W * threads, CORES)
    return cost.Machine(
        flops=rate("products", dtype=dtype, threads=together) / W,
        bandwidth=rate("reading", threads=together) / W,
        exponentials=rate("exponentials", threads=together) / W,
        network=rate("all-to-all", ranks=W) if W > 1 else math.inf,
        latency=1 / rate("all-reduce", ranks=W) if W > 1 else 0,
        at_once=False,
    )


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def print_rows(rows: Iterator[dict[str, str]]) -> None:
    for i, row in enumerate(rows):
        if i == 0:
            print("| " + " | ".join(row) + " |\n|" + "---|" * len(row))
        print("| " + " | ".join(row.values()) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description="How the loss scales, measured and modelled.")
    parser.add_argument("command", choices=("measure", "table"))
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure; all")
    parser.add_argument("--file", type=Path, default=RESULTS, help="of the results")
    parser.add_argument("--shrink", type=int, default=1, help="divide N by this, to see that all works")
    arguments = parser.parse_args()
    if arguments.command == "measure":
        measure(arguments.part, arguments.file, arguments.shrink)
    else:
        table(arguments.file)


if __name__ == "__main__":
    main()
