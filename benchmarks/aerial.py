"""An encoder from random weights, trained on wrong labels by several losses in minutes on one GPU.

python -m benchmarks.aerial ARCHIVE --rate 0.5 --output FILE.csv
python -m benchmarks.aerial ARCHIVE --rate 0.5 --output FILE.csv --methods cross-entropy NTDNE-paper@0.5 --jobs 3

ARCHIVE is what `ntdne train` takes, or a .zip with one such folder of class folders. Split, noise, first weights,
losses (but for two), schedule, augmentation and metrics are those of `ntdne train`. What differs makes it quick: the
images lie on the device as bytes, a batch is augmented there at once, the encoder trains in bfloat16 on a GPU, the last
images of an epoch that fill no batch are left out, and several losses train side by side in processes of their own.

A row for each loss and evaluated epoch is appended to the file at once, so that a run that is killed keeps what it has
found. Started again, the command trains what is not finished, from the beginning.

Shapes: B images of a batch of H × W pixels, N training images, D features, C classes.
"""

import argparse
import csv
import math
import signal
import sys
import time
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import normalize
from torchvision.transforms.v2.functional import rgb_to_grayscale

from ntdne_kernels import NTDNELoss, SNCALoss, functional
from ntdne_kernels.experiments import evaluation
from ntdne_kernels.experiments.encoders import make_encoder
from ntdne_kernels.experiments.losses import BatchLoss, Criterion, TRNSLLoss
from ntdne_kernels.experiments.noise import dataset_of
from ntdne_kernels.experiments.problem import Problem, make_problem
from ntdne_kernels.experiments.settings import Settings, read_preset
from ntdne_kernels.ops.losses import ntdne

NEIGHBOURS = 10  # K of K-NN
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's channels
ENCODED_AT_ONCE = 1024  # images, where nothing is kept for a gradient
PAPER = read_preset("paper")["losses"]
IDENTITY = ["dataset", "encoder", "split", "noise", "rate", "seed", "epochs", "batch_size", "method", "lr"]
RATES = ["knn", "knn_given", "map20_total", "map20_hits", "map20_min", "flip_auroc", "nmi", "acc"]
COLUMNS = [*IDENTITY, "epoch", "loss", "pruned", *RATES, "seconds", "device", "torch"]
Row = dict[str, Any]


# Losses that `ntdne train` has not


class CrossEntropyLoss(BatchLoss):
    """Cross-entropy of a linear classifier."""

    def __init__(self, labels: Tensor, dim: int) -> None:
        super().__init__(labels, dim)
        self.classifier = nn.Linear(dim, self.classes)

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.classifier(features), labels)


class GCELoss(CrossEntropyLoss):
    """Generalised cross-entropy: (1 − s^q)/q of the given class's softmax probability s of a linear classifier.

    Source: Zhang, Sabuncu, "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels",
    NeurIPS 2018, eq. 6, with its q = 0.7.
    """

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        log_s = -F.cross_entropy(self.classifier(features), labels, reduction="none")
        return ntdne(log_s, 0.7, None).mean()


class UnitSlopeNTDNELoss(NTDNELoss):
    """NTDNE in units of its slope at chance, with k="auto" from the first epoch on.

    A new bank's scores are near c, the share of an image's class, and the gradient of NTDNE is SNCA's times p^q.
    Divided by the mean of c^q over the images it begins at SNCA's size, whose learning rate then serves it.
    """

    def __init__(self, labels: Tensor, dim: int, **options: Any) -> None:
        super().__init__(labels, dim, k="auto", warmup_epochs=0, **options)
        share = labels.bincount()[labels] / len(labels)
        self.slope_at_chance = float((share**self.q).mean())

    def forward(self, *given: Any, **named: Any) -> Tensor:
        loss: Tensor = super().forward(*given, **named)
        return loss / self.slope_at_chance


METHODS: dict[str, tuple[type[Criterion], dict[str, Any]]] = {
    "cross-entropy": (CrossEntropyLoss, {}),
    "GCE": (GCELoss, {}),
    "SNCA": (SNCALoss, PAPER["SNCA"]),
    "t-RNSL": (TRNSLLoss, PAPER["t-RNSL"]),
    "NTDNE": (NTDNELoss, {}),  # the defaults of the package
    "NTDNE-unit-slope": (UnitSlopeNTDNELoss, {}),
    "NTDNE-paper": (NTDNELoss, PAPER["NTDNE"]),  # k = 0.3 from epoch 20 on
}


def make_criterion(method: str, labels: Tensor, dim: int, reference: bool = False) -> Criterion:
    """The method's loss; `reference`: those with a bank compute in b×N PyTorch."""
    kind, options = METHODS[method]
    if reference and issubclass(kind, NTDNELoss | SNCALoss):
        options = options | {"fused": False}
    return kind(labels, dim, **options)


