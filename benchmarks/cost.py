"""What a training step of the sharded loss costs: the bytes it sends, a model of its time, and the memory of a rank.

A step is forward, backward, which sends nothing, and update_bank. Rank r has b_r queries, B = Σ b_r, and m = max b_r,
to which the others pad. A value has e bytes in the bank and w in the arithmetic around it: 8 for a float64 bank, else
4. Forward gathers the features in P = ⌈m/max(⌊PIECE/W⌋, ⌈m/MOST_PIECES⌉)⌉ pieces.

    forward                          payload     sent by rank r
    counts        all-gather         40          (W − 1)·40
    images        all-gather         16·m        (W − 1)·16·m
    look-up       all-reduce         16·B        2·(W − 1)/W·16·B
    features      all-gather, P ×    e·D·m       (W − 1)·e·D·m
    log sums      all-reduce, 2 ×    32·B        2·(W − 1)/W·32·B
    directions    all-to-all         w·D·B       w·D·(B − b_r)

    update_bank
    counts, images, look-up          as in forward
    features      all-gather         w·D·m       (W − 1)·w·D·m

The payload is what a rank hands to the collectives, in bytes; sent is what leaves it where all-gather and all-reduce go
round a ring. Of even batches each rank sends (W − 1)·(80 + b·(160 + (e + 2w)·D)) in all: N is not in it.

Shapes: W ranks, b queries of each, B of all, N images, n of the rank with most, D features, C classes.
"""

from typing import NamedTuple

from ntdne_kernels.ops.sharded import MOST_PIECES, PIECE


class Message(NamedTuple):
    """What a rank sends for one purpose, over all calls of the collective."""

    phase: str
    name: str
    collective: str
    calls: int
    payload: int
    sent: float


class Machine(NamedTuple):
    """What one rank can do."""

    flops: float
    """FLOP/s of matrix products in the bank's dtype."""
    bandwidth: float
    """Bytes/s read from where the bank is."""
    exponentials: float
    """Per second, with all that is done to a logit between the two products."""
    network: float
    """Bytes/s sent, while as many are received."""
    latency: float
    """Seconds of a collective that carries next to nothing."""
    at_once: bool
    """Products and exponentials run in units of their own, as on a GPU; a core does one after the other."""


class Step(NamedTuple):
    """Seconds."""

    compute: float
    communication: float
    """All of it; `hidden` runs beside the computation."""
    hidden: float

    @property
    def total(self) -> float:
        return self.compute + self.communication - self.hidden


def pieces(sizes: list[int], piece: int = PIECE["cuda"]) -> int:
    """P, given b_r of each rank."""
    step = max(piece // len(sizes), -(-max(sizes) // MOST_PIECES), 1)
    return max(-(-max(sizes) // step), 1)


def messages(sizes: list[int], rank: int, D: int, bank_bytes: int, piece: int = PIECE["cuda"]) -> list[Message]:
    """The table above for rank r, given b_r of each and e = `bank_bytes`."""
    W, B, m = len(sizes), sum(sizes), max(sizes)
    wide_bytes = 8 if bank_bytes == 8 else 4
    to_others = B - sizes[rank]

    def gather(phase: str, name: str, payload: int, calls: int = 1) -> Message:
        return Message(phase, name, "all-gather", calls, payload, (W - 1) * payload)

    def reduce(phase: str, name: str, payload: int, calls: int = 1) -> Message:
        return Message(phase, name, "all-reduce", calls, payload, 2 * (W - 1) / W * payload)

    return [
        gather("forward", "counts", 40),
        gather("forward", "images", 16 * m),
        reduce("forward", "look-up", 16 * B),
        gather("forward", "features", bank_bytes * D * m, pieces(sizes, piece)),
        reduce("forward", "log sums", 32 * B, 2),
        Message("forward", "directions", "all-to-all", 1, wide_bytes * D * B, wide_bytes * D * to_others),
        gather("update_bank", "counts", 40),
        gather("update_bank", "images", 16 * m),
        reduce("update_bank", "look-up", 16 * B),
        gather("update_bank", "features", wide_bytes * D * m),
    ]


def step(machine: Machine, b: int, N: int, D: int, W: int, bank_bytes: int, piece: int = PIECE["cuda"]) -> Step:
    """Of W ranks with b queries each, or of one process. Not in it: launches, and work that does not grow with N."""
    n, B = -(-N // W), W * b
    P = pieces([b] * W, piece) if W > 1 else 1
    products = 4 * B * n * D / machine.flops
    exponentials = B * n / machine.exponentials
    reading = P * n * D * bank_bytes / machine.bandwidth
    arithmetic = max(products, exponentials) if machine.at_once else products + exponentials
    compute = max(arithmetic, reading)
    if W == 1:
        return Step(compute, 0, 0)
    seconds = {
        (message.phase, message.name): message.calls * machine.latency + message.sent / machine.network
        for message in messages([b] * W, 0, D, bank_bytes, piece)
    }
    # The first piece is waited for; each other one travels while the one before it is summed.
    hidden = (P - 1) / P * min(seconds["forward", "features"], compute)
    return Step(compute, sum(seconds.values()), hidden)


def memory(b: int, N: int, D: int, W: int, C: int, bank_bytes: int) -> dict[str, int]:
    """Bytes of the rank with most rows, by what they are for; encoder and partial sums of the kernels not counted."""
    n, B = -(-N // W), W * b
    return {
        "rows": n * D * bank_bytes,
        "labels, order, position": 3 * 8 * n,
        "scores": 4 * n,
        "classes, offsets": 8 * (2 * C + 1),
        "batch": B * D * (bank_bytes + 4 * 4),  # queries of all ranks; two means, directions sent and received
    }
