"""Time and memory of an epoch in which a head is trained on many features, measured in part.

python -m benchmarks.head --rows 1000000 --steps 60

Features are made in a file, float16, and removed after. The steps are those of `ntdne train features.npy --bank-dtype
bfloat16`, by its own dataset, head, loss, optimiser and bank, against the bank of all rows. What is printed, and added
to benchmarks/results/head.csv: seconds of a step (median, and 20 and 80 % quantiles), those of the loss alone (its
forward, which makes the gradient too), the seconds that all threads together computed in a step, the epoch that
follows (steps of an epoch × median, so it was not run) by the clock and by these, the seconds of the pass over the file
that centres the features, the peak of the process's memory, what mapped files have of it at the end, and the load of
the machine before and after. Beside other work a step waits for the slowest thread, and threads compute while they
wait: OMP_NUM_THREADS=1 then says more.

Shapes: N rows, F values, D values of the head, B rows of a step.
"""

import argparse
import csv
import datetime
import os
import re
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from benchmarks.machine import describe
from ntdne_kernels.experiments import noise
from ntdne_kernels.experiments.problem import Problem, make_problem
from ntdne_kernels.experiments.settings import Settings, read_preset
from ntdne_kernels.experiments.training import Batches, Training

RESULTS = Path(__file__).parent / "results" / "head.csv"
CLASSES = 45
MADE_AT_A_TIME = 10_000


def write_features(folder: Path, N: int, F: int) -> Path:
    """features.npy, (N, F) float16 around a centre for each class, with labels.npy beside it."""
    source = np.random.default_rng(0)
    centres = source.standard_normal((CLASSES, F), np.float32)
    labels = source.integers(CLASSES, size=N)
    path = folder / "features.npy"
    features = np.lib.format.open_memmap(path, "w+", np.float16, (N, F))
    for start in range(0, N, MADE_AT_A_TIME):
        chunk = labels[start : start + MADE_AT_A_TIME]
        features[start : start + len(chunk)] = centres[chunk] + source.standard_normal((len(chunk), F), np.float32)
    features.flush()
    np.save(folder / "labels.npy", labels)
    return path


def with_all_rows(problem: Problem) -> Problem:
    """The problem with all rows for training, wrong labels and all: a split would leave 30 % of them out."""
    every = torch.arange(len(problem.labels))
    given = noise.corrupt(problem.labels, problem.noisy.matrix, 0)
    return replace(problem, train=every, noisy=given)


def measure(settings: Settings, steps: int, unmeasured: int = 3) -> dict[str, Any]:
    """What the module says, of some steps."""
    load_before = os.getloadavg()[0]
    start = time.perf_counter()
    problem = with_all_rows(make_problem(settings))
    centring = time.perf_counter() - start
    training = Training(settings, problem)
    training.encoder.train()
    [optimizer] = [training.configure_optimizers()["optimizer"]]
    dataset = problem.dataset(problem.train, augment_by=0 if settings.augment else None)
    order = torch.randperm(len(problem.train), generator=torch.Generator().manual_seed(0)).tolist()
    batches = Batches(order, settings.batch_size)  # type: ignore[arg-type]
    loader = iter(DataLoader(dataset, batch_sampler=batches, collate_fn=dataset.collate))
    training.criterion.set_epoch(0)
    seconds, of_loss, of_processor = [], [], []
    for step in range(unmeasured + steps):
        began, processor = time.perf_counter(), time.process_time()
        features, _, index = next(loader)
        encoded = training.encoder(features)
        loss_began = time.perf_counter()
        loss = training.criterion(encoded, index)
        loss_ended = time.perf_counter()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        training.criterion.update_bank(encoded.detach(), index)
        if step >= unmeasured:
            seconds.append(time.perf_counter() - began)
            of_loss.append(loss_ended - loss_began)
            of_processor.append(time.process_time() - processor)
    quantiles = statistics.quantiles(seconds, n=5)
    in_epoch = len(batches)
    status = Path("/proc/self/status").read_text()
    memory = {key: int(kb) * 1024 for key, kb in re.findall(r"(\w+):\s+(\d+) kB", status)}
    return {
        "rows": len(problem.train),
        "values": problem.archive.images.shape[1],
        "dim": settings.dim,
        "batch": settings.batch_size,
        "bank": settings.bank_dtype,
        "steps": steps,
        "step_20": quantiles[0],
        "step_50": statistics.median(seconds),
        "step_80": quantiles[3],
        "loss_50": statistics.median(of_loss),
        "processor_50": statistics.median(of_processor),
        "centring": centring,
        "epoch_minutes": in_epoch * statistics.median(seconds) / 60,
        "processor_minutes": in_epoch * statistics.median(of_processor) / 60,
        "peak_gb": memory["VmHWM"] / 1e9,
        "file_gb": memory["RssFile"] / 1e9,
        "load_before": load_before,
        "load_after": os.getloadavg()[0],
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, metavar="N")
    parser.add_argument("--values", type=int, default=768, metavar="F")
    parser.add_argument("--batch", type=int, default=256, metavar="B")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (the system's folder for temporary files)")
    parser.add_argument("--file", type=Path, default=RESULTS, help="that the row is added to")
    arguments = parser.parse_args()
    preset = read_preset("features")
    preset.pop("losses")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = write_features(Path(folder), arguments.rows, arguments.values)
        values = {"batch_size": arguments.batch, "bank_dtype": "bfloat16", "data": str(path)}
        row = measure(Settings(**preset | values), arguments.steps)
    described = describe("cpu")
    row |= {name: described[name] for name in ("machine", "torch")} | {"measured": datetime.date.today().isoformat()}
    for name, value in row.items():
        print(f"{name:15} {f'{value:.4g}' if isinstance(value, float) else value}")
    new = not arguments.file.exists()
    with arguments.file.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow({name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()})


if __name__ == "__main__":
    main()
