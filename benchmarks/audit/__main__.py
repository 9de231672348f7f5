"""The command `python -m benchmarks.audit`."""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import benchmarks.audit
from benchmarks.audit.calibration import calibrate
from benchmarks.audit.evidence import evidence
from benchmarks.audit.features import audit_features, read_features, write_rows
from benchmarks.audit.findings import findings, read_archive
from benchmarks.audit.review import review
from benchmarks.audit.speed import Case, gpu, run_case, run_fit, speed
from benchmarks.audit.tables import CALIBRATION, EVIDENCE, FEATURES, FINDINGS, REVIEW, SPEED, table


def write(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Write the rows as .csv once all of them are there.

    Raises:
        SystemExit: There are none.
    """
    found = list(rows)
    if not found:
        raise SystemExit("no finished run with wrong labels was found")
    write_rows(found, path)


def main() -> None:  # noqa: C901 (a branch for each command)
    """The command."""
    description = (benchmarks.audit.__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="benchmarks.audit", description=description)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("evidence")
    command.add_argument("runs", type=Path)
    command.add_argument("--cache", type=Path, help="of `ntdne reproduce`")
    command.add_argument("--output", type=Path, default=EVIDENCE)
    command = commands.add_parser("features")
    for name in ("features", "labels", "classes"):
        command.add_argument(f"--{name}", type=Path)
    command.add_argument("--seeds", type=int, default=5)
    command.add_argument("--output", type=Path, default=FEATURES)
    command = commands.add_parser("review")
    for name in ("features", "labels", "classes"):
        command.add_argument(f"--{name}", type=Path)
    command.add_argument("--seeds", type=int, default=3)
    command.add_argument("--output", type=Path, default=REVIEW)
    command = commands.add_parser("findings")
    command.add_argument("features", type=Path, help=".npy, with files.txt beside it")
    command.add_argument("labels", type=Path, help=".npy")
    command.add_argument(
        "--images", type=Path, help="folder of the files; without it copies and odd images are not made"
    )
    command.add_argument("--encoder", default="efficientnet-lite0", help="that made the features (efficientnet-lite0)")
    command.add_argument("--image-size", type=int, default=160, help="and its pixels a side (160)")
    command.add_argument("--output", type=Path, default=FINDINGS)
    command = commands.add_parser("speed")
    command.add_argument("--sizes", type=int, nargs="+", default=[10**4, 10**5, 10**6])
    command.add_argument("--output", type=Path, default=SPEED)
    command = commands.add_parser("calibrate")
    command.add_argument("--scenes", type=Path, help="folder of class folders of aerial scenes")
    command.add_argument("--output", type=Path, default=CALIBRATION)
    command = commands.add_parser("table")
    command.add_argument("--features", type=Path, default=FEATURES)
    command.add_argument("--evidence", type=Path, default=EVIDENCE)
    command.add_argument("--speed", type=Path, default=SPEED)
    command.add_argument("--calibration", type=Path, default=CALIBRATION)
    command.add_argument("--review", type=Path, default=REVIEW)
    command.add_argument("--findings", type=Path, default=FINDINGS)
    command.add_argument("--figures", type=Path, help="folder for review-curve.png")
    command = commands.add_parser("case")  # which `speed` runs, each in a process of its own
    command.add_argument("case", nargs=5)
    command = commands.add_parser("fit")
    command.add_argument("sizes", type=int, nargs=3, metavar=("N", "D", "C"))
    command = commands.add_parser("gpu")
    command.add_argument("sizes", type=int, nargs=4, metavar=("N", "D", "C", "QUERIES"))
    given = parser.parse_args()
    if given.command == "evidence":
        write(evidence(given.runs, given.cache), given.output)
    elif given.command == "features":
        audit_features(read_features(given.features, given.labels, given.classes), given.seeds, given.output)
    elif given.command == "review":
        review(read_features(given.features, given.labels, given.classes), given.seeds, given.output)
    elif given.command == "findings":
        archive = read_archive(given.features, given.labels, given.images)
        findings(archive, given.encoder, given.image_size, given.output)
    elif given.command == "speed":
        text = json.dumps(speed(given.sizes), indent=1) + "\n"
        given.output.write_text(text)
    elif given.command == "calibrate":
        write(calibrate(given.scenes), given.output)
    elif given.command == "fit":
        print(json.dumps(run_fit(*given.sizes)))
    elif given.command == "gpu":
        for row in gpu(*given.sizes):
            print(json.dumps(row), flush=True)
    elif given.command == "table":
        files = [given.features, given.evidence, given.speed, given.calibration, given.review, given.findings]
        table(*files, figures=given.figures)
    else:
        N, D, C, dtype, batches = given.case
        print(json.dumps(run_case(Case(int(N), int(D), int(C), dtype, int(batches)))))


if __name__ == "__main__":
    main()
