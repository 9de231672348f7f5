"""A batch of images against a bank: its loss, its rows, its update.

`LocalBatch` is that of one process, `ShardedBatch` that of all ranks together. They have the same methods, so what uses
them is written once for both. `find` makes the one that a bank needs.

The batch of all ranks is what one process would have seen: the queries of rank 0, then those of rank 1, and so on. Each
rank looks its images up where they are kept and learns the scores of the whole batch, so the loss is made of the same
(B,) numbers by the same code as in one process.

Shapes: W processes, b queries of this one, B of all, N images, D features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ntdne_kernels import functional
from ntdne_kernels.arguments import NOT_IN_BANK, UNLABELLED, accumulator_dtype
from ntdne_kernels.bank.shard import Shard
from ntdne_kernels.distributed import OneProcess, Ranks, Report
from ntdne_kernels.functional import write_rows
from ntdne_kernels.ops import sharded
from ntdne_kernels.ops.layout import ClassOrder
from ntdne_kernels.ops.look_up import indicator_of, log_chance, normalise
from ntdne_kernels.ops.losses import LossSpec
from ntdne_kernels.ops.schema import Batch


@dataclass
class LocalBatch:
    """A batch of one process. Its images are looked up by the op that needs it: on a GPU that is one launch for all."""

    shard: Shard
    images: Tensor
    """(B,) −1 for a query that is no image of the archive."""
    labels: Tensor | None
    """(B,) labels of the queries whose image is −1; None: there are none, or they are unlabelled."""

    def own(self, x: Tensor) -> Tensor:
        """Of a result (B,), that of this process's queries."""
        return x

    def stored_labels(self) -> Tensor:
        """(b,) the bank's labels of this process's images; of queries without one, any."""
        return self.shard.labels[self.images.clamp(min=0)]

    def rows(self) -> Tensor:
        """(b, D) copy of the rows of this process's images, all of which are in the bank."""
        return self.shard.stored_rows(self.shard.image_order.position[self.images])

    def blend_(self, features: Tensor, momentum: float) -> None:
        """Blend the features (b, D) of this process's queries into the bank's rows, eq. 15."""
        shard = self.shard
        if shard.storage.device == shard.device:
            _write(shard.storage, features, self.images, momentum, shard.image_order.position)
        else:
            _write(shard.storage, features, shard.positions(self.images), momentum)

    def loss(self, features: Tensor, spec: LossSpec, sigma: float, backend: str | None) -> tuple[Tensor, Tensor]:
        """The loss of this process's features (b, D), of any length, and log p (B,) of all queries, detached."""
        shard = self.shard
        batch = Batch(features, shard.storage, self.labels, self.images, shard.layout, float(sigma))
        return functional.loss_of_batch(batch, shard.archive, spec, backend)


@dataclass
class ShardedBatch:
    """A batch of all ranks, each of which has features and a gradient of its own."""

    shard: Shard
    ranks: Ranks
    reports: list[Report]
    """Of each rank: how many queries it has, and whether it wants their gradient."""
    images: Tensor
    """(B,) −1 for a query that is no image of the archive."""
    labels: Tensor
    """(B,) of all queries."""
    positions: Tensor
    """(B,) in the class order of the whole bank; −1 for none."""
    scores: Tensor
    """(B,) log p when last scored; NaN for never."""

    @property
    def sizes(self) -> list[int]:
        """How many queries each rank has."""
        return [report.size for report in self.reports]

    def own(self, x: Tensor) -> Tensor:
        """Of a result (B,), that of this rank's queries (b,)."""
        return x[sharded.own_slice(self.sizes, self.ranks.rank)]

    def stored_labels(self) -> Tensor:
        """(b,) the bank's labels of this rank's images; of queries without one, those given."""
        return self.own(self.labels)

    def rows(self) -> Tensor:
        """(b, D) copy of the rows of this rank's images; NaN for what is no image of the bank."""
        storage, wide = self.shard.storage, accumulator_dtype(self.shard.storage.dtype)
        rows = self.shard.local(self.positions)
        kept = rows >= 0
        found = torch.full((len(rows), storage.size(1)), -torch.inf, dtype=wide, device=rows.device)
        found[kept] = self.shard.stored_rows(rows[kept]).to(wide)
        found = self.own(self.ranks.maximum(found))  # one rank has each row
        return torch.where(self.own(self.positions).unsqueeze(1) >= 0, found, torch.nan).to(storage.dtype)

    def blend_(self, features: Tensor, momentum: float) -> None:
        """Blend the features (b, D) of all ranks' queries into the rows kept here, in the order of the whole batch."""
        storage = self.shard.storage
        wide = accumulator_dtype(storage.dtype)  # features may have another dtype on each rank
        features = self.ranks.gather(features.detach().to(wide), self.sizes)
        if len(storage):
            _write(storage, features, self.shard.local(self.positions), momentum)

    def loss(self, features: Tensor, spec: LossSpec, sigma: float, backend: str | None) -> tuple[Tensor, Tensor]:
        """The loss of this rank's features (b, D), of any length, and log p (B,) of all queries, detached.

        See `sharded.ShardedLoss` for what the loss of a rank and its gradient are.
        """
        shard = self.shard
        order = ClassOrder(shard.image_order.classes, shard.image_order.offsets)
        chance = log_chance(self.labels, order, shard.size) if spec.needs_chance else None
        with torch.autocast(features.device.type, enabled=False):
            unit = normalise(features, accumulator_dtype(shard.storage.dtype))[0]
        loss, log_p = sharded.ShardedLoss.apply(
            unit,
            Batch(unit, shard.storage, self.labels, shard.local(self.positions), shard.layout, float(sigma)),
            spec,
            indicator_of(spec.indicator, self.scores, self.images, chance),
            chance,
            functional.choose_backend(backend, shard.storage, shard.device),
            any(report.wants_gradient for report in self.reports),  # then all ranks take part in making it
            self.sizes,
            self.ranks.rank,
            self.ranks.name,
        )
        return loss, log_p


