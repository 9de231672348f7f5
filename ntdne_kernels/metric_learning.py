"""The NTDNE loss as a loss of pytorch-metric-learning, for its trainers and CrossBatchMemory; needs that library.

    from pytorch_metric_learning.losses import CrossBatchMemory
    from ntdne_kernels.metric_learning import NTDNEMetricLoss

    loss = CrossBatchMemory(NTDNEMetricLoss(), embedding_size=128, memory_size=8192)
    loss(embeddings, labels)

In a training loop of one's own `NTDNELoss` does more: it compares a batch with the whole archive, knows which image is
which, prunes, and keeps a score of each.

Shapes: B embeddings, M references, D values, n rows.
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

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


class NTDNEMetricLoss(BaseMetricLossFunction):  # type: ignore[misc]  # the library has no types
    """NTDNE loss (eq. 9; eq. 13 with k) of embeddings among the references, or among each other where there are none.

    Called as all losses of pytorch-metric-learning: loss(embeddings, labels, indices_tuple, ref_emb, ref_labels).
    References that equal an embedding to the bit and have its label are copies of it: no neighbours of its own, and
    one neighbour of the others however many they are. So the embeddings that CrossBatchMemory has just stored do not
    vote on themselves.

    What a miner chose (indices_tuple) weighs the anchors, as in the library's NCALoss; all references are neighbours.
    Labels of −1 mean unlabelled. Synchronises a GPU, as the library's miners do.

    Example:
        >>> embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.2], [0.0, 1.0], [0.2, 1.0]])
        >>> loss = NTDNEMetricLoss(sigma=0.5)
        >>> loss(embeddings, torch.tensor([0, 0, 1, 1]))
        tensor(0.3145)

    Args:
        sigma: temperature σ > 0 (eq. 3).
        q: exponent in (0, 1].
        k: pruning threshold in (0, 1), or None to prune nothing.
        **options: reducer, embedding_regularizer and the like, of BaseMetricLossFunction. The distance is cosine
            similarity.

    Raises:
        TypeError: sigma, q or k is no number.
        ValueError: one of them is out of range, or the distance is another one.
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
        """Cosine similarity (eq. 2)."""
        return CosineSimilarity()

    def compute_loss(
        self, embeddings: Tensor, labels: Any, indices_tuple: Any, ref_emb: Tensor, ref_labels: Any
    ) -> dict[str, dict[str, Any]]:
        """The loss (B,) of each embedding, for the library's reducers.

        Raises:
            TypeError: labels are missing or no integers.
            ValueError: embeddings and references are no matrices of one width.
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
        indices = torch.arange(len(embeddings), device=embeddings.device)
        return {"loss": {"losses": losses * weights, "indices": indices, "reduction_type": "element"}}


def _unit(rows: Tensor) -> Tensor:
    return normalize(rows.to(accumulator_dtype(rows.dtype)), dim=1)


def _without_copies(embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> tuple[Tensor, Tensor]:
    """The first of each set of equal references, and the place of each embedding (B,) among them, −1 for none."""
    hashes, inverse = torch.unique(_hash_rows(ref_emb, ref_labels), return_inverse=True)
    references = torch.arange(len(inverse), device=inverse.device)
    first = torch.empty_like(hashes).scatter_reduce_(0, inverse, references, "amin", include_self=False)
    own = _hash_rows(embeddings.to(ref_emb.dtype), labels)
    place = torch.searchsorted(hashes, own).clamp(max=len(hashes) - 1)
    return first, torch.where(hashes[place] == own, place, NOT_IN_BANK)


def _hash_rows(rows: Tensor, labels: Tensor) -> Tensor:
    """(n,) int64: equal where row and label are equal to the bit; for two others equal once in 2^64."""
    bits = rows.detach().contiguous().view(INTEGERS[rows.element_size()]).to(torch.int64)
    generator = torch.Generator().manual_seed(0)
    low, high = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    factors = torch.randint(low, high, (rows.size(1) + 1,), generator=generator, device="cpu").to(rows.device)
    # Overflow wraps, so the order of the sum is no matter.
    return (bits * factors[1:]).sum(dim=1) + labels.to(torch.int64) * factors[0]


def _admit() -> None:
    """Let CrossBatchMemory take the loss: it has a list of the classes it takes, by name."""
    supported_losses = CrossBatchMemory.supported_losses
    CrossBatchMemory.supported_losses = staticmethod(lambda: [*supported_losses(), NTDNEMetricLoss.__name__])


_admit()
