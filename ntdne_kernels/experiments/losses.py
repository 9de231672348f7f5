"""The losses that the paper compares NTDNE with, and how its authors' code prunes.

Each is a module with `forward(features, index)`, `update_bank(features, index)` and `set_epoch(epoch)`, as NTDNELoss
has them, and with parameters where the loss has a classifier or prototypes. Its keyword arguments are its options;
`loss_registry.make_loss` makes a loss by its name.

Shapes: B images of a batch, N images of the archive, D features, C classes.

In the formulas f_i are features, u_i = f_i/‖f_i‖, y_i given labels. z = W f + b are the C logits of a linear
classifier, CE is the cross-entropy of their softmax, and s_c the c-th softmax probability. Losses are means over the
batch unless they say otherwise.
"""

import math
from functools import partial
from typing import TypeAlias

import torch
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.reducers import MeanReducer
from torch import Tensor, nn
from torch.nn import functional as F

from ntdne_kernels import NTDNELoss, SNCALoss
from ntdne_kernels.arguments import check_number
from ntdne_kernels.labels import as_index, as_labels
from ntdne_kernels.ops.losses import ntdne
from ntdne_kernels.user_warning import warn_user
from ntdne_kernels.watch import NEARLY_ALL

INFINITY = float("inf")
REFRESH_EVERY = 10  # epochs, in the authors' code


class BatchLoss(nn.Module):
    """A loss of the batch alone, with the interface of the losses that have a bank: their hooks do nothing here.

    Args:
        labels: (N,) integer class of each archive image, from 0.
        dim: D, features per image.

    Raises:
        TypeError, ValueError: labels, dim or an option are not as described.
    """

    labels: Tensor

    def __init__(self, labels: Tensor, dim: int) -> None:
        super().__init__()
        labels = as_labels(labels).to(torch.int64)
        if len(labels) == 0 or int(labels.min()) < 0:
            found = f"{int(labels.min())} at image {int(labels.argmin())}" if len(labels) else "an empty tensor"
            raise ValueError(f"labels: expected a class from 0 for each image, got {found}")
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
            raise ValueError(f"dim: expected an integer of at least 1, got {dim!r}")
        self.dim = dim
        self.classes = int(labels.max()) + 1
        # Not in checkpoints: loading one must not replace the labels that the archive has now.
        self.register_buffer("labels", labels.detach().clone(), persistent=False)

    def forward(self, features: Tensor, index: Tensor) -> Tensor:
        """Loss of a batch.

        Args:
            features: (B, D) of any float dtype; float64 needs `criterion.double()`.
            index: (B,) archive image of each feature.

        Returns:
            The loss, float32, or float64 for float64 features; 0 for an empty batch.

        Raises:
            TypeError, ValueError, IndexError: an argument is not as described. The values of `index` are checked only
                on a CPU.
        """
        index = as_index(index)
        if features.shape != (len(index), self.dim):
            raise ValueError(
                f"features: expected shape {(len(index), self.dim)}, a row for each index, got {tuple(features.shape)}"
            )
        if index.device.type == "cpu":
            wrong = index[(index < 0) | (index >= len(self.labels))]
            if len(wrong):
                raise IndexError(f"index: expected images from 0 to {len(self.labels) - 1}, got {int(wrong[0])}")
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(torch.promote_types(features.dtype, torch.float32))
            return self.loss(features, self.labels[index]) if len(features) else features.sum()

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Loss of (B, D) features, B > 0, with labels (B,)."""
        raise NotImplementedError

    def update_bank(self, features: Tensor, index: Tensor) -> None:
        """Nothing: there is no bank."""

    def set_epoch(self, epoch: int) -> None:
        """Nothing: the loss is the same in every epoch."""


class DCNNLoss(BatchLoss):
    """D-CNN: CE + λ J2, J2 the mean over pairs of max(0, τ1 − y_ij (τ2 − ‖u_i − u_j‖²)), y_ij = 1 in a class, else −1.

    J2 gives the pairs within classes the same weight as the pairs across classes: it is ½ (mean of the former + mean of
    the latter) over all pairs of the batch, those of loss 0 included. The authors sample equal numbers of both, so that
    theirs is the mean over all pairs; in a batch the pairs within classes are few.

    Source: Cheng, Yang, Yao, Guo, Han, "When Deep Learning Meets Metric Learning", TGRS 2018. τ1 = 0.05, and the halved
    sum of two means, are in the authors' released Caffe layer; τ2 = 0.44 and λ = 0.05 in a PyTorch reimplementation.

    Options: tau1 ≥ 0; tau2 in [0, 4]; weight, λ ≥ 0.
    """

    def __init__(
        self, labels: Tensor, dim: int, *, tau1: float = 0.05, tau2: float = 0.44, weight: float = 0.05
    ) -> None:
        check_number("tau1", tau1, 0, INFINITY, lower_included=True)
        check_number("tau2", tau2, 0, 4, lower_included=True, upper_included=True)
        check_number("weight", weight, 0, INFINITY, lower_included=True)
        super().__init__(labels, dim)
        self.weight = weight
        self.classifier = nn.Linear(dim, self.classes)
        # Terms are τ1 − (τ2 − d²) within a class, τ1 + (τ2 − d²) across; the library adds the means of both.
        self.pairs = losses.ContrastiveLoss(
            pos_margin=tau2 - tau1, neg_margin=tau2 + tau1, distance=LpDistance(power=2), reducer=MeanReducer()
        )

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """CE + λ J2."""
        pairs: Tensor = self.pairs(features, labels) / 2
        return F.cross_entropy(self.classifier(features), labels) + self.weight * pairs


class TripletLoss(BatchLoss):
    """Triplet: ‖u_a − u_p‖² − ‖u_a − u_n‖² + margin, the mean over the semi-hard triplets of the batch.

    These are all triplets with y_p = y_a ≠ y_n and ‖u_a − u_p‖² < ‖u_a − u_n‖² ≤ ‖u_a − u_p‖² + margin. Without any the
    loss is 0. Its memory grows with B³.

    Source: Schroff, Kalenichenko, Philbin, "FaceNet", CVPR 2015, eq. 3 and 4; its margin is 0.2. The paper picks one
    negative at random for each pair; the mean over all candidates needs no draw.

    Options: margin > 0.
    """

    def __init__(self, labels: Tensor, dim: int, *, margin: float = 0.2) -> None:
        check_number("margin", margin, 0, INFINITY)
        super().__init__(labels, dim)
        distance = LpDistance(power=2)
        self.miner = miners.TripletMarginMiner(margin=margin, type_of_triplets="semihard", distance=distance)
        self.triplets = losses.TripletMarginLoss(margin=margin, distance=distance, reducer=MeanReducer())

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Mean over the semi-hard triplets."""
        loss: Tensor = self.triplets(features, labels, self.miner(features, labels))
        return loss + 0 * features.sum()  # keeps NaN in the loss: the miner leaves out features that are not finite


