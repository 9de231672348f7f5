"""Sums over a bank that lives elsewhere than its queries: in host memory or in a mapped file, with queries on a GPU.

The bank comes to the queries' device in chunks, two of which are there at a time: one is copied while the other one is
summed. What the device holds does not grow with the bank, and a step takes as long as reading the bank once through
the bus: N·D·(bytes per element) / bandwidth.

Shapes: B queries, N bank rows, n rows of a chunk, D features, C classes.
"""

from collections.abc import Iterable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ntdne_kernels.arguments import NOT_IN_BANK, accumulator_dtype
from ntdne_kernels.ops.backends import BACKENDS
from ntdne_kernels.ops.capture import check_not_capturing
from ntdne_kernels.ops.class_sums import ClassSums, add_part, log_scores_of
from ntdne_kernels.ops.layout import part_of
from ntdne_kernels.ops.leave_one_out import Backend, GradientInForward
from ntdne_kernels.ops.schema import Batch, implement

# A chunk must take longer to copy than its sums take to launch, or the bus waits for the host. Reckoned, not measured:
# 64 MiB take 1.2 ms at the 55 GB/s of PCIe 5, fifty launches 0.3 ms.
CHUNK_BYTES = 64 << 20


def class_sums(batch: Batch, need_means: bool, backend: str) -> ClassSums:
    """`Backend.class_sums` of the backend so called, for a bank that may be on another device than all the rest.

    Returns once a bank elsewhere has been read, so that it may then be written; the sums may still be in the making.

    Raises:
        ValueError: the rows of a bank elsewhere are neither in class order nor given with plain labels.
    """
    bank, device = batch.bank, batch.features.device
    if bank.device == device:
        return ClassSums(*BACKENDS[backend].class_sums(batch, need_means))
    chunks = chunks_of(bank, device, max(CHUNK_BYTES // (bank.size(1) * bank.element_size()), 1))
    return sum_chunks(batch, chunks, need_means, backend)


def sum_chunks(batch: Batch, chunks: Iterable[tuple[int, Tensor]], need_means: bool, backend: str) -> ClassSums:
    """The sums over a bank of which (first row, rows (n, D)) come one after the other, at least one."""
    sums: ClassSums | None = None
    for start, chunk in chunks:
        inside = (batch.own >= start) & (batch.own < start + len(chunk))
        here = batch._replace(
            bank=chunk,
            own=torch.where(inside, batch.own - start, NOT_IN_BANK),
            layout=part_of(batch.layout, start, len(chunk)),
        )
        sums = add_part(sums, ClassSums(*BACKENDS[backend].class_sums(here, need_means)))
    assert sums is not None
    return sums


def chunks_of(bank: Tensor, device: torch.device, length: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, rows (n, D) on the device), `length` of them at a time; one empty chunk of an empty bank.

    From host memory to a GPU the next chunk is copied while the one before is in use: until the next but one is asked
    for. Chunks of a bank on the device are views of it.
    """
    starts = range(0, max(len(bank), 1), length)
    if device.type != "cuda" or bank.device == device:
        for start in starts:
            yield start, bank[start : start + length].to(device)
        return
    check_not_capturing(device, "a bank in host memory is read by copies that the host waits for")
    main, side = torch.cuda.current_stream(device), _side_stream(device)
    shape = (min(length, len(bank)), bank.size(1))
    with torch.cuda.stream(side):  # memory of this stream: who gets it next writes after what is waited for below
        buffers = [torch.empty(shape, dtype=bank.dtype, device=device) for _ in range(2)]
    staging = None
    if not bank.is_pinned():  # the GPU reads pinned memory alone on its own
        staging = [torch.empty(shape, dtype=bank.dtype, device="cpu", pin_memory=True) for _ in range(2)]
    copied, used = ([torch.cuda.Event(), torch.cuda.Event()] for _ in range(2))
    for c, start in enumerate(starts):
        slot, rows = c % 2, bank[start : start + length]
        if staging is not None:
            copied[slot].synchronize()
            rows = staging[slot][: len(rows)].copy_(rows)
        with torch.cuda.stream(side):
            side.wait_event(used[slot])
            chunk = buffers[slot][: len(rows)].copy_(rows, non_blocking=True)
            copied[slot].record(side)
        main.wait_event(copied[slot])
        yield start, chunk
        used[slot].record(main)
    side.wait_stream(main)
    copied[slot].synchronize()  # the last copy: from here on the bank may be written


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that copies to the device; always the same one, because the memory of its buffers is its own."""
    return torch.cuda.Stream(device)


def _log_scores(batch: Batch, need_direction: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """`GradientInForward.log_scores` of a backend, for a bank that may be on another device than all the rest."""
    sums = class_sums(batch, need_direction, backend)
    return log_scores_of(sums, batch.sigma, accumulator_dtype(batch.bank.dtype))


def _no_bank_gradient(*_: Any) -> Tensor:
    # `functional` refuses a bank elsewhere that wants one, by its device, before anything is computed.
    raise NotImplementedError("bank: one that is not on the device of the features gets no gradient")


log_scores = implement("chunked_log_scores", _log_scores)
CHUNKED: dict[str, Backend] = {
    name: GradientInForward(
        partial(log_scores, backend=name),
        partial(class_sums, backend=name),
        backend.class_log_sums,
        _no_bank_gradient,
        missing=backend.missing,
    )
    for name, backend in BACKENDS.items()
}
"""The backends, by name, for a bank elsewhere."""
