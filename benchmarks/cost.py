"""The cost model of a training step of the sharded loss: bytes sent, seconds, and memory of a rank.

A step is forward, backward (which sends nothing) and update_bank. Rank r has b_r queries, B = Σ b_r, and all ranks pad
to m = max b_r. A value has e bytes in the bank and w in the arithmetic around it: w is 8 for a float64 bank, else 4.
Forward gathers the features in P = ⌈m/max(⌊PIECE/W⌋, ⌈m/MOST_PIECES⌉)⌉ pieces.

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

The payload is what a rank hands to the collectives, in bytes. Sent is what leaves the rank if all-gather and all-reduce
go round a ring. With even batches each rank sends (W − 1)·(80 + b·(160 + (e + 2w)·D)) bytes in all, whatever N is.

Shapes: W ranks, b queries of each, B of all, N images, n images of the rank with most, D features, C classes.
"""

from typing import NamedTuple

from ntdne_kernels.ops.sharded import MOST_PIECES, PIECE


class Message(NamedTuple):
    """What a rank sends for one purpose, in all calls of the collective together."""

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
    """Seconds of a collective with a payload of a few bytes."""
    at_once: bool
    """Products and exponentials run at the same time in different units, as on a GPU. A CPU core takes turns."""


class Step(NamedTuple):
    """Seconds of a step."""

    compute: float
    communication: float
    """Including what is hidden."""
    hidden: float
    """Communication beside which the rank computes."""

    @property
    def total(self) -> float:
        """Until the step is done."""
        return self.compute + self.communication - self.hidden


def pieces(sizes: list[int], piece: int = PIECE["cuda"]) -> int:
    """P, given b_r of each rank and how many queries of all ranks are gathered at a time."""
    step = max(piece // len(sizes), -(-max(sizes) // MOST_PIECES), 1)
    return max(-(-max(sizes) // step), 1)


def messages(sizes: list[int], rank: int, D: int, bank_bytes: int, piece: int = PIECE["cuda"]) -> list[Message]:
    """The table above for one rank.

    Args:
        sizes: b_r of each rank.
        rank: r
        D: Features.
        bank_bytes: e
        piece: Queries of all ranks that are gathered at a time.
    """
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
    """The seconds of a step of W ranks, or of one process, without launches and work that does not grow with N.

    Args:
        machine: What a rank can do.
        b: Queries of each rank.
        N: Images.
        D: Features.
        W: Ranks.
        bank_bytes: Of a value of the bank.
        piece: Queries of all ranks that are gathered at a time.
    """
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
    # A rank waits for the first piece. Each other piece travels while the one before it is summed.
    hidden = (P - 1) / P * min(seconds["forward", "features"], compute)
    return Step(compute, sum(seconds.values()), hidden)


def memory(b: int, N: int, D: int, W: int, C: int, bank_bytes: int) -> dict[str, int]:
    """Bytes on the rank with most rows, by purpose, without the encoder and the kernels' partial sums.

    Args:
        b: Queries of each rank.
        N: Images.
        D: Features.
        W: Ranks.
        C: Classes.
        bank_bytes: Of a value of the bank.
    """
    n, B = -(-N // W), W * b
    return {
        "rows": n * D * bank_bytes,
        "labels, order, position": 3 * 8 * n,
        "scores": 4 * n,
        "classes, offsets": 8 * (2 * C + 1),
        "batch": B * D * (bank_bytes + 4 * 4),  # queries of all ranks; two means, directions sent and received
    }
