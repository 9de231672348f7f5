"""NTDNELoss in a LightningModule: the loss, its bank and the epoch are in Lightning's own checkpoints.

    python examples/lightning_module.py runs/lightning            # and again, after it was killed: it goes on

Lines marked "new" are what NTDNELoss adds to an ordinary module. For your own images give `NeighbourhoodModule` your
encoder, and return IndexedDataset(your dataset) from `digits`. Several GPUs share the bank: each keeps a part of it.

Shapes: B images of a batch, N training images, D features.
"""

import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from ntdne_kernels import IndexedDataset, NTDNELoss

D = 64


class NeighbourhoodModule(lightning.LightningModule):
    """An encoder trained by the neighbours of each image in the archive."""

    def __init__(self, encoder: nn.Module, labels: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.labels = labels  # new: of the whole archive
        self.criterion: NTDNELoss | None = None

    def configure_model(self) -> None:
        """Make the criterion where the processes of several GPUs know each other."""
        if self.criterion is None:  # new
            group = distributed.group.WORLD if distributed.is_initialized() else None
            self.criterion = NTDNELoss(self.labels, D, process_group=group)

    def on_train_epoch_start(self) -> None:
        """Say which epoch begins."""
        self.criterion.set_epoch(self.current_epoch)  # new

    def training_step(self, batch: tuple[Tensor, ...]) -> Tensor:
        """The loss of images (B, ...) with their labels (B,) and index (B,)."""
        images, _, index = batch
        features = self.encoder(images)  # (B, D)
        loss = self.criterion(features, index)
        self.criterion.update_bank(features, index)  # new; the loss keeps nothing of the bank for its gradient
        self.log("loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(images))
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Bring the parts of the bank together: Lightning's first process alone writes the file."""
        state = checkpoint["state_dict"]  # new
        state.update({name: part.full_tensor() for name, part in state.items() if isinstance(part, DTensor)})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Of the encoder alone: the criterion has no parameters."""
        return torch.optim.Adam(self.encoder.parameters())


def digits() -> IndexedDataset:
    """Scans of digits and their labels."""
    scans = load_digits()
    images = torch.tensor(scans.images / 16, dtype=torch.float32).unsqueeze(1)  # (N, 1, 8, 8)
    return IndexedDataset(TensorDataset(images, torch.tensor(scans.target)))  # new: samples end with their index


def make_encoder() -> nn.Module:
    """Images (B, 1, 8, 8) to features (B, D)."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten()),
        nn.Linear(1024, D),
    )


def main(folder: Path, epochs: int = 15, devices: int | str = "auto") -> None:
    """Train, from the last checkpoint in the folder where there is one."""
    lightning.seed_everything(0)
    dataset = digits()
    module = NeighbourhoodModule(make_encoder(), dataset.labels)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        devices=devices,
        default_root_dir=folder,
        callbacks=ModelCheckpoint(folder, save_last=True),
        logger=False,
    )
    last = folder / "last.ckpt"
    trainer.fit(
        module,
        DataLoader(dataset, batch_size=128, shuffle=True),
        ckpt_path=last if last.exists() else None,
    )
    if trainer.is_global_zero:
        score = module.criterion.memory.last_log_p.exp().mean()  # of several GPUs over the images of the first
        print(f"mean score {score:.3f} after epoch {trainer.current_epoch}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
