"""The command `python -m benchmarks.aerial`."""

import argparse
import math
import signal
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import benchmarks.aerial
from benchmarks.aerial.losses import METHODS
from benchmarks.aerial.results import key, read, table
from benchmarks.aerial.training import Plan, Run, identify, train
from ntdne_kernels.experiments.problem import make_problem
from ntdne_kernels.experiments.settings import Settings


@contextmanager
def unpacked(archive: str, cache: Path | None) -> Iterator[tuple[str, Path | None]]:
    """What `make_problem` opens, and its cache. A .zip is unpacked into a temporary folder for that time.

    Raises:
        ValueError: The .zip holds something other than one folder.
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
    """The command; returns its exit status."""
    arguments = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that processes and folder are cleaned up
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
    """Train what the file lacks, and print all of it. Returns 1 where a method failed, else 0."""
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
    """A positive number of the command line."""
    found = float(text)
    if not 0 < found < math.inf:
        raise ValueError
    return found


def count(text: str) -> int:
    """A positive integer of the command line."""
    found = int(text)
    if found < 1:
        raise ValueError
    return found


def method(text: str) -> tuple[str, float | None]:
    """NAME or NAME@LR of the command line."""
    name, at, lr = text.partition("@")
    if name not in METHODS:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(METHODS)}, got {name!r}")
    return name, rate(lr) if at else None


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.aerial",
        description=benchmarks.aerial.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
