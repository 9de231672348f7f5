"""The last score of each image, which decides on pruning and which the audit reads.

Shapes: B queries, N images.
"""

import torch
from torch import Tensor

from ntdne_kernels.arguments import UNLABELLED
from ntdne_kernels.ops.schema import implement


def record_scores_in_pytorch(scores: Tensor, log_p: Tensor, index: Tensor, image_labels: Tensor) -> None:
    """scores (N + 1,) of the images `index` (B,) become log p (B,); of an image given twice the higher one.

    Unlabelled images have no score; a log p of NaN, that of a feature without a direction, changes none. Indices that
    are no image are passed over: the last place of `scores` is theirs.
    """
    N = len(image_labels)
    if N == 0:
        return
    inside = (index >= 0) & (index < N) & ~log_p.isnan()
    labelled = image_labels[index.clamp(0, N - 1)] != UNLABELLED
    place = torch.where(inside & labelled, index, N)
    scores.scatter_reduce_(0, place, log_p.to(scores.dtype), "amax", include_self=False)


implement("record_scores_", record_scores_in_pytorch)
