"""NTDNELoss on several processes: the bank is shared between them, and a killed run goes on where it stopped.

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    torchrun --standalone --nproc-per-node 2 --max-restarts 3 examples/train_distributed.py runs/digits-2

An ordinary DistributedDataParallel loop on scans of digits of which 30 % have a wrong label; lines marked "new" are
what NTDNELoss adds. For your own images put your dataset, of (image, label), in the place of the TensorDataset. If a
process is killed, torchrun starts all of them again and they continue from the newest checkpoint; so does the same
command given again, with any number of processes. Without the variable the restarted processes find the addresses of
the old ones and cannot connect (torch 2.11 and 2.14 with Gloo).

Shapes: W processes, B images in the batch of each, N training images, D features.
"""

import argparse
import os
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from ntdne_kernels import IndexedDataset, NTDNELoss
from ntdne_kernels.checkpoint import load_checkpoint, save_checkpoint

D = 64
parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("checkpoints", type=Path, help="folder for checkpoints, which all processes see")
parser.add_argument("--epochs", type=int, default=15)
arguments = parser.parse_args()

on_gpu = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
if on_gpu:
    torch.cuda.set_device(device)
distributed.init_process_group("nccl" if on_gpu else "gloo")  # torchrun has told each process who it is

digits = load_digits()
train_images, test_images, true_labels, test_labels = train_test_split(
    torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1),  # (N + M, 1, 8, 8)
    torch.tensor(digits.target),
    test_size=0.2,
    random_state=0,
)
source = torch.Generator().manual_seed(0)  # the same wrong labels on all processes
flipped = torch.rand(len(true_labels), generator=source) < 0.3
shift = torch.randint(1, 10, true_labels.shape, generator=source)
train_labels = torch.where(flipped, (true_labels + shift) % 10, true_labels)

dataset = IndexedDataset(TensorDataset(train_images, train_labels))  # new: samples end with their index
sampler = DistributedSampler(dataset)
loader = DataLoader(dataset, batch_size=128 // distributed.get_world_size(), sampler=sampler)

torch.manual_seed(0)
encoder = DistributedDataParallel(
    nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten()),
        nn.Linear(1024, D),
    ).to(device)
)
# new: each process keeps N/W rows of the bank
criterion = NTDNELoss(dataset.labels, D, device=device, process_group=distributed.group.WORLD)
optimizer = torch.optim.Adam(encoder.parameters())

state = {"encoder": encoder, "criterion": criterion, "optimizer": optimizer}
first_epoch = load_checkpoint(arguments.checkpoints, state) or 0
for epoch in range(first_epoch, arguments.epochs):
    sampler.set_epoch(epoch)
    criterion.set_epoch(epoch)  # new
    encoder.train()
    for images, _, index in loader:
        outputs, index = encoder(images.to(device)), index.to(device)  # (B, D)
        loss = criterion(outputs, index)  # mean over the batch of all processes, against the whole archive
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        criterion.update_bank(outputs, index)  # new
    save_checkpoint(arguments.checkpoints, state, epoch + 1)
    if distributed.get_rank() == 0:
        print(f"epoch {epoch + 1:2}  loss of the last batch {loss.item():.3f}", flush=True)

bank = criterion.memory.rows(torch.arange(len(dataset), device=device)).cpu()  # all processes make all calls
if distributed.get_rank() == 0:
    encoder.eval()
    with torch.no_grad():
        features = nn.functional.normalize(encoder.module(test_images.to(device)), dim=1).cpu()
    classifier = KNeighborsClassifier(10).fit(bank, train_labels)
    print(f"test accuracy {classifier.score(features, test_labels):.1%}")
# Gloo's threads release their tensors some time after a call has returned, and need the interpreter for that. Python
# aborts if it happens while it shuts down, so wait until they have nothing left to release.
distributed.barrier()
distributed.destroy_process_group()