class NSLLoss(BatchLoss):
    """NSL, normalised softmax: −log p, p = exp(u·w_y/σ) / Σ_c exp(u·w_c/σ), with unit prototypes w_c.

    Source: Zhai, Wu, "Classification is a Strong Baseline for Deep Metric Learning", 2018. σ = 0.05 is the paper's;
    prototypes start as the authors' do, uniform within ±1/√D.

    Options: sigma, σ > 0.
    """

    def __init__(self, labels: Tensor, dim: int, *, sigma: float = 0.05) -> None:
        check_number("sigma", sigma, 0, INFINITY)
        super().__init__(labels, dim)
        self.softmax = losses.NormalizedSoftmaxLoss(
            self.classes, dim, temperature=sigma, weight_init_func=_prototypes(dim)
        )

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Mean of −log p."""
        loss: Tensor = self.softmax(features, labels)
        return loss


class ArcFaceLoss(BatchLoss):
    """ArcFace: cross-entropy of the logits s·cos θ_c, with s·cos(θ_y + m) for the given class; θ_c angle of u and w_c.

    Where θ_y > π − m, cos(θ_y + m) would rise again; there it is cos θ_y − m sin m, as in the authors' code.

    Source: Deng, Guo, Xue, Zafeiriou, "ArcFace", CVPR 2019, eq. 3, with its m = 0.5 (28.6 degrees) and s = 64.
    Prototypes start as in NSL.

    Options: margin, m in degrees, in [0, 180); scale, s > 0.
    """

    def __init__(self, labels: Tensor, dim: int, *, margin: float = 28.6, scale: float = 64.0) -> None:
        check_number("margin", margin, 0, 180, lower_included=True)
        check_number("scale", scale, 0, INFINITY)
        super().__init__(labels, dim)
        self.softmax = losses.ArcFaceLoss(
            self.classes, dim, margin=margin, scale=scale, weight_init_func=_prototypes(dim)
        )

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy with the margin on the given class."""
        loss: Tensor = self.softmax(features, labels)
        return loss