# Images


class Images:
    """An archive's images as bytes on a device, (n, H, W, 3)."""

    def __init__(self, images: "np.ndarray[Any, Any]", device: str) -> None:
        self.bytes = torch.from_numpy(np.array(images)).to(device)
        self.mean, self.deviation = (torch.tensor(x, device=device).view(3, 1, 1) for x in (MEAN, DEVIATION))

    def batch(self, index: Tensor, augment: bool) -> Tensor:
        """Images (B, 3, H, W) float32 for the encoder, in its memory format."""
        pixels = self.bytes[index].permute(0, 3, 1, 2) / 255
        if augment:
            pixels = augmented(pixels)
        return ((pixels - self.mean) / self.deviation).contiguous(memory_format=torch.channels_last)


def augmented(pixels: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1], as `archive.transform` augments them: grey, colour jitter, mirrored.

    Each image has draws of its own; the order of the four jitters is drawn for the batch.
    """

    def drawn(low: float, high: float) -> Tensor:
        return torch.empty(len(pixels), 1, 1, 1, device=pixels.device).uniform_(low, high)

    pixels = torch.where(drawn(0, 1) < 0.2, rgb_to_grayscale(pixels, 3), pixels)
    jitters = [(brightness, 0.6, 1.4), (contrast, 0.6, 1.4), (saturation, 0.6, 1.4), (hue, -0.4, 0.4)]
    for i in torch.randperm(len(jitters)).tolist():
        jitter, low, high = jitters[i]
        pixels = jitter(pixels, drawn(low, high))
    return torch.where(drawn(0, 1) < 0.5, pixels.flip(3), pixels)


def brightness(pixels: Tensor, factor: Tensor) -> Tensor:
    return (pixels * factor).clamp(0, 1)


def contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    mean = rgb_to_grayscale(pixels).mean(dim=(1, 2, 3), keepdim=True)
    return torch.lerp(mean, pixels, factor).clamp(0, 1)


def saturation(pixels: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(rgb_to_grayscale(pixels), pixels, factor).clamp(0, 1)


def hue(pixels: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue (of HSV) by a share of the circle."""
    value = pixels.amax(dim=1, keepdim=True)
    chroma = value - pixels.amin(dim=1, keepdim=True)
    red, green, blue = pixels.split(1, dim=1)
    sixths = torch.where(
        value == red,
        green - blue,
        torch.where(value == green, 2 * chroma + blue - red, 4 * chroma + red - green),
    ) / torch.where(chroma > 0, chroma, 1)
    channel = torch.arange(5, 0, -2, device=pixels.device).view(3, 1, 1)
    place = (channel + sixths + 6 * shift) % 6
    return value - chroma * torch.minimum(place, 4 - place).clamp(0, 1)


# Training


class Plan(NamedTuple):
    """What all methods of a command share."""

    settings: Settings
    output: Path
    every: int
    """Epochs between evaluations."""
    device: str
    reference: bool
    cache: Path | None


class Run(NamedTuple):
    method: str
    lr: float


def train(run: Run, plan: Plan) -> str:
    """Train and evaluate one method; "", or why it failed."""
    try:
        problem = make_problem(plan.settings, plan.cache)
        identity = identify(run, plan.settings, problem)
        label = f"{run.method}, lr {run.lr:g}"
        for row in rows(run, plan, problem):
            append(plan.output, identity | row)
            print(
                f"{label}: epoch {row['epoch']}/{plan.settings.epochs}  loss {row['loss']:.4f}  "
                f"K-NN {100 * row['knn']:.1f} %  MAP@20 (hits) {100 * row['map20_hits']:.1f} %  "
                f"{row['seconds']:.1f} s",
                flush=True,
            )
    except Exception as error:  # the other methods go on
        return f"{run.method}, lr {run.lr:g}: {type(error).__name__}: {error}"
    return ""


def identify(run: Run, settings: Settings, problem: Problem) -> Row:
    known = {name: getattr(settings, name) for name in IDENTITY if hasattr(settings, name)}
    return known | {"dataset": dataset_of(problem.archive.classes) or problem.archive.name, **run._asdict()}


