"""The NTDNE loss as one of pytorch-metric-learning's, for their trainers and CrossBatchMemory; needs that library.

    from pytorch_metric_learning.losses import CrossBatchMemory
    from ntdne_kernels.metric_learning import NTDNEMetricLoss

    loss = CrossBatchMemory(NTDNEMetricLoss(), embedding_size=128, memory_size=8192)
    loss(embeddings, labels)

Who writes the training loop has more from `NTDNELoss`: it compares a batch with the whole archive, knows which image
is which, prunes, and keeps a score of each.

Shapes: B embeddings, M references, D values.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ntdne_kernels import functional
from ntdne_kernels.arguments import NOT_IN_BANK, accumulator_dtype, check_number
from ntdne_kernels.labels import as_labels

try:
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.losses import BaseMetricLossFunction, CrossBatchMemory
    from pytorch_metric_learning.utils.loss_and_miner_utils import convert_to_weights
except ImportError as error:
    raise ImportError("NTDNEMetricLoss needs pytorch-metric-learning: pip install pytorch-metric-learning") from error

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers as wide as a float


class NTDNEMetricLoss(BaseMetricLossFunction):  # type: ignore[misc]  # the library has no types
    """NTDNE loss (eq. 9; eq. 13 with k) of embeddings among the references, or among each other where there are none.

    Called as all of their losses are: loss(embeddings, labels, indices_tuple, ref_emb, ref_labels). A reference that is
    an embedding to the bit, with its label, is a copy of it: no neighbour of its own, and for the others one neighbour
    however often it is there. So the embeddings that CrossBatchMemory has just stored do not vote on themselves.

    What a miner chose (indices_tuple) weighs the anchors, as in their NCALoss; neighbours are all references. Labels of
    -1 are unlabelled. Synchronises, as their miners do.

    Args:
        sigma: temperature σ > 0 (eq. 3).
        q: exponent in (0, 1].
        k: pruning threshold in (0, 1), or None to prune nothing.
        **options: reducer, embedding_regularizer and the like, of their BaseMetricLossFunction. The distance is cosine
            similarity.

    Raises:
        TypeError, ValueError: a number or the distance is not as described.
    """

    def __init__(self, sigma: float = 0.1, q: float = 0.7, k: float | None = None, **options: Any) -> None:
        super().__init__(**options)
        check_number("sigma", sigma, 0, math.inf)
        check_number("q", q, 0, 1, upper_included=True)
        if k is not None:
            check_number("k", k, 0, 1)
        if type(self.distance) is not CosineSimilarity:
            raise ValueError(f"distance: expected CosineSimilarity, got {type(self.distance).__name__}")
        self.sigma, self.q, self.k = sigma, q, k
        self.add_to_recordable_attributes(list_of_names=["sigma", "q"], is_stat=False)

    def get_default_distance(self) -> CosineSimilarity:
        return CosineSimilarity()

    def compute_loss(
        self, embeddings: Tensor, labels: Any, indices_tuple: Any, ref_emb: Tensor, ref_labels: Any
    ) -> dict[str, dict[str, Any]]:
        """The loss of each embedding, for their reducers.

        Raises:
            TypeError, ValueError: labels are missing or no integers, or embeddings no matrices of one width.
        """
        labels, ref_labels = as_labels(labels), as_labels(ref_labels, "ref_labels")
        rows, index = _without_copies(embeddings, labels, ref_emb, ref_labels)
        with torch.autocast(embeddings.device.type, enabled=False):
            losses = functional.ntdne_loss(
                _unit(embeddings),
                _unit(ref_emb)[rows],
                labels,
                ref_labels[rows],
                index,
                sigma=self.sigma,
                q=self.q,
                k=self.k,
                reduction="none",
            )
        weights = convert_to_weights(indices_tuple, labels, losses.dtype, using_ref=embeddings is not ref_emb)
        places = torch.arange(len(embeddings), device=embeddings.device)
        return {"loss": {"losses": losses * weights, "indices": places, "reduction_type": "element"}}


def _unit(rows: Tensor) -> Tensor:
    return normalize(rows.to(accumulator_dtype(rows.dtype)), dim=1)


def _without_copies(embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> tuple[Tensor, Tensor]:
    """References that stand nowhere before, and the place of each embedding (B,) among them, −1 for none."""
    keys, inverse = torch.unique(_keys(ref_emb, ref_labels), return_inverse=True)
    places = torch.arange(len(inverse), device=inverse.device)
    first = torch.empty_like(keys).scatter_reduce_(0, inverse, places, "amin", include_self=False)
    own = _keys(embeddings.to(ref_emb.dtype), labels)
    found = torch.searchsorted(keys, own).clamp(max=len(keys) - 1)
    return first, torch.where(keys[found] == own, found, NOT_IN_BANK)


def _keys(rows: Tensor, labels: Tensor) -> Tensor:
    """(n,) int64: the same for the same row and label, to the bit; the same for others once in 2^64."""
    bits = rows.detach().contiguous().view(BITS[rows.element_size()]).to(torch.int64)
    draw = torch.Generator().manual_seed(0)
    low, high = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    weights = torch.randint(low, high, (rows.size(1) + 1,), generator=draw, device="cpu").to(rows.device)
    return (bits * weights[1:]).sum(dim=1) + labels * weights[0]  # wraps around, so that no order of sums matters


def _admit() -> None:
    """Let CrossBatchMemory take the loss: it takes those whose class's name is in a list."""
    theirs = CrossBatchMemory.supported_losses
    CrossBatchMemory.supported_losses = staticmethod(lambda: [*theirs(), NTDNEMetricLoss.__name__])


_admit()
