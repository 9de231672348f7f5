"""The command `python -m benchmarks.frozen`."""

import argparse
import signal
import sys
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import benchmarks.frozen
from benchmarks.aerial.__main__ import count
from benchmarks.frozen.figures import plot
from benchmarks.frozen.losses import COMPARED
from benchmarks.frozen.plan import COLUMNS, STAGES, Scope
from benchmarks.frozen.problem import Source
from benchmarks.frozen.problem import read as read_archive
from benchmarks.frozen.results import Run, append, read_own
from benchmarks.frozen.tables import print_tables
from benchmarks.frozen.training import carry_out

RESULTS = Path(__file__).parent.parent / "results" / "frozen-aid.csv"


def main() -> None:
    """The command; ends with status 2 where something cannot be."""
    arguments = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes end too
    try:
        arguments.command(arguments)
    except (ValueError, OSError) as error:
        print(f"frozen: {error}", file=sys.stderr)
        sys.exit(2)


def run(arguments: argparse.Namespace) -> None:
    """Train what the file lacks."""
    source = Source(arguments.features, arguments.labels)
    archive = read_archive(source).checksum
    columns = [column for column in COLUMNS if column.noise in arguments.noise]
    scope = Scope(arguments.methods, columns, range(arguments.seeds))
    identity = {"archive": archive, "epochs": arguments.epochs, "torch": torch.__version__}
    with get_context("spawn").Pool(arguments.jobs, torch.set_num_threads, (1,)) as pool:
        for stage in arguments.stages:
            for plan in STAGES[stage]:
                rows = read_own(arguments.output, archive, arguments.epochs)
                done = set(rows[list(Run._fields)].itertuples(index=False, name=None))
                runs = [one for one in dict.fromkeys(plan(scope, rows)) if tuple(one) not in done]
                print(f"{stage}: {len(runs)} runs to do", flush=True)
                for i, row in enumerate(pool.imap_unordered(partial(carry_out, source, arguments.epochs), runs), 1):
                    append(arguments.output, identity | row)
                    print(f"{stage} {i}/{len(runs)}: {line(row)}", flush=True)


def line(row: dict[str, Any]) -> str:
    """A row for the screen."""
    name = f"{row['noise']} {row['rate']:g}, seed {row['seed']}, {row['method']}, lr {row['lr']:g}"
    if "failure" in row:
        return f"{name}: {row['failure']}"
    return f"{name}: K-NN {100 * row['knn']:.1f} %, held out {100 * row['held_out']:.1f} %, {row['seconds']:.1f} s"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.frozen",
        description=benchmarks.frozen.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    runs = commands.add_parser("run", help="train what the file of results lacks")
    runs.set_defaults(command=run)
    runs.add_argument("features", type=Path, help=".npy file (N, F)")
    runs.add_argument("labels", type=Path, help=".npy file (N,) of right labels; names for label-dependent noise")
    runs.add_argument("--output", type=Path, required=True, help=".csv file that rows are appended to")
    runs.add_argument("--jobs", type=count, default=1, help="processes of one thread each (1)")
    runs.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE", help="(all)")
    runs.add_argument("--methods", nargs="+", choices=COMPARED, default=list(COMPARED), metavar="NAME", help="(all)")
    noises = sorted({column.noise for column in COLUMNS})
    runs.add_argument("--noise", nargs="+", choices=noises, default=noises, help="(all)")
    runs.add_argument("--seeds", type=count, default=5, help="how many, from 0 (5)")
    runs.add_argument("--epochs", type=count, default=30, help="(30)")
    tables = commands.add_parser("table", help="print the tables of a file of results")
    tables.set_defaults(command=lambda arguments: print_tables(arguments.file))
    tables.add_argument("file", type=Path, nargs="?", default=RESULTS, help="(AID's)")
    plots = commands.add_parser("plot", help="draw K-NN accuracy over the noise rate")
    plots.set_defaults(command=lambda arguments: plot(arguments.file, arguments.figure))
    plots.add_argument("figure", type=Path, help=".png file")
    plots.add_argument("file", type=Path, nargs="?", default=RESULTS, help="(AID's)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