def find(shard: Shard, images: Tensor, labels: Tensor | None, reports: list[Report]) -> LocalBatch | ShardedBatch:
    """The batch of which this process has the images (b,), −1 for none, and labels (b,) for those."""
    if isinstance(shard.processes, OneProcess):
        return LocalBatch(shard, images, labels)
    ranks, sizes = shard.processes, [report.size for report in reports]
    own_labels = torch.full_like(images, UNLABELLED) if labels is None else labels
    images, given = ranks.gather(torch.stack([images, own_labels], dim=1), sizes).unbind(dim=1)
    # Positions and scores of the images kept here, −inf for others: the maximum over the ranks is that of the one rank
    # that keeps an image. float64 holds both exactly; an image never scored sends inf, because NaN has no maximum.
    found = torch.full((2, len(images)), -torch.inf, dtype=torch.float64, device=images.device)
    if shard.images:
        image = shard.local(images)
        kept = image.clamp(min=0)
        position, score = shard.image_order.position[kept].double(), shard.scores[kept].double()
        score = torch.where(score.isnan(), torch.inf, score)
        found = torch.where(image >= 0, torch.stack([position, score]), found)
    positions, scores = ranks.maximum(found)
    known = positions >= 0
    positions = torch.where(known, positions, NOT_IN_BANK).long()
    return ShardedBatch(
        shard,
        ranks,
        reports,
        images,
        torch.where(known, shard.image_order.labels_at(positions), given),
        positions,
        torch.where(known & (scores < torch.inf), scores, torch.nan).to(shard.scores.dtype),
    )


def score_rows(shard: Shard, start: int, stop: int, sigma: float, backend: str | None) -> tuple[Tensor, Tensor]:
    """log p of the rows from `start` to `stop` of every process, fewer where it has fewer, and the images they are of.

    Each row is scored against the bank without itself, and has no gradient. Returns (B,) log p and (B,) images.
    """
    n = len(shard.images)
    rows = torch.arange(min(start, n), min(stop, n), device=shard.device)
    features, images, positions = shard.stored_rows(rows), shard.image_order.order[rows], rows + shard.images.start
    if isinstance(shard.processes, OneProcess):
        labels = shard.image_order.labels_at(positions)
        log_p = functional.leave_one_out_log_scores(
            features, shard.storage, labels, shard.label_index, positions, sigma=sigma, backend=backend
        )
        return log_p, images
    ranks = shard.processes
    sizes = [max(min(stop, length) - start, 0) for length in ranks.lengths(shard.size)]
    images, positions = ranks.gather(torch.stack([images, positions], 1), sizes).unbind(1)
    log_p, _ = sharded.log_scores(
        Batch(
            features,
            shard.storage,
            shard.image_order.labels_at(positions),
            shard.local(positions),
            shard.layout,
            float(sigma),
        ),
        False,
        functional.choose_backend(backend, shard.storage, shard.device),
        sizes,
        ranks.name,
    )
    return log_p, images


def _write(storage: Tensor, features: Tensor, rows: Tensor, momentum: float, position: Tensor | None = None) -> None:
    device = storage.device
    write_rows(storage, features.detach().to(device), rows.to(device), momentum, position)
