"""A small head trained on frozen features, with wrong labels among them, and a list of the labels that are wrong.

    python examples/frozen_features.py features.npy labels.npy runs/head

takes features of your own images, (N, F) floats from any network, and their labels, (N,) integers (-1 for none) or
names. The features are read from the file batch by batch and may be larger than memory. runs/head then holds the head
(head.pt), its features of the images (embeddings.npy), in which those of a class are neighbours, and suspects.csv, all
images with the most suspicious first. Without files it takes scans of digits, of which 30 % get a wrong label.

Shapes: B images of a batch, N images, F features that come in, D that go out.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ntdne_kernels import IndexedDataset, NTDNELoss, encode_labels
from ntdne_kernels.audit import audit_bank
from ntdne_kernels.interchange import to_frame

D = 128


class Features(Dataset[tuple[Tensor, int]]):
    """Rows of an array that is not in memory as a whole, and their labels."""

    def __init__(self, features: np.ndarray, targets: Tensor) -> None:
        self.features, self.targets = features, targets

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return torch.tensor(self.features[i], dtype=torch.float32), int(self.targets[i])


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Pixels (N, 64) of scans, and labels (N,) of which 30 % are wrong."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    source = np.random.default_rng(0)
    shift = source.integers(1, 10, len(scans.target)) * (source.random(len(scans.target)) < 0.3)
    return scans.data.astype(np.float32) / 16, (scans.target + shift) % 10


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("features", type=Path, nargs="?", help=".npy file (N, F)")
parser.add_argument("labels", type=Path, nargs="?", help=".npy file (N,)")
parser.add_argument("output", type=Path, nargs="?", default=Path("runs/head"), help="folder (runs/head)")
parser.add_argument("--epochs", type=int, default=30)
arguments = parser.parse_args()

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if arguments.features is None:
    features, given = digits()
elif arguments.labels is None:
    parser.error("labels: expected the .npy file that belongs to the features")
else:
    features, given = np.load(arguments.features, mmap_mode="r"), np.load(arguments.labels)
labels, classes = encode_labels(given)
dataset = IndexedDataset(Features(features, labels))
loader = DataLoader(dataset, batch_size=256, shuffle=True, drop_last=len(dataset) > 256)  # a batch of 1 has no variance

torch.manual_seed(0)
head = nn.Sequential(
    *(nn.Linear(features.shape[1], 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Dropout(0.2), nn.Linear(512, D)),
).to(device)
criterion = NTDNELoss(dataset.labels, D, device=device)
optimizer = torch.optim.AdamW(head.parameters(), 1e-3)  # or SGD with cross-entropy's learning rate
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.epochs)
for epoch in range(arguments.epochs):
    criterion.set_epoch(epoch)
    for rows, _, index in loader:
        embeddings, index = head(rows.to(device)), index.to(device)  # (B, D)
        loss = criterion(embeddings, index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        criterion.update_bank(embeddings, index)
    schedule.step()
    print(f"epoch {epoch + 1:2}  loss {loss.item():.3f}  {int(criterion.pruned.sum())} of {len(dataset)} images pruned")

criterion.fill_bank(head, DataLoader(dataset, batch_size=1024))  # the embeddings as the trained head gives them
audit = audit_bank(criterion.memory, sigma=criterion.sigma, classes=classes)
arguments.output.mkdir(parents=True, exist_ok=True)
torch.save(head.state_dict(), arguments.output / "head.pt")
everyone = torch.arange(len(dataset), device=device)
np.save(arguments.output / "embeddings.npy", criterion.memory.rows(everyone).cpu().numpy())
to_frame(audit).sort_values("rank").to_csv(arguments.output / "suspects.csv", index_label="image")
print(audit.doubt or f"about {audit.noise_rate:.1%} of the labels are wrong", f"(see {arguments.output}/suspects.csv)")
