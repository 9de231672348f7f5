"""Training with Lightning: one run, which may be killed and continued at any time.

A killed run continues from the end of its last complete epoch. On the same machine it gives the same numbers as a run
that was never killed (on a GPU as far as PyTorch's kernels are deterministic), since batches and augmentations depend
only on the seed and the epoch, and the checkpoint holds encoder, loss (with bank and scores), optimiser, schedule and
history. It is written under another name and then renamed, so it is always complete.

Shapes: b images of a batch in B bands, or b rows of F features; N training images, D values of the encoder, C classes.
"""

import dataclasses
import logging
import math
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, Sampler
from torch.utils.data.distributed import DistributedSampler

from ntdne_kernels import NTDNELoss, SNCALoss
from ntdne_kernels.experiments.encoders import for_encoder, make_encoder
from ntdne_kernels.experiments.evaluation import knn_accuracy
from ntdne_kernels.experiments.files import write_whole
from ntdne_kernels.experiments.loss_registry import make_loss
from ntdne_kernels.experiments.losses import Criterion, TRNSLLoss
from ntdne_kernels.experiments.problem import MAX_DATABASE, Problem
from ntdne_kernels.experiments.settings import Settings
from ntdne_kernels.experiments.splits import stride

CHECKPOINT, BANK = "last.ckpt", "bank.rows"
MAX_SCORES = 1_000_000  # that quantiles and AUROC are taken of; torch.quantile refuses more than 16 million
NEIGHBOURS = 10  # K of K-NN
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


