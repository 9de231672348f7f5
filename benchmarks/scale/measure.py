"""Measure how a step scales: with the bank, with ranks, with pieces of a batch; and what the machine can do.

A step is the loss of a batch, its gradient, and update_bank. It is timed in fresh processes, whose ranks Gloo joins
through a file. The time of a step is that of its slowest rank.

Shapes: W ranks, b queries of each, B of all, N images, D features, C classes.
"""

import itertools
import json
import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, distributed, nn

from benchmarks import memory
from benchmarks.machine import describe_cpu
from ntdne_kernels import LabelIndex, NTDNELoss
from ntdne_kernels.functional import leave_one_out_log_scores, ntdne_loss
from ntdne_kernels.ops import sharded
from ntdne_kernels.ops.products import exp_, scaled_scores_, weighted_rows
from ntdne_kernels.ops.streaming import TILE_ELEMENTS

RESULTS = Path(__file__).parent.parent / "results" / "scale.json"
B, D, C = 256, 128, 45
CORES = 2
SIZES = {"bfloat16": (10**5, 3 * 10**5, 10**6, 3 * 10**6, 10**7), "float32": (10**5, 3 * 10**5, 10**6)}
REPEATS = 7
COLLECTIVES = {
    "all-gather": (sharded, "_all_gather"),
    "all-reduce": (distributed, "all_reduce"),
    "all-to-all": (distributed, "all_to_all_single"),
}
"""Where the sharded loss looks up the collectives that it calls."""
Row = dict[str, Any]