class MAELoss(BatchLoss):
    """MAE, mean absolute error: Σ_c |s_c − [c = y]| = 2 (1 − s_y).

    Source: Ghosh, Kumar, Sastry, "Robust Loss Functions under Label Noise for Deep Neural Networks", AAAI 2017. There
    are no hyperparameters.
    """

    def __init__(self, labels: Tensor, dim: int) -> None:
        super().__init__(labels, dim)
        self.classifier = nn.Linear(dim, self.classes)

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Mean of 2 (1 − s_y)."""
        return 2 * _misses(self.classifier(features), labels).mean()


class SCELoss(BatchLoss):
    """SCE, symmetric cross-entropy: α CE + β RCE, RCE = −Σ_c s_c log [c = y] = −A (1 − s_y) with log 0 := A < 0.

    Source: Wang, Ma, Chen, Luo, Yi, Bailey, "Symmetric Cross Entropy for Robust Learning with Noisy Labels", ICCV 2019.
    A = −4, and α = 0.1, β = 1 are its settings for CIFAR-10.

    Options: alpha ≥ 0; beta ≥ 0; log_zero, A < 0.
    """

    def __init__(
        self, labels: Tensor, dim: int, *, alpha: float = 0.1, beta: float = 1.0, log_zero: float = -4.0
    ) -> None:
        check_number("alpha", alpha, 0, INFINITY, lower_included=True)
        check_number("beta", beta, 0, INFINITY, lower_included=True)
        check_number("log_zero", log_zero, -INFINITY, 0)
        super().__init__(labels, dim)
        self.alpha = alpha
        self.beta = beta
        self.log_zero = log_zero
        self.classifier = nn.Linear(dim, self.classes)

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """α CE + β RCE."""
        logits = self.classifier(features)
        reverse = -self.log_zero * _misses(logits, labels).mean()
        return self.alpha * F.cross_entropy(logits, labels) + self.beta * reverse


class TRNSLLoss(NSLLoss):
    """t-RNSL, truncated robust normalised softmax: (1 − p^q)/q of NSL's p, and (1 − k^q)/q where p ≤ k.

    The truncation, per image, begins with epoch `warmup_epochs`. The current p decides; in the authors' code a stored
    one does, refreshed every 10 epochs.

    Source: Kang, Fernandez-Beltran, Duan, Kang, Plaza, "Robust Normalized Softmax Loss for Deep Metric Learning-Based
    Characterization of Remote Sensing Images With Label Noise", TGRS 2021. σ = 0.05, q = 0.7, k = 0.5 and truncation
    from epoch 40, of 130, are the defaults of the authors' code.

    Options: sigma, σ > 0; q in (0, 1]; k in (0, 1); warmup_epochs ≥ 0.
    """

    counts: Tensor

    def __init__(
        self,
        labels: Tensor,
        dim: int,
        *,
        sigma: float = 0.05,
        q: float = 0.7,
        k: float = 0.5,
        warmup_epochs: int = 40,
    ) -> None:
        check_number("q", q, 0, 1, upper_included=True)
        check_number("k", k, 0, 1)
        check_number("warmup_epochs", warmup_epochs, 0, INFINITY, lower_included=True)
        super().__init__(labels, dim, sigma=sigma)
        self.q = q
        self.k = k
        self.warmup_epochs = warmup_epochs
        self.epoch = 0
        # Images seen in this epoch, and those of them with p ≤ k.
        self.register_buffer("counts", torch.zeros(2, device=labels.device), persistent=False)
        self._warned_of_truncation = False

    @property
    def truncating(self) -> bool:
        """Whether the warm-up is over."""
        return self.epoch >= self.warmup_epochs

    @property
    def truncated_share(self) -> float:
        """Share of the images seen in this epoch whose loss is truncated. Synchronises with the device."""
        seen, low = self.counts.tolist()
        return low / seen if self.truncating and seen else 0.0

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Mean of (1 − p^q)/q, truncated from epoch `warmup_epochs` on; counts the images with p ≤ k."""
        log_p = -F.cross_entropy(self.softmax.get_logits(features), labels, reduction="none")
        self.counts += torch.stack([torch.ones_like(log_p), (log_p <= math.log(self.k)).to(log_p)]).detach().sum(dim=1)
        return ntdne(log_p, self.q, self.k if self.truncating else None).mean()

    def set_epoch(self, epoch: int) -> None:
        """Tell the loss which epoch begins, from 0; from epoch `warmup_epochs` on it truncates.

        Warns, once, where the epoch before truncated nearly all images.
        """
        share = self.truncated_share
        if share > NEARLY_ALL and not self._warned_of_truncation:
            self._warned_of_truncation = True
            warn_user(
                f"{100 * share:.0f} % of the images had p of at most k = {self.k} in epoch {self.epoch} and did not "
                "train the encoder; try a lower k or more warmup_epochs"
            )
        self.counts.zero_()
        self.epoch = epoch

    def get_extra_state(self) -> dict[str, int]:
        """The epoch, for checkpoints."""
        return {"epoch": self.epoch}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """The epoch of a checkpoint."""
        self.epoch = state["epoch"]


