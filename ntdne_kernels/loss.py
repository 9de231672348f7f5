"""NTDNELoss and SNCALoss: the modules a training loop uses. Each owns the memory bank of its archive.

Shapes: N images of the archive, D features.
"""

import math
import os
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import ProcessGroup

from ntdne_kernels.arguments import check_choice, check_number
from ntdne_kernels.neighbourhood_loss import NeighbourhoodLoss
from ntdne_kernels.ops.layout import ClassOrder
from ntdne_kernels.ops.look_up import log_chance
from ntdne_kernels.ops.losses import LossSpec, common_unit
from ntdne_kernels.user_warning import warn_user

INDICATORS = ("current", "stored")


class NTDNELoss(NeighbourhoodLoss):
    """Noise-tolerant deep neighbourhood embedding: (1 − p^q)/q of the leave-one-out score p, pruned where p ≤ k.

    The score p (eq. 4) is the share of an image's neighbours in feature space, over the whole archive, that carry its
    label. The loss (eq. 9) grows less steeply than −log p where p is small, and it is constant where p is at most k
    (eq. 13), so images whose neighbours disagree with their label no longer train the encoder.

    It is made for the learning rate, optimiser and schedule that suit cross-entropy, and needs no other choice. The
    paper's loss does: its gradient is SNCA's times p^q, and in a new bank p is near chance c, the share of the other
    images that carry the label; c^q is 0.09 for 30 even classes, and less where a class is small. So by default the
    loss of each image is divided by c^q (`unit_slope`), k is chance ("auto"), and pruning begins at once: it is a loss
    of p/c, how much commoner the label is among an image's neighbours than elsewhere. `NTDNELoss(labels, k=0.3,
    warmup_epochs=20, unit_slope=False)` is the paper's, eq. 9 to 14. On frozen features of AID, half of the labels
    wrong and cross-entropy's learning rate, the default reached a K-NN accuracy of 77.9 %, the paper's 70.6, and 77.9
    with thirty times the rate; docs/choosing.md has the tables.

    Call `set_epoch` before each epoch and `update_bank` after each step. An image that is unlabelled or alone in its
    class has p = 0: it adds the constant 1/q to the loss, counts in the mean, and has no gradient. Features of other
    images, for validation say, are scored by `criterion.eval()` and `criterion(features, labels=labels)`.

    Args:
        labels: (N,) integer class of each archive image, −1 for unlabelled, in a tensor, list, array, Series and the
            like, `IndexedDataset(dataset).labels` for instance. `encode_labels` numbers names.
        dim: D, features per image.
        sigma: temperature σ > 0 (eq. 3).
        q: exponent in (0, 1].
        k: pruning threshold in (0, 1); None prunes nothing. "auto" is chance: an image is pruned if its last score is
            at most the share of all other images that carry its label. That also works while an untrained encoder
            gives all images low scores. It misses wrong labels that agree with each other: where half of a class is
            called by one other name, these images score far above chance. The paper's value is 0.3.
        warmup_epochs: first epoch that prunes: T of the paper, where it is 20.
        unit_slope: divide the loss of each image by c^q, c at least 0.001: the size of its slope at chance. The
            gradient then begins at the size of SNCA's in every class, and still grows with p. With more than about 30
            classes all of it is divided by one number more, so that the mean of the divisors is at least 30^−q. They
            follow from labels and q: the same on all ranks, and made anew by `memory.relabel`.
        momentum: weight m in [0, 1] of the old bank row (eq. 15; 1 − λ).
        indicator: which score decides on pruning: "current", that of this forward (eq. 14), or "stored", the image's
            last one before it (images never scored are kept; `refresh_indicator` scores all), as always with k="auto".
        reduction: "mean", "sum" or "none".
        fused: stream the bank (the fastest backend for the device) instead of b×N PyTorch; the numbers are the same.
        validate: look for bad values on a GPU too, which synchronises; not in compiled code.
        generator: source of the bank's random start.
        device, dtype: of the bank. The dtype decides the arithmetic, whatever autocast says.
        process_group: ranks that share the bank, each holding a part of its rows (a torch.distributed group, or a
            DeviceMesh of one dimension). Every call is then made by all of them; the batch is that of all ranks, and
            loss and gradients are those of one process on it, once DistributedDataParallel has averaged the latter
            ("none" gives the losses of the rank's own features, and nothing is scaled).
        storage, path: "device", "host" or "disk": where the rows live; see `MemoryBank`.

    Attributes:
        sigma, q, k, momentum: may be changed between steps, by a schedule for instance. A compiled criterion is
            compiled again for each new value, at most torch._dynamo.config.recompile_limit times; a CUDA graph is to
            be captured again, after `memory.relabel` too.
        memory: the `MemoryBank`.
        pruning: whether this epoch prunes.
        pruned: (N,) the images that it prunes, by their last scores; none while it does not prune. On ranks, of
            `memory.images` alone.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument is not as described.
        OSError: the file of the bank cannot be made or is in use.

    Example:
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> criterion = NTDNELoss(labels, dim=2, sigma=0.5)
        >>> features = torch.tensor([[2.0, 0.1], [1.0, 0.0], [0.1, 1.0], [0.8, 0.6]], requires_grad=True)
        >>> index = torch.arange(4)
        >>> _ = criterion.memory.update_(features, index, momentum=0.0)  # fill_bank does this with an encoder
        >>> loss, scores = criterion(features, index, return_scores=True)
        >>> loss.backward()
        >>> criterion.update_bank(features, index)
        >>> print(f"loss {loss:.2f}, scores {[round(score, 2) for score in scores.tolist()]}")
        loss 1.23, scores [0.53, 0.54, 0.6, 0.28]
        >>> criterion.pruned  # the last image looks like the others of class 0
        tensor([False, False, False,  True])
    """

    def __init__(  # noqa: PLR0913  options of a public constructor, by keyword
        self,
        labels: Any,
        dim: int = 128,
        *,
        sigma: float = 0.1,
        q: float = 0.7,
        k: float | str | None = "auto",
        warmup_epochs: int = 0,
        unit_slope: bool = True,
        momentum: float = 0.5,
        indicator: str = "current",
        reduction: str = "mean",
        fused: bool = True,
        validate: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        process_group: ProcessGroup | DeviceMesh | None = None,
        storage: str = "device",
        path: str | os.PathLike[str] | None = None,
    ) -> None:
        check_number("q", q, 0, 1, upper_included=True)
        _check_k(k)
        check_number("warmup_epochs", warmup_epochs, 0, math.inf, lower_included=True)
        check_choice("indicator", indicator, INDICATORS)
        if not isinstance(unit_slope, bool):
            raise TypeError(f"unit_slope: expected True or False, got {unit_slope!r}")
        super().__init__(
            labels,
            dim,
            sigma=sigma,
            momentum=momentum,
            reduction=reduction,
            fused=fused,
            validate=validate,
            generator=generator,
            device=device,
            dtype=dtype,
            process_group=process_group,
            storage=storage,
            path=path,
        )
        self.q = q
        self.k = k
        self.warmup_epochs = warmup_epochs
        self.unit_slope = unit_slope
        self.indicator = indicator
        # Read by forward in place of the epoch, which would make a compiled forward compile anew every epoch.
        self.pruning = warmup_epochs == 0
        self._known_unit: tuple[tuple[float, tuple[tuple[int, int], ...]], float] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Tell the loss which epoch begins, counted from 0; from epoch `warmup_epochs` on it prunes.

        Warns once if nearly every image would be pruned by its last score, and once if more than half would and more
        than an epoch before, which it synchronises to see.

        Raises:
            TypeError: epoch is not an integer.
            ValueError: epoch is negative.
        """
        super().set_epoch(epoch)
        self.pruning = epoch >= self.warmup_epochs
        if self.pruning:
            self._note_pruned_share()

    @property
    def pruned(self) -> Tensor:
        """(N,) bool: images that no longer train the encoder, because their last score is at most the threshold.

        Images that were never scored are not among them; none are in the warm-up or for k=None.
        """
        if not self.pruning:
            return torch.zeros_like(self.memory.last_log_p, dtype=torch.bool)
        return self.memory.last_log_p <= self._log_threshold(self.memory.labels)

    def extra_repr(self) -> str:
        """The settings, for `repr`."""
        return (
            f"sigma={self.sigma}, q={self.q}, k={self.k}, warmup_epochs={self.warmup_epochs}, "
            f"unit_slope={self.unit_slope}, momentum={self.momentum}, indicator={self.indicator!r}, fused={self.fused}"
        )

    def _loss_spec(self) -> LossSpec:
        check_number("q", self.q, 0, 1, upper_included=True)
        _check_k(self.k)
        check_choice("indicator", self.indicator, INDICATORS)
        # For "auto", k sets the constant of eq. 13 and prunes features of no archive image: chance for C equal classes.
        auto = isinstance(self.k, str)
        k = 1 / max(2, len(self.memory.classes)) if isinstance(self.k, str) else self.k
        unit = self._common_unit() if self.unit_slope else None
        if not self.pruning or k is None:
            return LossSpec(self.q, None, self.reduction, unit=unit)
        return LossSpec(self.q, k, self.reduction, "auto" if auto else self.indicator, unit)

    def _common_unit(self) -> float:
        """Of the labels and q as they are now; made anew where either was changed."""
        made_of = self.q, self.memory.class_sizes
        if self._known_unit is not None and self._known_unit[0] == made_of:
            return self._known_unit[1]
        unit = common_unit(self.memory.class_sizes, len(self.memory), self.q)
        if not torch.compiler.is_compiling():  # which would compile twice for each new q: it sees what is written
            self._known_unit = made_of, unit
        return unit

    def _log_threshold(self, labels: Tensor) -> Tensor | float:
        """log k of images with these labels (B,); k="auto" is the share of the other images that carry the label."""
        memory = self.memory
        if self.k is None or len(memory.classes) == 0:
            return math.nan  # no score is at most NaN
        if not isinstance(self.k, str):
            return math.log(self.k)
        return log_chance(labels, ClassOrder(memory.classes, memory.offsets), len(memory))

    def _note_pruned_share(self) -> None:
        self._watch.pruned(self.epoch, self.pruned, self.memory.last_log_p, self.k)

    def _note_first_pass(self) -> None:
        super()._note_first_pass()
        if self.pruning and self.memory.scores.device.type == "cpu":
            self._note_pruned_share()
        if not self._epoch_was_set and self.k is not None and self.warmup_epochs > 0:
            warn_user(
                f"the whole archive was seen and set_epoch was never called, so pruning never starts (warmup_epochs="
                f"{self.warmup_epochs}); call criterion.set_epoch(epoch) before each epoch"
            )


class SNCALoss(NeighbourhoodLoss):
    """Scalable neighbourhood component analysis: −log p of the leave-one-out score p (eq. 5), for comparison.

    Images without a neighbour of their class are ignored: "mean" divides by the number of the others. Arguments,
    attributes, methods and errors as `NTDNELoss`.

    Example:
        >>> criterion = SNCALoss(torch.tensor([0, 0, 1, 1]), dim=2, sigma=0.5)
        >>> features = torch.tensor([[2.0, 0.1], [1.0, 0.0], [0.1, 1.0], [0.8, 0.6]], requires_grad=True)
        >>> _ = criterion.memory.update_(features, torch.arange(4), momentum=0.0)
        >>> print(f"{criterion(features, torch.arange(4)):.2f}")
        0.76
    """

    def __init__(  # noqa: PLR0913  options of a public constructor, by keyword
        self,
        labels: Any,
        dim: int = 128,
        *,
        sigma: float = 0.1,
        momentum: float = 0.5,
        reduction: str = "mean",
        fused: bool = True,
        validate: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        process_group: ProcessGroup | DeviceMesh | None = None,
        storage: str = "device",
        path: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(
            labels,
            dim,
            sigma=sigma,
            momentum=momentum,
            reduction=reduction,
            fused=fused,
            validate=validate,
            generator=generator,
            device=device,
            dtype=dtype,
            process_group=process_group,
            storage=storage,
            path=path,
        )

    def extra_repr(self) -> str:
        """The settings, for `repr`."""
        return f"sigma={self.sigma}, momentum={self.momentum}, fused={self.fused}"

    def _loss_spec(self) -> LossSpec:
        return LossSpec(None, None, self.reduction)


def _check_k(k: float | str | None) -> None:
    if isinstance(k, str) and k != "auto":
        raise ValueError(f"k: expected a number in (0, 1), 'auto' or None, got {k!r}")
    if k is not None and not isinstance(k, str):
        check_number("k", k, 0, 1)
