"""Training steps with NTDNELoss as CUDA graphs: a batch is one launch, where Python would need longer than the GPU.

    python examples/cuda_graph.py

For your own images copy `GraphedStep` and `train`, and call train(encoder, criterion, loader, epochs) with a loader
of an IndexedDataset. Whatever else belongs to a step (autocast, clip_grad_norm_) goes into `GraphedStep.run`. Without
a GPU the same steps run one by one.

A graph repeats what was launched while it was captured: the same kernels, with the same numbers as arguments, at the
same addresses. Between replays

- these may change, in place: the learning rate, which is a tensor that the schedule writes into; weights; rows, scores
  and labels of the bank, for instance by `fill_bank`, `refresh_indicator` and `load_state_dict`.
- these may change, and the step is captured anew: sigma, q, k, momentum, indicator, reduction, pruning (`set_epoch`),
  the shape of the batch, and by `relabel` the labels, of which the loss's unit is made. A new setting costs two slower
  steps, so change them at most once an epoch.
- everything else must stay, because no change of it is noticed: other numbers (betas, weight decay), what Python
  decides by (frozen layers, train() and eval(), autocast, the float32 precision), and the tensors themselves
  (`optimizer.load_state_dict`, `.to()`, `load_state_dict(assign=True)`). Make a new GraphedStep after such a change.

A step cannot be captured if it has

- anything that waits for the GPU: `validate=True`, `loss.item()`, GradScaler (bfloat16 needs none). Warnings about
  wrong batches come only from steps that are not replayed.
- reduction="none", unless `run` reduces the loss: `backward` starts from one number.
- a bank in host memory or on disk, or one shared by ranks: each step waits for copies, or for the other ranks.
- an update without its CUDA kernel (install with nvcc), or an optimizer that keeps numbers in Python: give it
  `capturable=True`.
- DataParallel or DistributedDataParallel, whose copies and hooks run on their own streams. PyTorch's notes on CUDA
  graphs say what the latter needs.

Shapes: B images of a batch, N training images, D features.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ntdne_kernels import IndexedDataset, NTDNELoss

D = 64


class Captured(NamedTuple):
    """A captured step: its settings, its graph, and the tensors it reads the batch from and writes the loss to."""

    settings: tuple[Any, ...]
    graph: torch.cuda.CUDAGraph
    images: Tensor
    index: Tensor
    loss: Tensor


class GraphedStep:
    """A training step; each call makes one, captured where possible.

    The first batch with new settings runs uncaptured: it compiles kernels and allocates what is kept. The second in a
    row is captured. A smaller last batch of an epoch never comes twice in a row, so it does not replace the graph.
    """

    def __init__(self, encoder: nn.Module, criterion: NTDNELoss, optimizer: torch.optim.Optimizer) -> None:
        self.encoder, self.criterion, self.optimizer = encoder, criterion, optimizer
        device = criterion.memory.device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.captured: Captured | None = None
        self.last_settings: tuple[Any, ...] = ()

    def run(self, images: Tensor, index: Tensor) -> Tensor:
        """The step as in any training loop, for images (B, ...) of the archive with their index (B,)."""
        features = self.encoder(images)  # (B, D)
        loss = self.criterion(features, index)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.criterion.update_bank(features, index)
        return loss.detach()

    def __call__(self, images: Tensor, index: Tensor) -> Tensor:
        """The loss of images (B, ...) with their index (B,); the next call may overwrite it."""
        if self.stream is None:
            return self.run(images, index)
        settings = self.settings(images)
        if self.captured is None or settings != self.captured.settings:
            if settings != self.last_settings:
                self.last_settings = settings
                return self.run_aside(images, index)
            self.captured = None  # frees the old graph's memory before the new one takes its own
            self.captured = self.capture(settings, images, index)
        self.last_settings = settings
        self.captured.images.copy_(images)
        self.captured.index.copy_(index)
        self.captured.graph.replay()
        return self.captured.loss

    def settings(self, images: Tensor) -> tuple[Any, ...]:
        """All that a graph fixes and that may change: shapes, numbers, and where the bank's tensors lie."""
        c, memory = self.criterion, self.criterion.memory
        numbers = (c.sigma, c.q, c.k, c.unit_slope, c.momentum, c.indicator, c.reduction, c.pruning)
        tensors = (memory.storage, *memory.archive, *memory.label_index.layout)  # some are new after relabel
        return (images.shape, images.dtype, *numbers, memory.class_sizes, *((x.data_ptr(), x.shape) for x in tensors))

    def run_aside(self, images: Tensor, index: Tensor) -> Tensor:
        """An uncaptured step, on the capturing stream: autograd keeps to the stream where it first saw a weight."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            loss = self.run(images, index)
        torch.cuda.current_stream().wait_stream(self.stream)
        return loss

    def capture(self, settings: tuple[Any, ...], images: Tensor, index: Tensor) -> Captured:
        """Record a step; nothing is computed before the replay."""
        images, index, graph = images.clone(), index.clone(), torch.cuda.CUDAGraph()
        # Other threads may do what a capture forbids: the loader pins memory meanwhile.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            loss = self.run(images, index)
        return Captured(settings, graph, images, index, loss)


def train(encoder: nn.Module, criterion: NTDNELoss, loader: DataLoader[tuple[Tensor, ...]], epochs: int) -> list[float]:
    """Train, and return the mean loss of each epoch."""
    device = criterion.memory.device
    optimizer = torch.optim.Adam(
        encoder.parameters(),
        lr=torch.tensor(1e-3, device=device),  # a number would be fixed by the first capture
        capturable=device.type == "cuda",
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    step = GraphedStep(encoder.train(), criterion, optimizer)
    losses = []
    for epoch in range(epochs):
        criterion.set_epoch(epoch)
        criterion.sigma = 0.2 if epoch < epochs / 2 else 0.1
        total, count = torch.zeros((), device=device), 0
        for images, _, index in loader:
            total += len(images) * step(images.to(device), index.to(device))
            count += len(images)
        schedule.step()
        losses.append(float(total) / count)
    return losses


def main(epochs: int = 10) -> None:
    """Train on scans of digits."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)  # (N, 1, 8, 8)
    dataset = IndexedDataset(TensorDataset(images, torch.tensor(digits.target)))
    encoder = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten()),
        nn.Linear(1024, D),
    ).to(device)
    criterion = NTDNELoss(dataset.labels, D).to(device)
    losses = train(encoder, criterion, DataLoader(dataset, batch_size=128, shuffle=True), epochs)
    print(*(f"epoch {epoch:2}  loss {loss:.3f}" for epoch, loss in enumerate(losses, 1)), sep="\n")
    print(f"mean score {criterion.memory.last_log_p.exp().mean():.3f}")


if __name__ == "__main__":
    main()
