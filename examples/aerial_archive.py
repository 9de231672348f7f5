"""An encoder trained on an archive of aerial scenes some of whose labels are wrong, and a list of these labels.

    python examples/aerial_archive.py AID/ runs/aid

trains a ResNet18 from random weights on your own scenes, which lie in a folder for each class (AID/Airport/1.jpg), and
writes encoder.pt and suspects.csv, all images with the most suspicious first, to runs/aid. Without a folder a small
archive is made.

Scenes of many bands or of 16 bits are not for torchvision's ImageFolder: `ntdne train` reads them.

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
from ntdne_kernels.audit import audit_bank
from ntdne_kernels.interchange import to_frame

D = 128
parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("archive", type=Path, nargs="?", help="folder of class folders; without one a small one is made")
parser.add_argument("output", type=Path, nargs="?", default=Path("runs/aerial"), help="folder (runs/aerial)")
parser.add_argument("--epochs", type=int, default=12)
parser.add_argument("--batch-size", type=int, default=256)
parser.add_argument("--image-size", type=int, default=64, help="pixels (64)")
parser.add_argument("--workers", type=int, default=2, help="processes that read images (2)")
arguments = parser.parse_args()

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
archive = arguments.archive or make_scenes()
size = (arguments.image_size, arguments.image_size)
plain = [v2.ToImage(), v2.Resize(size), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.25])]
turned = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()]  # a scene from above has no upper side
files = ImageFolder(archive, v2.Compose(plain))
dataset = IndexedDataset(ImageFolder(archive, v2.Compose(turned + plain)))
loader = DataLoader(dataset, arguments.batch_size, shuffle=True, num_workers=arguments.workers)
whole = DataLoader(IndexedDataset(files), arguments.batch_size, num_workers=arguments.workers)  # the same order

torch.manual_seed(0)
encoder = models.resnet18(num_classes=D).to(device)
criterion = NTDNELoss(dataset.labels, D, device=device)
optimizer = torch.optim.SGD(encoder.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, epochs=arguments.epochs, steps_per_epoch=len(loader))
for epoch in range(arguments.epochs):
    criterion.set_epoch(epoch)
    encoder.train()
    for images, _, index in loader:
        features, index = encoder(images.to(device)), index.to(device)  # (B, D)
        loss = criterion(features, index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        criterion.update_bank(features, index)
    score, pruned = criterion.memory.last_log_p.exp().median(), int(criterion.pruned.sum())
    print(f"epoch {epoch + 1:2}  median score {score:.3f}  {pruned} of {len(dataset)} images pruned", flush=True)

criterion.fill_bank(encoder, whole)  # a row for each image as the trained encoder sees it
audit = audit_bank(criterion.memory, sigma=criterion.sigma, classes=files.classes)
frame = to_frame(audit, paths=[path for path, _ in files.samples]).sort_values("rank")
arguments.output.mkdir(parents=True, exist_ok=True)
torch.save(encoder.state_dict(), arguments.output / "encoder.pt")
frame.to_csv(arguments.output / "suspects.csv", index=False)
print(f"how many labels are wrong: {audit.doubt or format(audit.noise_rate, '.1%')}")
print(*(f"{row.given_label} -> {row.predicted_label}: {row.path}" for row in frame.head(10).itertuples()), sep="\n")
