"""The loss, fused, naive and as others would compute it, measured on this machine.

python -m benchmarks measure     into benchmarks/results/<machine>.csv; goes on where it stopped
python -m benchmarks table       Markdown, of what has been measured
python -m benchmarks targets     which of the speeds aimed at on a GPU are reached
python -m benchmarks plot        figures, into docs/
python -m benchmarks merge       rows measured elsewhere (--rows), into the results of the machine they are of
python -m benchmarks host        what the host does for a step on a GPU, whether or not one is here

Without options all of the grid is meant (benchmarks/grid.py), the cases that matter most first: that takes hours on a
GPU and days on a CPU, and can be stopped at any time.
"""

import argparse
import re
import resource
from pathlib import Path

import torch

from benchmarks import grid, host, measure, memory, report
from benchmarks.providers import DTYPES


def main() -> None:
    arguments = parse()
    if arguments.command == "host":
        measured = arguments.file or named_after(f"host-{host.machine()}")
        sizes = arguments.B or host.BATCHES, arguments.N or host.ROWS
        host.measure(*sizes, arguments.against, arguments.minutes, measured)
        return
    if arguments.command == "merge":
        if arguments.rows is None:
            raise SystemExit("merge: which rows? --rows FILE, as measure wrote it")
        rows = measure.read(arguments.rows)
        measure.merge(rows, arguments.file or named_after(rows.machine.iloc[0]))
        return
    path = arguments.file or default_file(arguments.device)
    if arguments.command == "measure":
        axes = {"batches": arguments.B, "rows": arguments.N, "widths": arguments.D, "arithmetic": arguments.dtype}
        axes["classes"] = arguments.C and [None if C == "N/2" else int(C) for C in arguments.C]
        cases = grid.cases(arguments.device, **{name: values for name, values in axes.items() if values})
        cases = [case for case in cases if chosen(case, arguments)]
        if arguments.device == "cpu":
            limit_memory()
        providers = set(arguments.provider or measure.NAMES) - set(arguments.without)
        times = {name: getattr(arguments, name) for name in ("minutes", "seconds", "longest")}
        measure.measure(cases, providers, arguments.device, path, **times, again=arguments.again)
        return
    if not path.exists():
        raise SystemExit(f"{path} is not there: python -m benchmarks measure")
    rows = measure.read(path)
    if arguments.command == "table":
        cases = dict.fromkeys(grid.Case(*of_row) for of_row in rows[measure.CASE].itertuples(index=False))
        report.table(rows, [case for case in cases if chosen(case, arguments)])
    elif arguments.command == "targets":
        report.print_targets(rows)
    else:
        print(*report.plot(rows, arguments.output, path.stem), sep="\n")


def parse() -> argparse.Namespace:
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


def chosen(case: grid.Case, arguments: argparse.Namespace) -> bool:
    """What the machine can do is measured whatever is asked for: the tables need it."""
    if case.what in (grid.PRODUCTS, grid.TRAFFIC):
        return True
    if arguments.what and case.what not in arguments.what:
        return False
    C = "N/2" if case.C == case.N // 2 else str(case.C)
    asked = (arguments.B, arguments.N, arguments.D, arguments.C, arguments.dtype)
    return all(not some or value in some for value, some in zip((*case[1:4], C, case.dtype), asked, strict=True))


def number(text: str) -> int:
    found = int(float(text))
    if found < 1:
        raise ValueError
    return found


def classes(text: str) -> str:
    return text if text == "N/2" else str(number(text))


def limit_memory() -> None:
    """To what is free: too large an allocation then fails, where Linux would grant it and kill the process later."""
    free = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert free is not None
    size = memory.status("VmSize") + 1024 * int(free[1])
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.getrlimit(resource.RLIMIT_AS)[1]))


def default_file(device: str) -> Path:
    return named_after(measure.machine(device)["machine"])


def named_after(machine: str) -> Path:
    name = re.sub("[^a-z0-9]+", "-", machine.split(",")[0].lower()).strip("-")
    return Path(__file__).parent / "results" / f"{name}.csv"


if __name__ == "__main__":
    main()
