"""Measure the loss on this machine: ours, plain PyTorch's, and what others compute of it.

python -m benchmarks measure     into benchmarks/results/<machine>.csv; goes on where it stopped
python -m benchmarks table       Markdown of what has been measured
python -m benchmarks targets     which of the speeds aimed at on a GPU, or on a CPU, are reached
python -m benchmarks plot        figures, into docs/
python -m benchmarks merge       rows measured elsewhere (--rows), into the results of the machine they are of
python -m benchmarks host        what the host does for a step on a GPU, whether or not one is here

Without options, measure goes through the whole grid (benchmarks/grid.py), the cases that matter most first. That takes
hours on a GPU and days on a CPU. It can be stopped at any time.
"""

import argparse
import re
import resource
from pathlib import Path

import torch

from benchmarks import figures, grid, host, host_worker, machine, measure, memory, rows, tables, targets
from benchmarks.contract import DTYPES


def main() -> None:
    """The command."""
    arguments = parse()
    if arguments.command == "host":
        path = arguments.file or named_after(f"host-{host_worker.machine()}")
        sizes = arguments.B or host.BATCHES, arguments.N or host.ROWS
        host.measure(*sizes, arguments.against, arguments.minutes, path)
    elif arguments.command == "merge":
        if arguments.rows is None:
            raise SystemExit("merge: which rows? --rows FILE, as measure wrote it")
        new = rows.read(arguments.rows)
        rows.merge(new, arguments.file or named_after(new.machine.iloc[0]))
    elif arguments.command == "measure":
        run_measure(arguments, arguments.file or default_file(arguments.device))
    else:
        report(arguments, arguments.file or default_file(arguments.device))


def run_measure(arguments: argparse.Namespace, path: Path) -> None:
    """Measure the cases that the options ask for."""
    axes = {"batches": arguments.B, "rows": arguments.N, "widths": arguments.D, "arithmetic": arguments.dtype}
    axes["busy"] = arguments.busy
    axes["classes"] = arguments.C and [None if C == "N/2" else int(C) for C in arguments.C]
    cases = grid.cases(arguments.device, **{name: values for name, values in axes.items() if values})
    cases = [case for case in cases if is_chosen(case, arguments)]
    if arguments.device == "cpu":
        limit_memory()
    providers = set(arguments.provider or measure.NAMES) - set(arguments.without)
    limits = measure.Limits(arguments.minutes, arguments.seconds, arguments.longest)
    measure.measure(cases, providers, arguments.device, path, limits, again=arguments.again)


def report(arguments: argparse.Namespace, path: Path) -> None:
    """Print tables or targets, or draw the figures."""
    if not path.exists():
        raise SystemExit(f"{path} is not there: python -m benchmarks measure")
    found = rows.read(path)
    if arguments.command == "table":
        cases = dict.fromkeys(grid.Case(*values) for values in found[rows.CASE].itertuples(index=False))
        tables.print_tables(found, [case for case in cases if is_chosen(case, arguments)])
    elif arguments.command == "targets":
        targets.print_targets(found)
    else:
        print(*figures.plot(found, arguments.output, path.stem), sep="\n")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("measure", "table", "targets", "plot", "merge", "host"))
    known = [name for name in measure.NAMES if name not in ("product", "copy", "reading")]
    parser.add_argument(
        "--what", nargs="+", choices=list(measure.PROVIDERS), help="the loss, with its gradient, ...; all"
    )
    parser.add_argument("--provider", nargs="+", choices=known, metavar="NAME", help=f"{' | '.join(known)}; all")
    parser.add_argument("--without", nargs="+", choices=known, metavar="NAME", default=[], help="these providers")
    for axis, what in (("B", "queries"), ("N", "bank rows, as 1e6"), ("D", "features")):
        parser.add_argument(f"--{axis}", nargs="+", type=number, metavar=axis, help=what)
    parser.add_argument("--C", nargs="+", type=classes, metavar="C", help="classes: a number, or N/2")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), help="arithmetic of the bank")
    parser.add_argument(
        "--busy", nargs="+", type=processes, metavar="PROCESSES",
        help="processes that keep cores busy beside the calls, each number in turn; measure: 0, table: all",
    )  # fmt: skip
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cuda", "cpu") if gpu else ("cpu",), default="cuda" if gpu else "cpu")
    parser.add_argument("--file", type=Path, help="of the results; one named after the machine")
    parser.add_argument("--rows", type=Path, help="a file of rows to merge")
    parser.add_argument("--against", type=Path, help="another checkout, whose package host measures in turns with this")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder of the figures")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no case after so many")
    parser.add_argument("--seconds", type=float, default=0.5 if gpu else 2.0, help="that each provider gets of a case")
    longest = 2.0 if gpu else 15.0
    parser.add_argument(
        "--longest", type=float, default=longest, help="seconds; longer calls are left out, where known"
    )
    parser.add_argument("--again", action="store_true", help="measure also what the file has")
    return parser.parse_args()


def is_chosen(case: grid.Case, arguments: argparse.Namespace) -> bool:
    """Whether the options ask for a case. What the machine can do is always chosen: the tables need it."""
    if case.what in (grid.PRODUCTS, grid.TRAFFIC):
        return True
    if arguments.what and case.what not in arguments.what:
        return False
    C = "N/2" if case.C == case.N // 2 else str(case.C)
    options = (arguments.B, arguments.N, arguments.D, arguments.C, arguments.dtype, arguments.busy)
    values = (*case[1:4], C, case.dtype, case.busy)
    return all(not allowed or value in allowed for value, allowed in zip(values, options, strict=True))


def number(text: str) -> int:
    """A positive number of the command line, as 1e6."""
    value = int(float(text))
    if value < 1:
        raise ValueError
    return value


def processes(text: str) -> int:
    """A number of processes, which may be none."""
    return 0 if text == "0" else number(text)


def classes(text: str) -> str:
    """A number of classes, or N/2."""
    return text if text == "N/2" else str(number(text))


def limit_memory() -> None:
    """Limit this process to the free memory.

    Too large an allocation then fails, where Linux would grant it and kill the process later.
    """
    free = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert free is not None
    size = memory.status("VmSize") + 1024 * int(free[1])
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.getrlimit(resource.RLIMIT_AS)[1]))


def default_file(device: str) -> Path:
    """The results of this machine."""
    return named_after(machine.describe(device)["machine"])


def named_after(name: str) -> Path:
    """The results of a machine."""
    stem = re.sub("[^a-z0-9]+", "-", name.split(",")[0].lower()).strip("-")
    return Path(__file__).parent / "results" / f"{stem}.csv"


if __name__ == "__main__":
    main()