def seconds_of(function: Callable[[], Any], repeats: int, before: Callable[[], Any] = lambda: None) -> list[float]:
    """Seconds of each call, after one that is not counted. `before` is not timed."""
    seconds = []
    for _ in range(repeats + 1):
        before()
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def on_ranks(W: int, threads: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What function(*arguments) returns on each of W ranks; a single rank has no process group."""
    context = multiprocessing.get_context("forkserver")  # forks from a process that has only imported modules
    context.set_forkserver_preload(["ntdne_kernels", "torch._dynamo"])
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(W, context) as pool:
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
        distributed.destroy_process_group()  # where this rank failed, the others then do not wait for it


# What this machine can do


def rates(shrink: int) -> Iterator[Row]:
    """The rates that the model of a step needs."""
    for threads in range(1, CORES + 1):
        for row in on_ranks(1, threads, core_rates, (1 << 28) // shrink)[0]:
            yield {"threads": threads, **row}
    for W in (2, 4):
        yield from on_ranks(W, 1, network_rates, (1 << 20) // shrink)[0]


def core_rates(elements: int) -> list[Row]:
    """Of one process: a tile's two products, what the streaming backend does to the logits between them, reading."""
    length = TILE_ELEMENTS["cpu"] // B
    weights = torch.randn(B, length)
    logits, found = weights.clone(), list[Row]()
    for dtype in ("float32", "bfloat16"):
        queries, tile = (torch.randn(rows, D).to(getattr(torch, dtype)) for rows in (B, length))

        def products(queries: Tensor = queries, tile: Tensor = tile) -> None:
            scaled_scores_(logits, queries, tile, 10)
            weighted_rows(weights, tile)

        work = 4 * B * length * D
        found.append({"rate": "products", "dtype": dtype, "work": work, "seconds": seconds_of(products, 101)})

    def exponentials() -> None:
        exp_(logits)
        logits.sum(dim=1)

    seconds = seconds_of(exponentials, 101, before=lambda: logits.copy_(weights))
    found.append({"rate": "exponentials", "work": B * length, "seconds": seconds})
    x = torch.ones(elements)
    found.append({"rate": "reading", "work": x.nbytes, "seconds": seconds_of(x.sum, 15)})
    return found


def network_rates(elements: int) -> list[Row]:
    """An all-reduce of one number, and an all-to-all of this many numbers for each rank."""
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
    """Steps of one process, by the size of the bank."""
    for dtype, Ns in SIZES.items():
        for N in Ns:
            yield time_steps(N // shrink, B, dtype, 1, CORES)


def ranks(shrink: int) -> Iterator[Row]:
    """The same batch and bank on more and more ranks of one thread each."""
    for W in (1, 2, 4):
        yield time_steps(10**6 // shrink, B, "bfloat16", W, 1)


def overlap(shrink: int) -> Iterator[Row]:
    """A large batch, gathered in more and more pieces."""
    for N in (10**4, 10**5):
        for pieces in (1, 2, 4):
            yield time_steps(N // shrink, 4096, "bfloat16", 2, 1, 4096 // pieces)


def time_steps(N: int, batch: int, dtype: str, W: int, threads: int, piece: int = sharded.PIECE["cpu"]) -> Row:
    """A row of some steps, with a list over the ranks for each thing that is measured.

    Args:
        N: Images.
        batch: Queries of all ranks.
        dtype: Of the bank.
        W: Ranks.
        threads: Of each rank.
        piece: Queries of all ranks that are gathered at a time.
    """
    by_rank = on_ranks(W, threads, train, N, batch, dtype, piece)
    measured = {name: [found[name] for found in by_rank] for name in by_rank[0]}
    return {"N": N, "B": batch, "dtype": dtype, "ranks": W, "threads": threads, "piece": piece, **measured}


def train(N: int, batch: int, dtype: str, piece: int) -> Row:
    """On this rank: the seconds of each step, how many of them are in collectives, and the peak of added memory."""
    sharded.PIECE["cpu"] = piece
    rank, W = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    generator = torch.Generator().manual_seed(rank)
    in_collectives = time_collectives()

    def make(N: int) -> NTDNELoss:
        group = distributed.group.WORLD if W > 1 else None
        start = torch.Generator().manual_seed(0)
        labels = torch.arange(N) % C
        return NTDNELoss(labels, D, k=None, generator=start, dtype=getattr(torch, dtype), process_group=group)

    def step(criterion: NTDNELoss) -> tuple[float, float]:
        features = torch.randn(batch // W, D, generator=generator, requires_grad=True)
        index = torch.randint(len(criterion.memory), (batch // W,), generator=generator)
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
    """A list that grows from here on: seconds of each call of a collective, and of each wait for one."""
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


# What the dtype of the bank costs


def storage(shrink: int) -> Iterator[Row]:
    """Relative errors of the loss and its gradient: of rounded rows, and of rounded rows in that dtype's arithmetic."""
    generator = torch.Generator().manual_seed(0)
    N = 10**5 // shrink
    labels = torch.arange(N).mul(C).div(N, rounding_mode="floor")
    centres = nn.functional.normalize(torch.randn(C, D, generator=generator, dtype=torch.float64), dim=1)
    spread = 1.5 / math.sqrt(D)  # gives a cosine of 0.3 within a class
    rows = centres[labels] + spread * torch.randn(N, D, generator=generator, dtype=torch.float64)
    rows = nn.functional.normalize(rows, dim=1)
    index = torch.randint(N, (B,), generator=generator)
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
        compared = itertools.product({"rows": rounded, "rows and arithmetic": found[name]}.items(), references.items())
        for (what, (loss, gradient)), (against, (true_loss, true_gradient)) in compared:
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


def measure(parts: list[str], path: Path, shrink: int) -> None:
    """Measure these parts. Once a part is done, it replaces what the file has of it.

    Args:
        parts: Keys of `PARTS`.
        path: Of the file of results.
        shrink: Divides the sizes, to try that all works.
    """
    for part in parts:
        here, start = describe_cpu(), time.perf_counter()
        rows = list(PARTS[part](shrink))
        print(f"{part}: {len(rows)} rows in {time.perf_counter() - start:.0f} s", flush=True)
        run = json.loads(path.read_text()) if path.exists() else {}
        written = path.with_suffix(".new")
        written.write_text(json.dumps(run | {part: {"machine": here, "shrink": shrink, "rows": rows}}, indent=1) + "\n")
        written.replace(path)
