"""Time training steps on a CPU whose images come from a DataLoader with two workers.

python -m benchmarks.loader_step [--against CHECKOUT]

A step takes the next batch, trains ResNet18 on images of 64×64 in float32 by one of the losses of `benchmarks.steps`,
and updates the bank (float32). The workers cut these images out of made ones of 512×512 bytes: turned by any angle, a
random part of them, flipped, in other colours. That is some 20 ms an image, so two workers have about as much to do as
a step beside them. The loss alone, forward and backward, is timed within the step; what a step waits for its batch, and
what the workers compute in that time, is measured too.

The losses take steps in turns, on batches of one DataLoader. Each package is measured in processes of its own, and with
--against the packages take turns. Rows go into benchmarks/results/loader-step.csv.

Shapes: B images of a batch, N bank rows, D features, C classes.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2

from benchmarks import machine, problems, rows, steps
from benchmarks.checkout import ROOT, program, version
from benchmarks.markdown import duration, print_head, print_row
from benchmarks.timing import quantiles

D, C = 128, 45
WORKERS = 2
MADE, SIDE = 64, 512
"""Images, which stand for all N: what an augmentation takes does not depend on them."""
TIMES = ("step", "loss", "waiting", "workers")
"""Seconds of a step: in all, of the loss in it, until its batch is there, of the workers' processor time."""
Times = dict[str, dict[str, list[float]]]
"""By provider and the names above."""
HEAD = ["N", "loss", "package", "step", "20 to 80 %", "loss alone", "20 to 80 %", "waits", "workers compute"]


class Images(Dataset[tuple[Tensor, int]]):
    """N made images, augmented, with their index."""

    def __init__(self, N: int) -> None:
        self.length = N
        self.images = torch.randint(256, (MADE, 3, SIDE, SIDE), dtype=torch.uint8)
        self.augment = v2.Compose([
            v2.RandomRotation(180, InterpolationMode.BILINEAR),
            v2.RandomResizedCrop(steps.PIXELS["cpu"], antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.4, 0.4, 0.4, 0.1),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.25] * 3),
        ])  # fmt: skip

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.augment(self.images[index % MADE]), index


def measure(checkouts: list[Path], sizes: list[int], B: int, rounds: int, count: int, path: Path) -> None:
    """Measure each package for each N, print a table, and write the rows.

    Args:
        checkouts: Of the packages.
        sizes: Values of N.
        B: Images of a batch.
        rounds: Processes of each package and N.
        count: Steps of each loss in a process.
        path: Of the file, which is written anew.
    """
    names = [version(checkout) for checkout in checkouts]
    here = machine.describe("cpu")
    here = {column: here[column] for column in ("machine", "torch", "python")}
    found: list[dict[str, Any]] = []
    print_head(HEAD)
    for N in sizes:
        of_packages: list[Times] = [{name: {time: [] for time in TIMES} for name in steps.OBJECTIVES} for _ in names]
        for turn in range(rounds):
            for place in [(place + turn) % len(names) for place in range(len(names))]:
                for provider, times in run(checkouts[place], N, B, count).items():
                    for which, seconds in times.items():
                        of_packages[place][provider][which] += seconds
        stamp = {"measured": datetime.datetime.now().isoformat(timespec="seconds")}
        for provider in steps.OBJECTIVES:
            for name, of_package in zip(names, of_packages, strict=True):
                case = {"N": N, "B": B, "D": D, "C": C, "workers": WORKERS, "provider": provider, "package": name}
                found.append(case | summary(of_package[provider]) | here | stamp)
                print_line(found[-1])
        path.parent.mkdir(parents=True, exist_ok=True)
        rows.replace(pd.DataFrame(found), path)


def run(checkout: Path, N: int, B: int, count: int) -> Times:
    """The times of a process with the package of a checkout.

    Raises:
        SystemExit: The process failed; it has said why.
    """
    serve = f"from benchmarks import loader_step; loader_step.serve({N}, {B}, {count})"
    ended = subprocess.run(program(checkout, serve), cwd=checkout, stdout=subprocess.PIPE, text=True)
    if ended.returncode:
        raise SystemExit(f"{checkout}: the process that measures it failed")
    found: Times = json.loads(ended.stdout.splitlines()[-1])
    return found


