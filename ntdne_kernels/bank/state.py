"""A bank's entries in a state dict, and whether those of a checkpoint fit it.

    storage (N, D)   rows in class order
    labels  (N,)     of each image
    order   (N,)     image of each row
    scores  (N,)     last log p of each image

Of a sharded bank each is a DTensor, which torch.distributed.checkpoint loads on any number of ranks.

Shapes: N images, D values.
"""

from typing import Any

import torch
from torch import Tensor

from ntdne_kernels.bank.shard import Shard
from ntdne_kernels.bank.unit_rows import first_not_unit


def entries_of(shard: Shard) -> dict[str, Tensor]:
    """The tensors of this process (n, ...) that a checkpoint needs, by the names of their entries."""
    return {
        "storage": shard.storage,
        "labels": shard.labels,
        "order": shard.image_order.order,
        "scores": shard.scores[:-1],
    }


def disagreement(shard: Shard, state_dict: dict[str, Any], prefix: str) -> str | None:
    """Why a checkpoint's entries under `prefix` do not fit this bank, on any process; or None. All call it together."""
    problem = own_disagreement(shard, state_dict, prefix)
    there = shard.processes.gather_objects(f"{prefix}storage" in state_dict)
    holding = [rank for rank, holds in enumerate(there) if holds]
    if 0 < len(holding) < shard.processes.size:
        problem = (
            f"the checkpoint's entries of the bank are on rank {holding[0]} and not on all ranks; broadcast_from_rank0 "
            "of PyTorch passes on parameters and buffers alone, so load the whole checkpoint on every rank"
        )
    storage = state_dict.get(f"{prefix}storage")
    found = None if problem or storage is None else first_not_unit(shard.processes.from_state(storage))
    if found is not None:
        problem = f"row {found[0]} of the checkpoint has length {found[1]:.4g} instead of 1, as after averaging"
    return shard.processes.first_problem(problem)


def own_disagreement(shard: Shard, state_dict: dict[str, Any], prefix: str) -> str | None:
    """As `disagreement`, of this process alone and without a look at the rows."""
    names = tuple(entries_of(shard))
    missing = [prefix + name for name in names if prefix + name not in state_dict]
    if len(missing) == len(names):
        return None  # nothing of a bank: missing keys, which strict=False allows
    if missing:
        return f"the checkpoint lacks {', '.join(missing)}"
    whole = {name: state_dict[prefix + name] for name in names}
    try:
        labels, order = (shard.processes.from_state(whole[name]).to(shard.device) for name in ("labels", "order"))
    except ValueError as error:
        return str(error)
    return _wrong_shapes(shard, whole) or _wrong_labels(shard, labels) or _wrong_order(shard, order)


def _wrong_shapes(shard: Shard, entries: dict[str, Tensor]) -> str | None:
    N, D = shard.size, shard.storage.size(1)
    found = entries["storage"].shape
    if found != (N, D):
        return f"expected {N} images of {D} values, the checkpoint holds shape {tuple(found)}"
    if any(entries[name].shape != (N,) for name in ("labels", "order", "scores")):
        return f"the checkpoint's labels, order and scores do not belong to its {N} rows"
    return None


def _wrong_labels(shard: Shard, labels: Tensor) -> str | None:
    known = shard.image_order.labels_at(shard.image_order.position)  # those of construction, whatever was written since
    if len(labels) != len(known):
        return f"expected the {len(known)} images of this rank, the checkpoint holds {len(labels)}"
    differs: Tensor = labels != known
    if not bool(differs.any()):
        return None
    image = int(differs.nonzero()[0])
    return (
        f"labels differ at {int(differs.sum())} of {len(labels)} images, first at image "
        f"{shard.images[image]}: {labels[image].item()} in the checkpoint, {int(known[image])} here. If the "
        "archive is the same, and no average over the checkpoint changed them, give the bank the checkpoint's "
        "labels first: memory.relabel(labels)"
    )


def _wrong_order(shard: Shard, order: Tensor) -> str | None:
    # All of an order can be told from the positions alone, also where the bank's own order was written to.
    fits = shard.image_order.is_inverse_of(order) if shard.is_whole else torch.equal(order, shard.image_order.order)
    return None if fits else "the checkpoint's row order is not the class order of its labels"
