"""NTDNELoss and SNCALoss: the modules a training loop uses. Each owns the memory bank of its archive.

Shapes: B images of a batch, N images of the archive, D features.
"""

import math
import operator
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import ProcessGroup

from ntdne_kernels import functional
from ntdne_kernels.arguments import (
    NOT_IN_BANK,
    UNLABELLED,
    accumulator_dtype,
    check_choice,
    check_classes,
    check_directions,
    check_number,
    check_range,
)
from ntdne_kernels.bank import MemoryBank
from ntdne_kernels.distributed import Ranks, ShardedLoss
from ntdne_kernels.fill import fill_bank
from ntdne_kernels.labels import as_index, as_labels
from ntdne_kernels.ops import sharded
from ntdne_kernels.ops.layout import ClassOrder
from ntdne_kernels.ops.look_up import indicator_of, log_chance, normalise
from ntdne_kernels.ops.losses import LossSpec
from ntdne_kernels.ops.schema import Batch
from ntdne_kernels.user_warning import warn_user
from ntdne_kernels.watch import Watch

REFRESH_CHUNK = 1024  # bank rows scored at a time
NEARLY_ALL = 0.9  # share of images: pruning more of them is warned of


class _NeighbourhoodLoss(nn.Module):
    """What NTDNELoss and SNCALoss share: the bank, and the scores of a batch against it."""

    def __init__(
        self,
        labels: Any,
        dim: int,
        *,
        sigma: float,
        momentum: float,
        reduction: str,
        fused: bool,
        validate: bool,
        generator: torch.Generator | None,
        device: torch.device | str | None,
        dtype: torch.dtype,
        process_group: ProcessGroup | DeviceMesh | None,
        storage: str,
        path: str | os.PathLike[str] | None,
    ) -> None:
        super().__init__()
        check_number("sigma", sigma, 0, float("inf"))
        check_number("momentum", momentum, 0, 1, lower_included=True, upper_included=True)
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.sigma = sigma
        self.momentum = momentum
        self.reduction = reduction
        self.fused = fused
        self.validate = validate
        self.memory = MemoryBank(
            labels,
            dim,
            generator=generator,
            device=device,
            dtype=dtype,
            process_group=process_group,
            storage=storage,
            path=path,
        )
        self.epoch = 0
        self._epoch_was_set = False
        self._images_seen = 0
        self._watch = Watch()

    def forward(
        self,
        features: Tensor,
        index: Any = None,
        *,
        labels: Any = None,
        return_scores: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Loss of a batch against the whole archive.

        Args:
            features: (B, D) of any float dtype; normalised here.
            index: (B,) image of each feature, not its own neighbour; −1 or None: it is not in the archive.
            labels: (B,) classes of the features whose index is −1. The others have the archive's label; where it is
                not the one given, a warning says so once. Both may be lists, arrays and the like.
            return_scores: also return the scores p (B,), eq. 4, detached.

        Returns:
            The loss, or (loss, scores); float32, or float64 for a float64 bank.

        Raises:
            TypeError, ValueError, IndexError: an argument is not as described. Values are looked at on a CPU, and on a
                GPU only with validate=True, which synchronises.
        """
        memory = self.memory
        if memory.ranks is not None:
            return self._forward_over_ranks(memory.ranks, features, index, labels, return_scores)
        self._check_features(features)
        with_index, with_both = index is not None, index is not None and labels is not None
        index, labels = self._check_images(len(features), index, labels)
        check_directions("features", features, None, accumulator_dtype(memory.storage.dtype), look=self.validate)
        check_number("sigma", self.sigma, 0, math.inf)
        if with_both and not torch.compiler.is_compiling():
            self._watch.compare(labels, index, lambda: memory.labels[index.clamp(min=0)])
        batch = Batch(features, memory.storage, labels, index, memory.index.layout, float(self.sigma))
        loss, log_p = functional.loss_of_batch(batch, memory.archive, self._loss(), self._backend)
        if self.training:
            self._note_training(len(features), index if with_index else None)
            memory.record_(log_p, index)
        return (loss, log_p.exp()) if return_scores else loss

    def _forward_over_ranks(
        self, ranks: Ranks, features: Tensor, index: Any, labels: Any, return_scores: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        memory = self.memory

        given: list[Tensor] = []

        def check() -> tuple[int, int]:
            """How many images there are; whether a gradient is wanted, beside a number of the settings."""
            memory.check_untouched()
            self._check_features(features)
            check_directions("features", features, None, accumulator_dtype(memory.storage.dtype), look=self.validate)
            check_number("sigma", self.sigma, 0, float("inf"))
            images, own_labels = self._check_images(len(features), index, labels)
            given.extend([images, torch.full_like(images, UNLABELLED) if own_labels is None else own_labels])
            settings = (self.sigma, self.momentum, self._loss(), getattr(self, "indicator", None), self.training)
            number = 0 if torch.compiler.is_compiling() else zlib.crc32(repr(settings).encode())
            return len(features), 2 * number + int(torch.is_grad_enabled() and features.requires_grad)

        found = ranks.exchange("forward", check)
        sizes = [size for size, _ in found]
        differing = [rank for rank, (_, number) in enumerate(found) if number // 2 != found[0][1] // 2]
        if differing:
            raise ValueError(
                "criterion: expected the same sigma, q, k, momentum, reduction, indicator, epoch, mode on all ranks; "
                f"those of ranks {differing} differ from rank 0's; all call set_epoch, train and eval"
            )
        batch = memory.look_up(given[0], given[1], sizes)
        loss_kind = self._loss()
        if index is not None and labels is not None and not torch.compiler.is_compiling():
            self._watch.compare(given[1], given[0], lambda: batch.labels[ranks.own(sizes)])
        units = self._unit(features)
        loss, log_p = ShardedLoss.apply(
            units,
            Batch(
                units,
                memory.storage,
                batch.labels,
                memory.local(batch.places),
                memory.index.layout,
                float(self.sigma),
            ),
            loss_kind,
            indicator_of(
                loss_kind.indicator,
                batch.scores,
                batch.labels,
                batch.images,
                ClassOrder(memory.classes, memory.offsets),
                len(memory),
            ),
            functional.choose_backend(self._backend, memory.storage, memory.device),
            any(number % 2 for _, number in found),  # all ranks make directions where one wants its gradient
            sizes,
            ranks,
        )
        if self.training:
            self._note_training(sum(sizes), None if index is None else given[0])
            memory.record_(log_p, batch.images)
        return (loss, log_p[ranks.own(sizes)].exp()) if return_scores else loss

    def _unit(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return normalise(features, accumulator_dtype(self.memory.storage.dtype))[0]

    def update_bank(self, features: Tensor, index: Any) -> None:
        """Blend the batch into the bank (eq. 15), in place; detaches by itself. See `functional.update_bank_`."""
        self.memory.update_(features, index, self.momentum, validate=self.validate)
        if not torch.compiler.is_compiling():
            self._watch.updated()

    def fill_bank(
        self, encoder: nn.Module, loader: Iterable[Any], *, progress: bool = True, resume: str | Path | None = None
    ) -> int:
        """Replace the bank by the encoder's features of the archive; see `ntdne_kernels.fill_bank`."""
        return fill_bank(self.memory, encoder, loader, progress=progress, resume=resume)

    @torch.no_grad()
    def refresh_indicator(self) -> None:
        """Score every image anew from its bank row: N²·D work. The results are `memory.last_log_p`.

        The rows are those of the last updates; `fill_bank` first brings them up to the encoder as it is.
        """
        check_number("sigma", self.sigma, 0, float("inf"))
        memory = self.memory
        n = len(memory.images)
        most = n if memory.ranks is None else memory.ranks.most(len(memory))
        for start in range(0, most, REFRESH_CHUNK):  # on each rank as often as on any other
            rows = torch.arange(min(start, n), min(start + REFRESH_CHUNK, n), device=memory.device)
            images, labels, places = memory.order[rows], memory.stored_labels(rows), rows + memory.images.start
            if memory.ranks is None:
                log_p = functional.leave_one_out_log_scores(
                    memory.take(rows),
                    memory.storage,
                    labels,
                    memory.index,
                    places,
                    sigma=self.sigma,
                    backend=self._backend,
                )
            else:
                sizes = [min(max(n - start, 0), REFRESH_CHUNK) for n in memory.ranks.lengths(len(memory))]
                images, labels, places = memory.ranks.gather(torch.stack([images, labels, places], 1), sizes).unbind(1)
                batch = Batch(
                    memory.take(rows),
                    memory.storage,
                    labels,
                    memory.local(places),
                    memory.index.layout,
                    float(self.sigma),
                )
                log_p, _ = sharded.log_scores(
                    batch,
                    False,
                    functional.choose_backend(self._backend, memory.storage, memory.device),
                    sizes,
                    memory.ranks.name,
                )
            memory.record_(log_p, images)

    def set_epoch(self, epoch: int) -> None:
        """Tell the loss which epoch begins, from 0, as with DistributedSampler.set_epoch."""
        if isinstance(epoch, bool) or not hasattr(epoch, "__index__"):
            raise TypeError(f"epoch: expected an integer, got {type(epoch).__name__}")
        epoch = operator.index(epoch)
        if epoch < 0:
            raise ValueError(f"epoch: expected 0 or more, got {epoch}")
        self.epoch = epoch
        self._epoch_was_set = True

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Leave the epoch too where the bank will refuse the checkpoint."""
        if self.memory.disagreement(state_dict, f"{prefix}memory.") is None:
            super()._load_from_state_dict(state_dict, prefix, *rest)

    def get_extra_state(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "epoch_was_set": self._epoch_was_set}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.set_epoch(state["epoch"])
        self._epoch_was_set = state["epoch_was_set"]

    @property
    def _backend(self) -> str | None:
        return None if self.fused else "reference"

    def _loss(self) -> LossSpec:
        raise NotImplementedError

    def _check_features(self, features: Tensor) -> None:
        storage = self.memory.storage
        if not isinstance(features, Tensor) or not features.is_floating_point():
            found = features.dtype if isinstance(features, Tensor) else type(features).__name__
            raise TypeError(f"features: expected a float tensor, got {found}")
        if features.device != self.memory.device:
            raise ValueError(f"features: expected the bank's device, {self.memory.device}, got {features.device}")
        if features.dim() != 2 or features.size(1) != storage.size(1):
            raise ValueError(
                f"features: expected shape (B, {storage.size(1)}) as in the bank, got {tuple(features.shape)}"
            )

    def _check_images(self, B: int, index: Any, labels: Any) -> tuple[Tensor, Tensor | None]:
        """Images, −1 for none, and the labels given (B,) or None, as int64."""
        memory = self.memory
        if index is None and labels is None:
            raise ValueError("index: expected the images of the batch, or labels for features without one; got neither")
        index = None if index is None else as_index(index, device=memory.device)
        labels = None if labels is None else as_labels(labels, device=memory.device)
        for name, given in (("index", index), ("labels", labels)):
            if given is None:
                continue
            if len(given) != B:
                raise ValueError(f"{name}: expected one value for each of the {B} features, got {len(given)}")
            if given.device != memory.device:
                raise ValueError(f"{name}: expected the bank's device, {memory.device}, got {given.device}")
        if index is None:
            index = memory.labels.new_full((B,), NOT_IN_BANK)
        else:
            check_range("index", index, len(memory), look=self.validate)
        if labels is None:
            looking = self.validate or (index.device.type == "cpu" and not torch.compiler.is_compiling())
            if looking and bool((index == NOT_IN_BANK).any()):
                row = int((index == NOT_IN_BANK).nonzero()[0])
                raise ValueError(f"labels: expected labels, because index is -1 in row {row}; got None")
            return index, None
        labels = labels.to(torch.int64)
        check_classes(labels, look=self.validate)
        return index, labels

    def _note_training(self, B: int, index: Tensor | None) -> None:
        """Warn, once each, of ways to train that cannot be meant; not in a compiled criterion."""
        if torch.compiler.is_compiling():
            return
        self._watch.trained(B, index, self.memory)
        first = self._images_seen == 0
        self._images_seen += B
        if 0 < self._images_seen - len(self.memory) <= B:
            self._note_first_pass()
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if first and self.memory.ranks is None and distributed and torch.distributed.get_world_size() > 1:
            warn_user(
                f"each of the {torch.distributed.get_world_size()} ranks keeps a bank of its own, which sees only that "
                "rank's images: the banks drift apart; process_group=torch.distributed.group.WORLD shards one bank "
                "(it is None before init_process_group)"
            )

    def _note_first_pass(self) -> None:
        """What can be said once as many images were seen as the archive has."""
        if self.memory.fresh:
            warn_user(
                "the whole archive was seen and the bank still holds its random start; call criterion.update_bank("
                "features, index) after each step"
            )
        if self.memory.scores.device.type != "cpu":
            return  # looking would synchronise
        seen = int((~self.memory.last_log_p.isnan()).sum())
        labelled = int((self.memory.labels != UNLABELLED).sum())
        if 0 < seen < labelled // 4:
            here = "" if self.memory.ranks is None else f" of the {len(self.memory.images)} kept on this rank"
            self._watch.labels_as_index(f"{len(self.memory)} images were seen, but they were the same {seen}{here}")


class NTDNELoss(_NeighbourhoodLoss):
    """Noise-tolerant deep neighbourhood embedding: (1 − p^q)/q of the leave-one-out score p, pruned where p ≤ k.

    The score p (eq. 4) is the share of an image's neighbours in feature space, over the whole archive, that carry its
    label. The loss (eq. 9) grows less steeply than −log p where p is small, and from `warmup_epochs` on it is constant
    there (eq. 13), so images whose neighbours disagree with their label no longer train the encoder.

    Call `set_epoch` before each epoch and `update_bank` after each step. An image that is unlabelled or alone in its
    class has p = 0: it adds the constant 1/q to the loss, counts in the mean, and has no gradient. Features of other
    images, for validation say, are scored by `criterion.eval()` and `criterion(features, labels=labels)`.

    Args:
        labels: (N,) integer class of each archive image, −1 for unlabelled, in a tensor, list, array, Series and the
            like: `IndexedDataset(dataset).labels`, say. `encode_labels` numbers names.
        dim: D, features per image.
        sigma: temperature σ > 0 (eq. 3).
        q: exponent in (0, 1].
        k: pruning threshold in (0, 1); None prunes nothing. "auto" is chance: an image is pruned whose last score says
            that no more of its neighbours carry its label than of all other images do. That also works while an encoder
            that starts from nothing gives all images low scores. It does not see wrong labels that agree with each
            other: where half of a class is called by one other name, these score far above chance.
        warmup_epochs: first epoch that prunes: T of the paper.
        momentum: weight m in [0, 1] of the old bank row (eq. 15; 1 − λ).
        indicator: which score decides on pruning: "current", that of this forward (eq. 14), or "stored", the image's
            last one before it (images never scored are kept; `refresh_indicator` scores all), as always with k="auto".
            Stored scores are not for a criterion under activation checkpointing, whose second forward would see those
            of the first.
        reduction: "mean", "sum" or "none".
        fused: stream the bank (the fastest backend for the device) instead of b×N PyTorch; the numbers are the same.
        validate: look for bad values on a GPU too, which synchronises.
        generator: source of the bank's random start.
        device, dtype: of the bank. The dtype decides the arithmetic, whatever autocast says.
        process_group: ranks that share the bank, each holding a part of its rows (a torch.distributed group, or a
            DeviceMesh of one dimension). Every call is then made by all of them; the batch is that of all ranks, and
            loss and gradients are those of one process on it, once DistributedDataParallel has averaged the latter.
        storage, path: "device", "host" or "disk": where the rows live; see `MemoryBank`.

    Attributes:
        sigma, q, k, momentum: may be changed between steps, by a schedule say. A compiled criterion is compiled anew
            for each new value; torch._dynamo.config.recompile_limit says how often.
        memory: the `MemoryBank`.
        pruning: whether this epoch prunes.
        pruned: (N,) the images that it prunes, by their last scores; none while it does not prune. On ranks, of
            `memory.images` alone.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """

    def __init__(
        self,
        labels: Any,
        dim: int = 128,
        *,
        sigma: float = 0.1,
        q: float = 0.7,
        k: float | str | None = 0.3,
        warmup_epochs: int = 20,
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
        check_number("warmup_epochs", warmup_epochs, 0, float("inf"), lower_included=True)
        check_choice("indicator", indicator, ("current", "stored"))
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
        self.indicator = indicator
        # Read by forward in place of the epoch, which would make a compiled forward compile anew every epoch.
        self.pruning = warmup_epochs == 0
        self._pruning_much_was_said = False

    def set_epoch(self, epoch: int) -> None:
        """Tell the loss which epoch begins, from 0; from epoch `warmup_epochs` on it prunes.

        Warns, once, where nearly every image would be pruned by its last score. To see that it synchronises, once an
        epoch.
        """
        super().set_epoch(epoch)
        self.pruning = epoch >= self.warmup_epochs
        if self.pruning:
            self._note_pruned_share()

    @property
    def pruned(self) -> Tensor:
        """(N,) bool: images that stopped training the encoder, as their last score is at most the threshold.

        Not those never scored; none in the warm-up or for k=None.
        """
        if not self.pruning:
            return torch.zeros_like(self.memory.last_log_p, dtype=torch.bool)
        return self.memory.last_log_p <= self._log_threshold(self.memory.labels)

    def extra_repr(self) -> str:
        return (
            f"sigma={self.sigma}, q={self.q}, k={self.k}, warmup_epochs={self.warmup_epochs}, "
            f"momentum={self.momentum}, indicator={self.indicator!r}, fused={self.fused}"
        )

    def _loss(self) -> LossSpec:
        check_number("q", self.q, 0, 1, upper_included=True)
        _check_k(self.k)
        # With "auto", the k of eq. 13's constant and of features of no image in the archive: chance in C even classes.
        auto = isinstance(self.k, str)
        k = 1 / max(2, len(self.memory.classes)) if isinstance(self.k, str) else self.k
        if not self.pruning or k is None:
            return LossSpec(self.q, None, self.reduction)
        return LossSpec(self.q, k, self.reduction, "auto" if auto else self.indicator)

    def _log_threshold(self, labels: Tensor) -> Tensor | float:
        """log k of images with these labels (B,); k="auto" is the share of the other images that carry the label."""
        memory = self.memory
        if self.k is None or len(memory.classes) == 0:
            return math.nan  # nothing is at most that
        if not isinstance(self.k, str):
            return math.log(self.k)
        return log_chance(labels, ClassOrder(memory.classes, memory.offsets), len(memory))

    def _note_pruned_share(self) -> None:
        if self._pruning_much_was_said:
            return
        scored = int((~self.memory.last_log_p.isnan()).sum())
        pruned = int(self.pruned.sum())
        if pruned <= NEARLY_ALL * scored:
            return
        self._pruning_much_was_said = True
        median = float(self.memory.last_log_p.nanmedian().exp())
        if isinstance(self.k, str):
            threshold, advice = "chance", "are the labels those of these images, and does the encoder learn?"
        else:
            threshold, advice = f"k = {self.k}", 'try k="auto", a lower k or more warmup_epochs'
        warn_user(
            f"{pruned} of the {scored} images scored so far have a score of at most {threshold} and stop training the "
            f"encoder (the median score is {median:.2g}); {advice}"
        )

    def _note_first_pass(self) -> None:
        super()._note_first_pass()
        if self.pruning and self.memory.scores.device.type == "cpu":
            self._note_pruned_share()
        if not self._epoch_was_set and self.k is not None and self.warmup_epochs > 0:
            warn_user(
                f"the whole archive was seen and set_epoch was never called, so pruning never starts (warmup_epochs="
                f"{self.warmup_epochs}); call criterion.set_epoch(epoch) before each epoch"
            )


class SNCALoss(_NeighbourhoodLoss):
    """Scalable neighbourhood component analysis: −log p of the leave-one-out score p (eq. 5), for comparison.

    Images without a neighbour of their class are ignored. Arguments, attributes and methods as `NTDNELoss`.
    """

    def __init__(
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
        return f"sigma={self.sigma}, momentum={self.momentum}, fused={self.fused}"

    def _loss(self) -> LossSpec:
        return LossSpec(None, None, self.reduction)


def _check_k(k: float | str | None) -> None:
    if isinstance(k, str) and k != "auto":
        raise ValueError(f"k: expected a number in (0, 1), 'auto' or None, got {k!r}")
    if k is not None and not isinstance(k, str):
        check_number("k", k, 0, 1)