def summary(times: dict[str, list[float]]) -> dict[str, float]:
    """The columns of a row: quantiles of what was timed."""
    found: dict[str, float] = {"steps": len(times["step"])}
    for which, seconds in times.items():
        found |= {f"{which}_{q}": value for q, value in zip((20, 50, 80), quantiles(seconds), strict=True)}
    return found


def print_table(path: Path) -> None:
    """What a file holds."""
    print_head(HEAD)
    for row in pd.read_csv(path).to_dict("records"):
        print_line({str(column): value for column, value in row.items()})


def print_line(row: dict[str, Any]) -> None:
    """A row in Markdown, with medians."""
    cells = [f"{row['N']:,}", row["provider"], row["package"]]
    for which in ("step", "loss"):
        cells += [duration(row[f"{which}_50"]), f"{duration(row[f'{which}_20'])} to {duration(row[f'{which}_80'])}"]
    print_row([*cells, duration(row["waiting_50"]), duration(row["workers_50"])])


def serve(N: int, B: int, count: int) -> None:
    """Print the times of this process's package as JSON, in one line."""
    print(json.dumps(times_of_steps(N, B, count)))


def times_of_steps(N: int, B: int, count: int) -> Times:
    """So many steps of each loss, in turns, after one of each that is not timed."""
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(Images(N), B, shuffle=True, generator=generator, num_workers=WORKERS, drop_last=True)
    batches = iter(loader)  # the workers are forked before the bank is there: its pages are then never shared
    problem = problems.make(B, N, D, C, torch.float32)
    objectives = {name: objective(problem) for name, objective in steps.OBJECTIVES.items()}
    learners = {name: steps.learner(objective.outputs, "cpu") for name, objective in objectives.items()}
    found: Times = {name: {which: [] for which in TIMES} for name in objectives}
    for turn in range(1 + count):
        for name in [*objectives][turn % len(objectives) :] + [*objectives][: turn % len(objectives)]:
            times = step(batches, objectives[name], *learners[name])
            for which, seconds in times.items() if turn else ():
                found[name][which].append(seconds)
    return found


def step(
    batches: Iterator[tuple[Tensor, Tensor]],
    objective: steps.Objective,
    encoder: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> dict[str, float]:
    """Train on the next batch. The loss's own backward pass ends at the features, and the encoder's begins there."""
    start, of_workers = time.perf_counter(), processor_seconds()
    images, index = next(batches)
    ready = time.perf_counter()
    optimizer.zero_grad()
    outputs = encoder(images.to(memory_format=torch.channels_last))
    features = outputs.detach().requires_grad_()
    begun = time.perf_counter()
    objective.loss(features, index).backward()
    ended = time.perf_counter()
    outputs.backward(features.grad)
    optimizer.step()
    objective.after(features.detach(), index)
    whole, by_workers = time.perf_counter() - start, processor_seconds() - of_workers
    return {"step": whole, "loss": ended - begun, "waiting": ready - start, "workers": by_workers}


def processor_seconds() -> float:
    """Of all workers so far, as Linux counts them."""
    total = 0
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loader_step", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another checkout, to measure in turns with")
    parser.add_argument("--N", nargs="+", type=int, default=[10**5, 10**6], metavar="N", help="bank rows")
    parser.add_argument("--B", type=int, default=256, metavar="B", help="images of a batch")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each package and N")
    parser.add_argument("--steps", type=int, default=3, help="of each loss in a process")
    parser.add_argument("--file", type=Path, default=ROOT / "benchmarks" / "results" / "loader-step.csv")
    parser.add_argument("--table", action="store_true", help="measure nothing, print what the file holds")
    arguments = parser.parse_args()
    if arguments.table:
        print_table(arguments.file)
        return
    checkouts = [ROOT, *([arguments.against.resolve()] if arguments.against is not None else [])]
    measure(checkouts, arguments.N, arguments.B, arguments.rounds, arguments.steps, arguments.file)


if __name__ == "__main__":
    main()
