"""What NTDNELoss and SNCALoss share: the memory bank, the loss of a batch against it, and the warnings of a training.

Shapes: B images of a batch, b of them on this rank, N images of the archive, D features.
"""

import math
import operator
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ntdne_kernels.arguments import (
    NOT_IN_BANK,
    UNLABELLED,
    accumulator_dtype,
    can_look_inside,
    check_choice,
    check_classes,
    check_directions,
    check_number,
    check_range,
)
from ntdne_kernels.bank import MemoryBank
from ntdne_kernels.bank.batch import score_rows
from ntdne_kernels.distributed import Report, check_same_settings
from ntdne_kernels.fill import fill_bank
from ntdne_kernels.labels import as_index, as_labels
from ntdne_kernels.ops.losses import REDUCTIONS, LossSpec
from ntdne_kernels.user_warning import warn_user
from ntdne_kernels.watch import Watch

SAME = (
    "criterion: expected the same sigma, q, k, unit_slope, momentum, reduction, indicator, epoch and mode (all call "
    "set_epoch, train and eval)"
)
REFRESH_CHUNK = 1024  # bank rows of each process that are scored at a time


class NeighbourhoodLoss(nn.Module):
    """A loss of each image's leave-one-out score in the memory bank of its archive; the subclass says which loss."""

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
        **bank_options: Any,
    ) -> None:
        super().__init__()
        check_number("sigma", sigma, 0, math.inf)
        check_number("momentum", momentum, 0, 1, lower_included=True, upper_included=True)
        check_choice("reduction", reduction, REDUCTIONS)
        self.sigma = sigma
        self.momentum = momentum
        self.reduction = reduction
        self.fused = fused
        self.validate = validate
        self.memory = MemoryBank(labels, dim, **bank_options)
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
            features: (b, D) of any float dtype; normalised here.
            index: (b,) image of each feature, not its own neighbour; −1 or None: it is not in the archive.
            labels: (b,) classes of the features whose index is −1. The others have the archive's label; where it is
                not the one given, a warning says so once. Both may be lists, arrays and the like.
            return_scores: also return the scores p (b,), eq. 4, detached.

        Returns:
            The loss, or (loss, scores); float32, or float64 for a float64 bank.

        Raises:
            TypeError: an argument has the wrong type or dtype.
            ValueError: a shape, device, label or number is not as described.
            IndexError: an index is no image of the archive. Values are looked at on a CPU, and on a GPU only with
                validate=True, which synchronises; in compiled code nowhere.
            RuntimeError: in training, it is called inside backward, as by activation checkpointing.
        """
        memory = self.memory
        if self.training and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "the criterion is called inside backward, as by activation checkpointing, which runs again what it "
                "wraps: the scores of the first run are recorded by then, and the bank may be updated; call it outside "
                "of what is checkpointed: it keeps nothing of the bank for backward"
            )
        (images, own_labels, spec), reports = memory.processes.exchange(
            "forward", lambda: self._check_batch(features, index, labels)
        )
        check_same_settings(reports, SAME)
        batch = memory.batch(images, own_labels, reports)
        if index is not None and own_labels is not None and not torch.compiler.is_compiling():
            self._watch.compare(own_labels, images, batch.stored_labels)
        loss, log_p = batch.loss(features, spec, self.sigma, self._backend)
        if self.training:
            self._note_training(len(log_p), None if index is None else images)
            memory.record_(log_p, batch.images)
        return (loss, batch.own(log_p).exp()) if return_scores else loss

    def update_bank(self, features: Tensor, index: Any) -> None:
        """Blend the batch into the bank (eq. 15), in place; detaches by itself. See `functional.update_bank_`."""
        self.memory.update_(features, index, self.momentum, validate=self.validate)
        if not torch.compiler.is_compiling():
            self._watch.updated()

    def fill_bank(
        self, encoder: nn.Module, loader: Iterable[Any], *, progress: bool = True, resume: str | Path | None = None
    ) -> int:
        """Replace the bank's rows by the encoder's features of the archive; see `ntdne_kernels.fill_bank`."""
        return fill_bank(self.memory, encoder, loader, progress=progress, resume=resume)

    @torch.no_grad()
    def refresh_indicator(self) -> None:
        """Score every image from its bank row, N²·D work; the results are `memory.last_log_p`.

        Bank rows lag behind the encoder; call `fill_bank` first to score the encoder as it is now.
        """
        check_number("sigma", self.sigma, 0, math.inf)
        memory = self.memory
        most_rows = max(memory.processes.lengths(len(memory)))  # on each process as often as on any other
        for start in range(0, most_rows, REFRESH_CHUNK):
            log_p, images = score_rows(memory.shard, start, start + REFRESH_CHUNK, self.sigma, self._backend)
            memory.record_(log_p, images)

    def set_epoch(self, epoch: int) -> None:
        """Tell the loss which epoch begins, counted from 0, as with DistributedSampler.set_epoch.

        Raises:
            TypeError: epoch is not an integer.
            ValueError: epoch is negative.
        """
        if isinstance(epoch, bool) or not hasattr(epoch, "__index__"):
            raise TypeError(f"epoch: expected an integer, got {type(epoch).__name__}")
        epoch = operator.index(epoch)
        if epoch < 0:
            raise ValueError(f"epoch: expected 0 or more, got {epoch}")
        self.epoch = epoch
        self._epoch_was_set = True

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Load nothing, not even the epoch, if the bank will refuse the checkpoint."""
        if self.memory.disagreement(state_dict, f"{prefix}memory.") is None:
            super()._load_from_state_dict(state_dict, prefix, *rest)

    def get_extra_state(self) -> dict[str, Any]:
        """The epoch, for the state dict."""
        return {"epoch": self.epoch, "epoch_was_set": self._epoch_was_set}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on with the epoch of a state dict."""
        self.set_epoch(state["epoch"])
        self._epoch_was_set = state["epoch_was_set"]

    @property
    def _backend(self) -> str | None:
        return None if self.fused else "reference"

    def _loss_spec(self) -> LossSpec:
        """Which loss it is, with the settings as they are now."""
        raise NotImplementedError

    def _check_batch(
        self, features: Tensor, index: Any, labels: Any
    ) -> tuple[tuple[Tensor, Tensor | None, LossSpec], Report]:
        """Images and labels as `_check_images` gives them, and the loss; and what other processes need to know."""
        self._check_features(features)
        images, own_labels = self._check_images(len(features), index, labels)
        check_directions("features", features, None, accumulator_dtype(self.memory.storage.dtype), look=self.validate)
        check_number("sigma", self.sigma, 0, math.inf)
        check_choice("reduction", self.reduction, REDUCTIONS)
        spec = self._loss_spec()
        settings = (self.sigma, self.momentum, spec, getattr(self, "indicator", None), self.training)
        wants_gradient = torch.is_grad_enabled() and features.requires_grad
        report = Report(len(features), wants_gradient, self.memory.processes.checksum(settings))
        return (images, own_labels, spec), report

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
            if can_look_inside(index, look=self.validate) and bool((index == NOT_IN_BANK).any()):
                row = int((index == NOT_IN_BANK).nonzero()[0])
                raise ValueError(f"labels: expected labels, because index is -1 in row {row}; got None")
            return index, None
        labels = labels.to(torch.int64)
        check_classes(labels, look=self.validate)
        return index, labels

    def _note_training(self, B: int, index: Tensor | None) -> None:
        """Warn, once each, of mistakes in the training loop; not from compiled code."""
        if torch.compiler.is_compiling():
            return
        if torch.is_grad_enabled():
            self._watch.trained(B, index, self.memory)
        first = self._images_seen == 0
        self._images_seen += B
        if 0 < self._images_seen - len(self.memory) <= B:
            self._note_first_pass()
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if first and self.memory.process_group is None and distributed and torch.distributed.get_world_size() > 1:
            warn_user(
                f"each of the {torch.distributed.get_world_size()} ranks keeps a bank of its own, which sees only that "
                "rank's images: the banks drift apart; process_group=torch.distributed.group.WORLD shards one bank "
                "(it is None before init_process_group)"
            )

    def _note_first_pass(self) -> None:
        """Warn of mistakes that show once as many images were seen as the archive has."""
        if self.memory.fresh:
            warn_user(
                "the whole archive was seen and the bank still holds its random start; call criterion.update_bank("
                "features, index) after each step"
            )
        if self.memory.scores.device.type != "cpu":
            return  # reading the scores would synchronise
        scored, labelled = (~self.memory.last_log_p.isnan()).nonzero()[:, 0], self.memory.labels != UNLABELLED
        seen = len(scored)
        if not 0 < seen < int(labelled.sum()) // 4:
            return
        # A curriculum visits few images too, and relabel forgets scores. But positions in a batch or in a part of the
        # archive leave no gap between them, and labels are numbers of classes.
        no_gap = int(labelled[int(scored[0]) : int(scored[-1]) + 1].sum()) == seen
        if no_gap or bool(torch.isin(scored + self.memory.images[0], self.memory.classes).all()):
            kept = len(self.memory.images)
            here = "" if kept == len(self.memory) else f" of the {kept} kept on this rank"
            self._watch.labels_as_index(f"{len(self.memory)} images were seen, but they were the same {seen}{here}")