def rows(run: Run, plan: Plan, problem: Problem) -> Iterator[Row]:
    """A row for each epoch that is evaluated; the last one is."""
    settings, device = plan.settings, plan.device
    images = Images(problem.archive.images, device)
    train_images, given = problem.train.to(device), problem.noisy.labels.to(device)
    N = len(given)
    B = min(settings.batch_size, N)
    steps = N // B

    torch.manual_seed(settings.seed)
    encoder = make_encoder(settings.encoder, settings.dim, settings.weights).to(device)
    criterion = make_criterion(run.method, problem.noisy.labels, settings.dim, plan.reference).to(device)
    parameters = [*encoder.parameters(), *criterion.parameters()]
    optimizer = torch.optim.SGD(
        parameters, run.lr, settings.momentum, weight_decay=settings.weight_decay, nesterov=True, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, run.lr, total_steps=settings.epochs * steps)

    trained = 0.0
    for epoch in range(settings.epochs):
        began = time.perf_counter()
        criterion.set_epoch(epoch)
        losses = []
        for index in torch.randperm(N, device=device)[: steps * B].split(B):
            pixels = images.batch(train_images[index], augment=True)
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):  # which many CPUs emulate
                features = encoder(pixels).float()
            loss = criterion(features, index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            criterion.update_bank(features, index)
            losses.append(loss.detach())
        mean_loss = float(torch.stack(losses).mean())  # waits for the device
        trained += time.perf_counter() - began
        if not math.isfinite(mean_loss):
            raise ValueError(f"the loss of epoch {epoch + 1} is {mean_loss}: training diverged; try a lower rate")
        last = epoch + 1 == settings.epochs
        if last or (epoch + 1) % plan.every == 0:
            yield {
                "epoch": epoch + 1,
                "loss": mean_loss,
                "pruned": pruned_share(criterion),
                **metrics(encoder, images, problem, settings.seed, plan, last),
                "seconds": trained,
                "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
                "torch": torch.__version__,
            }


def pruned_share(criterion: Criterion) -> float:
    """Of the training images, the share that trains the encoder no more."""
    if isinstance(criterion, TRNSLLoss):
        return criterion.truncated_share
    if isinstance(criterion, NTDNELoss) and criterion.pruning:
        return float(criterion.pruned.float().mean())
    return 0.0


def metrics(encoder: nn.Module, images: Images, problem: Problem, seed: int, plan: Plan, last: bool) -> Row:
    """As `results.evaluate`: test images among the training images, by right labels; clusters of the last epoch alone.

    `knn_given` goes by the training images' given labels; `flip_auroc` is that of low leave-one-out scores for wrong
    labels.
    """

    @torch.no_grad()
    def unit(positions: Tensor) -> Tensor:
        encoder.eval()
        parts = [
            encoder(images.batch(part, augment=False)) for part in positions.to(plan.device).split(ENCODED_AT_ONCE)
        ]
        encoder.train()
        return normalize(torch.cat(parts), dim=1)

    train, test = unit(problem.train), unit(problem.test)
    train_labels, test_labels = (problem.labels[part].to(plan.device) for part in (problem.train, problem.test))
    given, flipped = problem.noisy.labels.to(plan.device), problem.noisy.flipped
    knn = partial(evaluation.knn_accuracy, test, test_labels, train, K=min(NEIGHBOURS, len(train)))
    row = {"knn": knn(database_labels=train_labels), "knn_given": knn(database_labels=given)}
    maps = evaluation.mean_average_precision(test, test_labels, train, train_labels)
    row |= {f"map20_{normaliser}": value for normaliser, value in maps.items()}
    if 0 < int(flipped.sum()) < len(flipped):
        backend = "reference" if plan.reference else None
        everyone = torch.arange(len(train), device=plan.device)
        scores = functional.leave_one_out_log_scores(train, train, given, given, everyone, backend=backend)
        row["flip_auroc"] = float(roc_auc_score(flipped, -scores.cpu()))
    if last:
        row["nmi"], row["acc"] = evaluation.clustering(test, test_labels, seed)
    return row


# The file


def append(path: Path, row: Row) -> None:
    """One line by one write, so that the lines of several processes stay whole."""
    with path.open("a", newline="") as file:
        csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)