class ContrastiveLoss(BatchLoss):
    """Contrastive (Siamese): d² for a pair of one class, max(0, margin − d)² across classes; the mean over all pairs.

    d = ‖f_i − f_j‖ of the features as they are, not normalised.

    Source: Hadsell, Chopra, LeCun, "Dimensionality Reduction by Learning an Invariant Mapping", CVPR 2006, eq. 4,
    without its factor ½. The paper leaves the margin open; 1 is ours, a choice of unit.

    Options: margin > 0.
    """

    def __init__(self, labels: Tensor, dim: int, *, margin: float = 1.0) -> None:
        check_number("margin", margin, 0, INFINITY)
        super().__init__(labels, dim)
        self.margin = margin

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Mean over the pairs."""
        d = torch.pdist(features)
        i, j = torch.triu_indices(len(labels), len(labels), offset=1, device=labels.device)
        pairs = torch.where(labels[i] == labels[j], d, F.relu(self.margin - d)) ** 2
        return pairs.sum() / max(len(pairs), 1)


class NTDNEBroadcastLoss(NTDNELoss):
    """A diagnostic, not for use: NTDNE with the pruning of the authors' published code, which differs from the paper.

    The code multiplies L (B,) with an indicator w (B, 1). The product is (B, B), so its mean over i and j of w_j L_i is
    mean(L) · mean(w): every image keeps a gradient, scaled by the share of the batch that is kept.

    w = [p > k] is stored for each image and refreshed every 10 epochs: before epoch e, from 0, where e + 1 ≥
    `warmup_epochs` and 10 divides e + 1. The code scores the whole archive again for that; here it is each image's last
    score. Until then w is 1.

    Source: the authors' code for Kang et al., "Noise-Tolerant Deep Neighborhood Embedding for Remotely Sensed Images
    With Label Noise", JSTARS 2021. It subtracts mean(w) (1 − k^q)/q, which has no gradient and is left out here. The
    defaults are the paper's, so that it differs in the pruning alone.

    Options: as of NTDNELoss, without indicator and unit_slope; k is a number in (0, 1).
    """

    w: Tensor
    refreshed: Tensor

    def __init__(
        self,
        labels: Tensor,
        dim: int,
        *,
        sigma: float = 0.1,
        q: float = 0.7,
        k: float = 0.3,
        warmup_epochs: int = 20,
        momentum: float = 0.5,
    ) -> None:
        check_number("k", k, 0, 1)
        super().__init__(
            labels, dim, sigma=sigma, q=q, k=None, warmup_epochs=warmup_epochs, unit_slope=False, momentum=momentum
        )
        self.stored_k = k  # of w; NTDNELoss's own k stays None
        # The extra last slot is that of index −1: features outside the archive.
        self.register_buffer("w", torch.ones(len(labels) + 1, device=labels.device))
        # The epoch of the last refresh, so that loading a checkpoint, which sets its epoch, does not refresh again.
        self.register_buffer("refreshed", torch.tensor(-1, device=labels.device))

    def forward(
        self,
        features: Tensor,
        index: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        return_scores: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As NTDNELoss.forward; features outside the archive count as kept."""
        loss, scores = super().forward(features, index, labels=labels, return_scores=True)
        if index is not None:
            loss = loss * self.w[index.long()].sum() / max(len(index), 1)
        return (loss, scores) if return_scores else loss

    @property
    def pruned(self) -> Tensor:
        """(N,) bool: images whose w is 0."""
        return self.w[:-1] == 0

    def set_epoch(self, epoch: int) -> None:
        """Tell the loss which epoch begins, from 0; refreshes w where it is due."""
        due = epoch + 1 >= self.warmup_epochs and (epoch + 1) % REFRESH_EVERY == 0
        if due and int(self.refreshed) != epoch:
            self.w[:-1] = ~(self.memory.last_log_p <= math.log(self.stored_k))  # NaN, never scored, is kept
            self.refreshed.fill_(epoch)
        super().set_epoch(epoch)

    def _note_pruned_share(self) -> None:
        """Nothing: here every image keeps training the encoder."""


def _prototypes(dim: int) -> partial[Tensor]:
    """Initial prototypes, uniform within ±1/√D: their norms are about 0.6.

    A step turns a prototype w by an angle that falls as 1/‖w‖². The library's own start has norms of about √D, so its
    prototypes would turn 3D times slower.
    """
    return partial(nn.init.uniform_, a=-(dim**-0.5), b=dim**-0.5)


def _misses(logits: Tensor, labels: Tensor) -> Tensor:
    """1 − s_y (B,) of logits (B, C)."""
    return 1 - logits.softmax(dim=1).gather(1, labels[:, None]).squeeze(1)


Criterion: TypeAlias = BatchLoss | NTDNELoss | SNCALoss