class Training(LightningModule):
    """Encoder and loss of a run, with its metrics.

    Attributes:
        encoder: images (b, B, H, W), or features (b, F), to features (b, D).
        criterion: one of the losses.
        history: a row of metrics for each complete epoch.
    """

    train_features: Tensor

    def __init__(
        self,
        settings: Settings,
        problem: Problem,
        workers: int = 0,
        devices: int = 1,
        storage: str = "device",
        path: Path | None = None,
    ) -> None:
        super().__init__()
        self.settings, self.problem, self.workers = settings, problem, workers
        self.batch_size = settings.batch_size // devices
        self.steps_per_epoch = len(Batches(range(math.ceil(len(problem.train) / devices)), self.batch_size))
        torch.manual_seed(settings.seed)
        bands = len(problem.normalisation.mean)
        self.encoder = make_encoder(settings.encoder, settings.dim, settings.weights, bands)
        self.criterion = make_criterion(settings, problem.noisy.labels, storage, path)
        momentum = settings.loss_options.get("momentum")
        self.bank_momentum: dict[int, float] = momentum if isinstance(momentum, dict) else {}
        self.history: list[dict[str, float]] = []
        self.first_epoch = 0
        # Each image's feature when it was last trained on. Validation searches these, which saves a pass; of very many
        # it searches every n-th.
        self.every = stride(len(problem.train), MAX_DATABASE)
        searched = len(range(0, len(problem.train), self.every))
        self.register_buffer("train_features", torch.zeros(searched, settings.dim), persistent=False)
        self._validation: list[tuple[Tensor, Tensor]] = []

    def train_dataloader(self) -> DataLoader[Any]:
        """The loader of an epoch (`train` has Lightning ask for one each epoch), random by the seed and the epoch only.

        It must not depend on how often it is asked for or iterated: at the start of a continued run Lightning does both
        twice, once while the epoch is still 0.
        """
        seed = self._epoch_seed
        dataset = self.problem.dataset(self.problem.train, augment_by=seed if self.settings.augment else None)
        order: DistributedSampler[Any] = DistributedSampler(
            dataset, self.trainer.world_size, self.trainer.global_rank, seed=seed
        )
        return DataLoader(
            dataset,
            batch_sampler=Batches(order, self.batch_size),
            num_workers=self.workers,
            collate_fn=dataset.collate,
            pin_memory=self.device.type == "cuda",
        )

    @property
    def _epoch_seed(self) -> int:
        return 1_000_003 * self.settings.seed + max(self.current_epoch, self.first_epoch)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """The loader of the validation images, if there are any."""
        if len(self.problem.validation) == 0:  # an archive of tiny classes
            return []
        dataset = self.problem.dataset(self.problem.validation)
        return [DataLoader(dataset, self.batch_size, num_workers=self.workers, collate_fn=dataset.collate)]

    def configure_optimizers(self) -> Any:
        """SGD and the schedule of the settings."""
        settings = self.settings
        optimizer = torch.optim.SGD(
            self.parameters(), settings.lr, settings.momentum, weight_decay=settings.weight_decay, nesterov=True
        )
        schedule: torch.optim.lr_scheduler.LRScheduler
        if settings.schedule == "one-cycle":
            schedule = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, settings.lr, total_steps=settings.epochs * self.steps_per_epoch
            )
        else:
            decay = settings.lr_decay if settings.schedule == "step" else 1.0
            interval = settings.lr_step * self.steps_per_epoch
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: decay ** (step // interval))
        # By step, since Lightning steps an epoch's schedule only after the epoch's checkpoint.
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_epoch_start(self) -> None:
        """Tell the loss the epoch, and set its momentum."""
        self.criterion.set_epoch(self.current_epoch)
        if self.bank_momentum:
            self.criterion.momentum = self.bank_momentum[max(e for e in self.bank_momentum if e <= self.current_epoch)]
        self._losses: list[Tensor] = []
        self._lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        self._epoch_began = time.perf_counter()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the epoch's dropout, after all that loaders draw, which is more where a run is continued."""
        if batch_idx == 0:
            torch.manual_seed(self._epoch_seed + self.global_rank)

    def training_step(self, batch: list[Tensor]) -> dict[str, Tensor]:
        """The loss of a batch, with its features for the update of the bank."""
        images, _, index = batch
        features = self.encoder(for_encoder(images))
        with self._naming_divergence():
            loss = self.criterion(features, index)
        return {"loss": loss, "features": features.detach(), "index": index}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Update the bank after the optimiser's step.

        Each rank updates its bank with the features and scores of all ranks, so that the banks stay equal.
        """
        features, index = outputs["features"].float(), outputs["index"]
        if self.trainer.world_size > 1:
            features, index = self._of_all_ranks(features), self._of_all_ranks(index)
            if isinstance(self.criterion, NTDNELoss | SNCALoss):
                memory = self.criterion.memory
                memory.record_(self._of_all_ranks(memory.last_log_p[outputs["index"]]), index)
        with self._naming_divergence():
            self.criterion.update_bank(features, index)
        if self.every > 1:
            features, index = features[index % self.every == 0], index[index % self.every == 0] // self.every
        self.train_features[index] = normalize(features, dim=1)
        self._losses.append(outputs["loss"].detach())

    @contextmanager
    def _naming_divergence(self) -> Iterator[None]:
        """Say that training diverged where the bank finds features that are not finite."""
        try:
            yield
        except ValueError as error:
            if "finite norm" not in str(error):
                raise
            epoch = self.current_epoch + 1
            raise ValueError(f"training diverged in epoch {epoch}; try a lower --lr than {self._lr}: {error}") from None

    def _of_all_ranks(self, values: Tensor) -> Tensor:
        gathered: Any = self.all_gather(values)
        return torch.flatten(gathered, 0, 1)

    def validation_step(self, batch: list[Tensor]) -> None:
        """Keep the unit features of a batch for the end of the epoch."""
        images, labels, _ = batch
        features = self.encoder(for_encoder(images)).float()
        self._validation.append((normalize(features, dim=1), labels))

    def on_train_epoch_end(self) -> None:
        """Log a row of metrics; ValueError where the loss is not finite."""
        loss = self.trainer.strategy.reduce(torch.stack(self._losses).mean(), reduce_op="mean")
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss of epoch {self.current_epoch + 1} is {float(loss)}: training diverged; try a lower --lr"
            )
        row = {"loss": float(loss), "lr": self._lr}  # the learning rate at the beginning of the epoch
        row |= self._validation_metrics() | self._score_metrics()
        row["seconds"] = time.perf_counter() - self._epoch_began
        self.log_dict(row, rank_zero_only=True)
        self.history.append({"epoch": self.current_epoch, **row})
        if self.trainer.is_global_zero:
            self._print_last_row()

    def _print_last_row(self) -> None:
        """Print the epoch's metrics in one line, which suits log files and terminals."""
        row = self.history[-1]
        line = f"epoch {row['epoch'] + 1}/{self.settings.epochs}  loss {row['loss']:.4f}"
        if "val_knn" in row:
            line += f"  K-NN {100 * row['val_knn']:.1f} %"
        if "p50" in row:
            line += f"  median score {row['p50']:.3f}"
        if "pruned_share" in row:
            line += f"  pruned {100 * row['pruned_share']:.0f} %"
        print(line, flush=True)

    def _validation_metrics(self) -> dict[str, float]:
        """K-NN accuracy of the validation images among the training images, by true and by given labels."""
        if not self._validation:
            return {}
        features, labels = (torch.cat(part) for part in zip(*self._validation, strict=True))
        self._validation.clear()
        noisy, true = self.problem.noisy.labels[:: self.every], self.problem.labels[self.problem.train[:: self.every]]
        nearest = min(NEIGHBOURS, len(true))
        return {
            "val_knn": knn_accuracy(features, labels, self.train_features, true.to(labels.device), K=nearest),
            "val_knn_given": knn_accuracy(features, labels, self.train_features, noisy.to(labels.device), K=nearest),
        }

    def _score_metrics(self) -> dict[str, float]:
        """Quantiles of the leave-one-out scores p, the pruned share, and the AUROC of low p for wrong labels."""
        if isinstance(self.criterion, TRNSLLoss):
            return {"pruned_share": self.criterion.truncated_share}
        if not isinstance(self.criterion, NTDNELoss | SNCALoss):
            return {}
        every = stride(len(self.problem.train), MAX_SCORES)
        p = self.criterion.memory.last_log_p[::every].exp().cpu()
        row = {
            f"p{round(100 * share)}": float(q)
            for share, q in zip(QUANTILES, p.quantile(torch.tensor(QUANTILES)), strict=True)
        }
        if isinstance(self.criterion, NTDNELoss):
            row["pruned_share"] = float(self.criterion.pruned.float().mean()) if self.criterion.pruning else 0.0
        flipped = self.problem.noisy.flipped[::every]
        if 0 < int(flipped.sum()) < len(flipped):
            row["flip_auroc"] = float(roc_auc_score(flipped, -p))
        return row

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the history, and what identifies the problem."""
        checkpoint |= {"history": self.history, "problem": self.problem.fingerprint}
        checkpoint["normalisation"] = dataclasses.asdict(self.problem.normalisation)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the history."""
        self.history = checkpoint["history"]


class Batches(Sampler[list[int]]):
    """Batches of B in the order of a sampler; a last one of a single image is joined to the one before.

    BatchNorm cannot normalise a single image, as it has no variance.
    """

    def __init__(self, order: Sampler[int] | range, B: int) -> None:
        self.order, self.B = order, B

    def __len__(self) -> int:
        n = len(self.order)  # type: ignore[arg-type]
        return max(1, n // self.B + (n % self.B > (1 if self.B > 1 else 0)))

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.order)
        for batch in range(len(self)):
            yield order[batch * self.B : (batch + 1) * self.B if batch < len(self) - 1 else None]


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that are complete whenever a run is killed.

    Lightning writes its own in the system's folder for temporary files. That may lie on another disk, so that moving
    the file copies it, which can be interrupted.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write the checkpoint under another name, then rename it."""
        try:
            write_whole(Path(path), lambda file: torch.save(checkpoint, file))
        except RuntimeError as error:  # what torch.save makes of a full disk
            free = shutil.disk_usage(Path(path).parent).free / 1e6
            raise OSError(f"{path} cannot be written, with {free:.1f} MB free there: {error}") from None


def make_criterion(settings: Settings, labels: Tensor, storage: str = "device", path: Path | None = None) -> Criterion:
    """The loss that settings describe, for given labels (N,); ValueError where an option is bad.

    A bank's momentum may be a number, or {epoch: momentum from then on} with an epoch 0. A bank lives in `storage`, and
    where that is "disk" in the file `path`.
    """
    options = dict(settings.loss_options)
    momentum = options.get("momentum")
    if isinstance(momentum, dict):
        valid = all(isinstance(m, float | int) and 0 <= m <= 1 for m in momentum.values())
        if 0 not in momentum or not valid or not all(type(epoch) is int for epoch in momentum):
            raise ValueError(f"momentum: expected {{0: number in [0, 1], later epoch: number, ...}}, got {momentum}")
        options["momentum"] = momentum[0]
    bank = {"dtype": getattr(torch, settings.bank_dtype), "storage": storage, "path": path}
    return make_loss(settings.loss, labels, settings.dim, bank=bank, **options)


def train(
    settings: Settings,
    problem: Problem,
    folder: Path,
    *,
    workers: int = 0,
    accelerator: str = "auto",
    devices: int = 1,
    storage: str = "device",
) -> Training | None:
    """Train a run in its folder, continue it where it was killed, or return it where it is finished.

    Args:
        settings: what the run is.
        problem: the images and labels that the settings describe.
        folder: gets last.ckpt and TensorBoard's event files.
        workers: processes that load images for each device.
        accelerator: as Lightning names it.
        devices: how many. Each trains on its share of a batch with a bank of its own, and all banks get all features.
        storage: where a bank lives: "device", "host", or "disk", the file bank.rows in the folder; see `MemoryBank`.

    Returns:
        The trained run; None in the processes of devices other than the first.

    Raises:
        ValueError: the batch cannot be shared among the devices, or an option of the loss is bad.
    """
    if devices < 1 or workers < 0:
        raise ValueError(f"devices, workers: expected at least 1 and 0, got {devices} and {workers}")
    if accelerator == "gpu" and not torch.accelerator.is_available():
        raise ValueError("accelerator: expected auto or cpu, because no GPU is visible; got gpu")
    if settings.batch_size % devices:
        raise ValueError(f"batch_size: expected a multiple of the {devices} devices, got {settings.batch_size}")
    if storage == "disk" and devices > 1:
        raise ValueError(f"storage: expected device or host for {devices} devices, each of which has a bank; got disk")
    _quiet()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / BANK if storage == "disk" else None
    training = Training(settings, problem, workers, devices, storage, path)
    checkpoint = folder / CHECKPOINT
    trainer = Trainer(
        accelerator=accelerator,
        devices=devices,
        strategy=DDPStrategy(broadcast_buffers=False) if devices > 1 else "auto",
        precision=settings.precision,  # type: ignore[arg-type]
        max_epochs=settings.epochs,
        logger=TensorBoardLogger(folder, name="", version=""),
        callbacks=[
            ModelCheckpoint(folder, checkpoint.stem, save_on_train_epoch_end=True, enable_version_counter=False),
            *([TQDMProgressBar(leave=False)] if sys.stderr.isatty() else []),
        ],
        enable_progress_bar=sys.stderr.isatty(),
        plugins=[WholeCheckpoints()],
        use_distributed_sampler=False,  # training has one, and every rank validates with all images
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        enable_model_summary=False,
        deterministic="warn",
    )
    continued = checkpoint.exists()
    if continued:
        saved = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)
        if saved["problem"] != problem.fingerprint:
            raise ValueError(f"data: the run in {folder} had other images or given labels; give another --output")
        training.first_epoch = len(saved["history"])
    trainer.fit(training, ckpt_path=checkpoint if continued else None, weights_only=True)
    trainer.strategy.barrier()  # a process must not end while Gloo's threads use its tensors
    return training if trainer.is_global_zero else None


def _quiet() -> None:
    """Silence what Lightning says of itself; its warnings about users' mistakes stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")
    warnings.filterwarnings("ignore", "Total length of .* across ranks is zero")
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated")
    warnings.filterwarnings("ignore", ".*(broadcast_buffers|all_gather).* is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", "each of the .* ranks keeps a bank of its own")  # here all see all features