def read(path: Path) -> list[Row]:
    """The rows of a file, which is made where there is none; of runs that were begun twice, the later ones.

    Raises:
        ValueError: the file has other columns.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(",".join(COLUMNS) + "\n")
    with path.open(newline="") as file:
        found = csv.DictReader(file)
        if found.fieldnames != COLUMNS:
            raise ValueError(f"output: expected a file that this command has written, but {path} has other columns")
        return list({(*key(row), row["epoch"]): row for row in found}.values())


def key(row: Row) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in IDENTITY)


def table(results: Iterable[Row]) -> None:
    """Markdown of the last epochs, in %."""
    shown = ["method", "lr", "epochs", *RATES]
    print("| " + " | ".join(shown) + " |\n|" + "---|" * len(shown))
    for row in results:
        if row["epoch"] == row["epochs"]:
            percent = [f"{100 * float(row[name]):.1f}" if row[name] else "" for name in RATES]
            print("| " + " | ".join([row["method"], row["lr"], row["epochs"], *percent]) + " |")


@contextmanager
def unpacked(archive: str, cache: Path | None) -> Iterator[tuple[str, Path | None]]:
    """What `make_problem` opens, and its cache; a .zip lies in a temporary folder meanwhile.

    Raises:
        ValueError: the .zip holds something else than one folder.
    """
    if not archive.endswith(".zip"):
        yield archive, cache
        return
    with TemporaryDirectory() as scratch, zipfile.ZipFile(archive) as file:
        tops = {name.partition("/")[0] for name in file.namelist()}
        if len(tops) != 1:
            raise ValueError(f"archive: expected one folder of class folders in {archive}, got {len(tops)} entries")
        file.extractall(Path(scratch, "images"))
        yield str(Path(scratch, "images", *tops)), Path(scratch, "decoded")


def main() -> int:
    arguments = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes and the folder below go too
    try:
        with unpacked(arguments.archive, arguments.cache) as (data, cache):
            names = ("image_size", "split", "noise", "rate", "noise_file", "encoder", "epochs", "batch_size", "seed")
            settings = Settings(data, schedule="one-cycle", **{name: getattr(arguments, name) for name in names})
            plan = Plan(settings, arguments.output, arguments.every, arguments.device, arguments.reference, cache)
            return carry_out(plan, [Run(name, lr or arguments.lr) for name, lr in arguments.methods], arguments.jobs)
    except (ValueError, OSError) as error:
        print(f"aerial: {error}", file=sys.stderr)
        return 2


def carry_out(plan: Plan, runs: list[Run], jobs: int) -> int:
    """Train what the file has not; 1 where a method failed."""
    problem = make_problem(plan.settings, plan.cache)  # decodes the images, for all processes
    finished = {key(row) for row in read(plan.output) if row["epoch"] == row["epochs"]}
    chosen = {key(identify(run, plan.settings, problem)): run for run in runs}
    missing = [run for name, run in chosen.items() if name not in finished]
    print(
        f"{len(problem.train)} training images, {int(problem.noisy.flipped.sum())} of them with a wrong label, "
        f"{len(problem.test)} test images; {len(missing)} of {len(chosen)} runs to do",
        flush=True,
    )
    failures = []
    if missing:
        with get_context("spawn").Pool(min(jobs, len(missing))) as pool:
            failures = list(filter(None, pool.imap_unordered(partial(train, plan=plan), missing)))
    table(row for row in read(plan.output) if key(row) in chosen)
    for failure in failures:
        print(f"aerial: {failure}", file=sys.stderr)
    return 1 if failures else 0


def rate(text: str) -> float:
    found = float(text)
    if not 0 < found < math.inf:
        raise ValueError
    return found


def count(text: str) -> int:
    found = int(text)
    if found < 1:
        raise ValueError
    return found


def method(text: str) -> tuple[str, float | None]:
    """NAME or NAME@LR."""
    name, at, lr = text.partition("@")
    if name not in METHODS:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(METHODS)}, got {name!r}")
    return name, rate(lr) if at else None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.aerial", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("archive", help="as for ntdne train, or a .zip with one folder of class folders")
    parser.add_argument("--output", type=Path, required=True, help=".csv file that rows are appended to")
    parser.add_argument(
        "--methods",
        nargs="+",
        type=method,
        default=[(name, None) for name in METHODS],
        metavar="NAME[@LR]",
        help=f"in this order, with a learning rate of their own if given: {', '.join(METHODS)}; all",
    )
    parser.add_argument("--lr", type=rate, default=0.1, help="learning rate, the highest of one cycle (0.1)")
    parser.add_argument("--epochs", type=int, default=100, help="(100)")
    parser.add_argument("--every", type=count, default=10, metavar="EPOCHS", help="between evaluations (10)")
    parser.add_argument("--batch-size", type=int, default=256, help="(256)")
    parser.add_argument("--encoder", choices=("resnet18", "resnet50", "small"), default="resnet18", help="(resnet18)")
    parser.add_argument("--image-size", type=int, default=64, help="pixels (64)")
    parser.add_argument("--split", choices=("seeded", "authors"), default="seeded", help="(seeded)")
    parser.add_argument("--noise", choices=("none", "uniform", "label-dependent"), default="uniform", help="(uniform)")
    parser.add_argument("--noise-file", default="", help="as for ntdne train")
    parser.add_argument("--rate", type=float, default=0.5, help="of wrong labels (0.5)")
    parser.add_argument("--seed", type=int, default=0, help="of split, noise, first weights and batches (0)")
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if gpu else "cpu")
    parser.add_argument("--jobs", type=count, default=1, help="methods that train side by side (1)")
    parser.add_argument("--reference", action="store_true", help="losses with a bank in b×N PyTorch, without kernels")
    parser.add_argument("--cache", type=Path, help="folder for decoded images (default: in the user's cache folder)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
