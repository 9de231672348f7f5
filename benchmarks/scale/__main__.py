"""The command `python -m benchmarks.scale`."""

import argparse
from pathlib import Path

from benchmarks.scale.measure import PARTS, RESULTS, measure
from benchmarks.scale.tables import table


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale", description="How the loss scales, measured and modelled."
    )
    parser.add_argument("command", choices=("measure", "table"))
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure; all")
    parser.add_argument("--file", type=Path, default=RESULTS, help="of the results")
    parser.add_argument("--shrink", type=int, default=1, help="divide N by this, to see that all works")
    arguments = parser.parse_args()
    if arguments.command == "measure":
        measure(arguments.part, arguments.file, arguments.shrink)
    else:
        table(arguments.file)


if __name__ == "__main__":
    main()
