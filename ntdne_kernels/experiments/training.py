"""Training with Lightning: one run from first weights to last, killed and continued at will.

A run that is killed at any moment continues from the end of its last whole epoch and gives the same numbers as one that
never was: an epoch's batches and augmentations follow from the seed and the epoch alone, and the checkpoint, written
under another name and then renamed, holds encoder, loss (bank and scores included), optimiser, schedule and history.

Shapes: B images of a batch, N training images, D features, C classes.
"""

import logging
import math
import os
import sys
import time
import warnings
from functools import partial
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
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from ntdne_kernels import NTDNELoss, SNCALoss
from ntdne_kernels.experiments.encoders import make_encoder
from ntdne_kernels.experiments.evaluation import knn_accuracy
from ntdne_kernels.experiments.losses import make_loss
from ntdne_kernels.experiments.problem import Problem
from ntdne_kernels.experiments.settings import Settings

CHECKPOINT = "last.ckpt"
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
K = 10


class Training(LightningModule):
    """Encoder and loss of a run, and what is logged of it.

    Attributes:
        encoder: images (B, 3, H, W) to features (B, D).
        criterion: one of the losses.
        history: a row of metrics for each whole epoch.
    """

    train_features: Tensor

    def __init__(self, settings: Settings, problem: Problem, workers: int = 0, devices: int = 1) -> None:
        super().__init__()
        self.settings, self.problem, self.workers = settings, problem, workers
        self.batch_size = settings.batch_size // devices
        self.steps_per_epoch = math.ceil(math.ceil(len(problem.train) / devices) / self.batch_size)
        torch.manual_seed(settings.seed)
        self.encoder = make_encoder(settings.encoder, settings.dim, settings.weights)
        options = dict(settings.loss_options)
        self.bank_momentum = options.get("momentum")
        if isinstance(self.bank_momentum, dict):
            options["momentum"] = self.bank_momentum[0]
        self.criterion = make_loss(settings.loss, problem.noisy.labels, settings.dim, **options)
        self.history: list[dict[str, float]] = []
        self.first_epoch = 0
        # Each image's feature when it was last trained on: what validation searches, at no further pass.
        self.register_buffer("train_features", torch.zeros(len(problem.train), settings.dim), persistent=False)
        self._validation: list[tuple[Tensor, Tensor]] = []

    def train_dataloader(self) -> DataLoader[Any]:
        """Made anew for each epoch (see `train`), all its randomness from the seed and the epoch.

        Nothing here may depend on how often it is asked for or iterated: at the start of a continued run Lightning does
        both twice, once while its epoch still counts as 0.
        """
        dataset = self.problem.dataset(self.problem.train, self.settings.augment)
        seed = 1_000_003 * self.settings.seed
        epoch = max(self.current_epoch, self.first_epoch)
        torch.manual_seed(seed + epoch)  # augmentation, where no worker does it
        order: DistributedSampler[Any] = DistributedSampler(
            dataset, self.trainer.world_size, self.trainer.global_rank, seed=seed
        )
        order.set_epoch(epoch)
        return DataLoader(
            dataset,
            self.batch_size,
            sampler=order,
            num_workers=self.workers,
            worker_init_fn=partial(_seed_worker, seed + epoch),
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # what iterating draws is not drawn from the augmentation's
        )

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.problem.dataset(self.problem.validation), self.batch_size, num_workers=self.workers)

    def configure_optimizers(self) -> Any:
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
            falls = settings.lr_step * self.steps_per_epoch
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: decay ** (step // falls))
        # By step: Lightning takes an epoch's scheduler step after the epoch's checkpoint.
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_epoch_start(self) -> None:
        self.criterion.set_epoch(self.current_epoch)
        if isinstance(self.bank_momentum, dict):
            past = [epoch for epoch in self.bank_momentum if epoch <= self.current_epoch]
            self.criterion.momentum = self.bank_momentum[max(past)]
        self._losses: list[Tensor] = []
        self._epoch_began = time.perf_counter()

    def training_step(self, batch: list[Tensor]) -> dict[str, Tensor]:
        images, _, index = batch
        features = self.encoder(images.contiguous(memory_format=torch.channels_last))
        loss = self.criterion(features, index)
        return {"loss": loss, "features": features.detach(), "index": index}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Update the bank after the optimiser's step: on every rank with features and scores of all, so banks agree."""
        features, index = outputs["features"].float(), outputs["index"]
        if self.trainer.world_size > 1:
            features, index = self._of_all_ranks(features), self._of_all_ranks(index)
            if isinstance(self.criterion, NTDNELoss | SNCALoss):
                memory = self.criterion.memory
                memory.record_(self._of_all_ranks(memory.last_log_p[outputs["index"]]), index)
        self.criterion.update_bank(features, index)
        self.train_features[index] = normalize(features, dim=1)
        self._losses.append(outputs["loss"].detach())

    def _of_all_ranks(self, values: Tensor) -> Tensor:
        gathered: Any = self.all_gather(values)
        return torch.flatten(gathered, 0, 1)

    def validation_step(self, batch: list[Tensor]) -> None:
        images, labels, _ = batch
        features = self.encoder(images.contiguous(memory_format=torch.channels_last)).float()
        self._validation.append((normalize(features, dim=1), labels))

    def on_train_epoch_end(self) -> None:
        row = {"loss": float(torch.stack(self._losses).mean()), "lr": self.trainer.optimizers[0].param_groups[0]["lr"]}
        row |= self._validation_metrics() | self._score_metrics()
        row["seconds"] = time.perf_counter() - self._epoch_began
        self.log_dict(row)
        self.history.append({"epoch": self.current_epoch, **row})
        if self.trainer.is_global_zero:
            self._print_last_row()

    def _print_last_row(self) -> None:
        """A line for each epoch reads as well in a log file as on a terminal."""
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
            return {}  # an archive of tiny classes
        features, labels = (torch.cat(part) for part in zip(*self._validation, strict=True))
        self._validation.clear()
        noisy, true = self.problem.noisy.labels, self.problem.labels[self.problem.train]
        nearest = min(K, len(true))
        return {
            "val_knn": knn_accuracy(features, labels, self.train_features, true.to(labels.device), K=nearest),
            "val_knn_given": knn_accuracy(features, labels, self.train_features, noisy.to(labels.device), K=nearest),
        }

    def _score_metrics(self) -> dict[str, float]:
        """Quantiles of the leave-one-out scores p, the share that is pruned, and AUROC of low p for wrong labels."""
        if not isinstance(self.criterion, NTDNELoss | SNCALoss):
            return {}
        log_p = self.criterion.memory.last_log_p.cpu()
        row = {
            f"p{round(100 * share)}": float(q)
            for share, q in zip(QUANTILES, log_p.exp().quantile(torch.tensor(QUANTILES)), strict=True)
        }
        if isinstance(self.criterion, NTDNELoss):
            row["pruned_share"] = float(self.criterion.pruned.float().mean()) if self.criterion.pruning else 0.0
        flipped = self.problem.noisy.flipped
        if 0 < int(flipped.sum()) < len(flipped):
            row["flip_auroc"] = float(roc_auc_score(flipped, -log_p))
        return row

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["history"] = self.history

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.history = checkpoint["history"]


def _seed_worker(seed: int, worker: int) -> None:
    torch.manual_seed(seed + 1000 * worker)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the checkpoint and renames: whatever moment a run is killed at, the file there is whole.

    Lightning's own goes through the system's folder for temporary files, which may lie on another disk, where a rename
    becomes a copy.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        partial = Path(f"{path}.partial")
        with partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def train(
    settings: Settings,
    problem: Problem,
    folder: Path,
    *,
    workers: int = 0,
    accelerator: str = "auto",
    devices: int = 1,
) -> Training | None:
    """Train a run in its folder, or continue it where it was killed, or return it where it is finished.

    Args:
        folder: gets last.ckpt and TensorBoard's event files.
        workers: processes that load images for each device.
        accelerator, devices: as Lightning names them. On several devices each trains on its share of a batch with a
            bank of its own, and all banks get all features.

    Returns:
        The trained run; None in the processes of devices other than the first.

    Raises:
        ValueError: the batch cannot be shared among the devices, or an option of the loss is bad.
    """
    if settings.batch_size % devices:
        raise ValueError(f"batch_size: expected a multiple of the {devices} devices, got {settings.batch_size}")
    _quiet()
    training = Training(settings, problem, workers, devices)
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
        plugins=[AtomicCheckpointIO()],
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        enable_model_summary=False,
        deterministic="warn",
    )
    continued = checkpoint.exists()
    if continued:
        training.first_epoch = len(torch.load(checkpoint, mmap=True, weights_only=True)["history"])
    trainer.fit(training, ckpt_path=checkpoint if continued else None, weights_only=True)
    return training if trainer.is_global_zero else None


def _quiet() -> None:
    """Leave out what Lightning says of itself; its warnings about users' mistakes stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated")
    warnings.filterwarnings("ignore", ".*(broadcast_buffers|all_gather).* is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", "each of the .* ranks keeps a bank of its own")  # here all see all features
