"""Training with a bank that is larger than memory: its rows are in a file, and a killed run goes on where it stopped.

    python examples/disk_bank.py runs/large photos/          # and the same again, after it was killed

trains a ResNet18 on your own images, which lie in a folder for each class. The file runs/large/bank holds a row for
each image: 26 GB for 10^8 images of 128 bfloat16 values. A step reads the whole file, so it wants a fast disk; what
fits into memory is read from there. Checkpoints lie beside it. Without photos/ a small archive is made.

Shapes: B images of a batch, N images, D features.
"""

import argparse
from pathlib import Path

import torch
from _scenes import make_scenes
from torch.utils.data import DataLoader
from torchvision import models
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from ntdne_kernels import IndexedDataset, NTDNELoss
from ntdne_kernels.checkpoint import load_checkpoint, save_checkpoint

D = 128
parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("run", type=Path, help="folder for the bank and the checkpoints")
parser.add_argument("folder", type=Path, nargs="?", help="of class folders; without one a small archive is made")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--image-size", type=int, default=64, help="pixels (64)")
parser.add_argument("--workers", type=int, default=2, help="processes that read images (2)")
arguments = parser.parse_args()

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
size = (arguments.image_size, arguments.image_size)
prepare = v2.Compose(
    [v2.ToImage(), v2.Resize(size), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.25])]
)
dataset = IndexedDataset(ImageFolder(arguments.folder or make_scenes(), prepare))
loader = DataLoader(dataset, batch_size=64, shuffle=True, num_workers=arguments.workers)

torch.manual_seed(0)
encoder = models.resnet18(num_classes=D).to(device)
arguments.run.mkdir(parents=True, exist_ok=True)
# The file of an earlier start, with these labels and this D, is taken up; any other's is refused.
criterion = NTDNELoss(
    dataset.labels,
    D,
    device=device,
    dtype=torch.bfloat16,
    storage="disk",
    path=arguments.run / "bank",
)
optimizer = torch.optim.Adam(encoder.parameters())

# A checkpoint with the criterion holds all rows once more, and the resumed run gives what an uninterrupted one gives.
# If the disk is too small for that, leave it out: the file has the rows as they were when the run was killed.
state = {"encoder": encoder, "criterion": criterion, "optimizer": optimizer}
first_epoch = load_checkpoint(arguments.run / "checkpoints", state)
if first_epoch is None:
    criterion.fill_bank(encoder, loader, resume=arguments.run / "filling")
for epoch in range(first_epoch or 0, arguments.epochs):
    torch.manual_seed(epoch)  # the same batches, whether the run was killed or not
    criterion.set_epoch(epoch)
    encoder.train()
    for images, _, index in loader:
        features, index = encoder(images.to(device)), index.to(device)  # (B, D)
        loss = criterion(features, index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        criterion.update_bank(features, index)
    save_checkpoint(arguments.run / "checkpoints", state, epoch + 1, keep=1)
    print(f"epoch {epoch + 1:2}  mean score {criterion.memory.last_log_p.exp().mean():.4f}", flush=True)
