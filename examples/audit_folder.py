"""Which images of an archive carry a wrong label? Nothing is trained: a pretrained encoder looks at each image once.

    python examples/audit_folder.py photos/

ranks your own images, which lie in a folder for each class (photos/oak/1.jpg, photos/ash/7.jpg), prints the most
suspicious with the class that they should probably be in, and writes all of them to suspects.csv. The images are only
read. The encoder's weights are downloaded once; `--weights` takes a file instead. For a network of your own change
`make_encoder` and D: any network will do that gives D numbers for an image.

Shapes: N images, D features.
"""

import argparse
from pathlib import Path

import torch
from _scenes import make_scenes
from torch import nn
from torch.utils.data import DataLoader
from torchvision import models
from torchvision.datasets import ImageFolder

from ntdne_kernels import IndexedDataset, MemoryBank, fill_bank
from ntdne_kernels.audit import audit_bank
from ntdne_kernels.interchange import to_frame

D = 512


def make_encoder(weights: str) -> nn.Module:
    """ResNet18 without its last layer: images (b, 3, H, W) to features (b, D)."""
    encoder = models.resnet18(weights="DEFAULT" if weights == "imagenet" else None)
    if weights not in ("imagenet", "random"):
        encoder.load_state_dict(torch.load(weights, weights_only=True))
    encoder.fc = nn.Identity()
    return encoder


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("folder", type=Path, nargs="?", help="of class folders; without one a small archive is made")
parser.add_argument("--weights", default="imagenet", help="imagenet (downloaded once), random, or a ResNet18's file")
parser.add_argument("--output", type=Path, default=Path("suspects.csv"))
parser.add_argument("--show", type=int, default=20, help="images to print (20)")
parser.add_argument("--workers", type=int, default=2, help="processes that read images (2)")
arguments = parser.parse_args()

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
files = ImageFolder(arguments.folder or make_scenes(), models.ResNet18_Weights.DEFAULT.transforms())
dataset = IndexedDataset(files)  # samples end with their index; `labels` are those of the folders
loader = DataLoader(dataset, batch_size=64, num_workers=arguments.workers)

torch.manual_seed(0)
bank = MemoryBank(dataset.labels, D, device=device)
fill_bank(bank, make_encoder(arguments.weights).to(device), loader)
audit = audit_bank(bank, classes=files.classes)

frame = to_frame(audit, paths=[path for path, _ in files.samples]).sort_values("rank")
frame.to_csv(arguments.output, index=False)
print(f"{audit}; all of them, the worst first, are in {arguments.output}")
if audit.doubt:
    print(f"how many labels are wrong these features cannot say, look at the worst first: {audit.doubt}")
else:
    print(f"about {audit.noise_rate:.1%} of the labels are wrong")
print("\nquality  label -> should be (its share)")
for row in frame.head(arguments.show).itertuples():
    print(f"{row.label_score:7.3f}  {row.given_label} -> {row.predicted_label} ({row.suggested_share:.0%})  {row.path}")
