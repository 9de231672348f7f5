"""What `ntdne audit` and `ntdne relabel` take: their help and their arguments."""

import argparse
from pathlib import Path

from ntdne_kernels.audit import METHODS as AUDIT_METHODS
from ntdne_kernels.experiments.argument_types import count, device, number_from_0, positive, threshold
from ntdne_kernels.experiments.images import MAX_PIXELS

AUDIT = """\
from a folder of images for each class, with the encoder of a run:
  ntdne train photos/ --preset scratch --noise none --output runs/photos
  ntdne audit photos/ --checkpoint runs/photos

from features of your own encoder (in Python: numpy.save("features.npy", features), (N, D) floats; labels as integers,
-1 for none, or as names, "" for none), with or without the names of the images' files, for the pictures on the page:
  ntdne audit features.npy --labels labels.npy --paths files.txt --images photos/
  ntdne audit archive.npz              arrays features, labels and, if you like, paths; .pt likewise
  ntdne audit archive.parquet          columns features (lists of floats), label and, if you like, path
  ntdne audit embedded/                a folder of ntdne embed, or of FiftyOne's export with its samples.json

labels.npy and files.txt beside features.npy are found by themselves. Features may go through the head of a run first:
  ntdne train features.npy --noise none --output runs/head
  ntdne audit features.npy --checkpoint runs/head

Written: audit.html, a page with the worst images of each class beside their neighbours; review/review.html, a page to
decide on labels, in any browser; audit.csv, a row for each image; with --fix corrected.csv. Where the features cannot
tell how many labels are wrong, that is said first, labels are ranked, and none is called a suspect or corrected unless
--force says so.

What was read stays as it is. Features in a .npy file may be larger than memory: they are read part by part, and
--scratch has the copy that the audit works with on a disk.
"""


RELABEL = """\
ARCHIVE and the options of what is read are those of the audit that the decisions come from: decisions on other images
or labels are refused. The decisions are those of a review, or written by hand, with the columns
image,given,verdict,decided,when,archive, where the last two may be empty and the verdict is keep, relabel, unsure or
exclude.

  ntdne relabel photos/ decisions.csv --links              labels.csv, and images/ with links in class folders
  ntdne relabel features.npy mine.csv yours.csv            labels.csv, and labels.npy in the order of the features
  ntdne relabel features.npy decisions.csv --labels table.csv
                                                           labels.csv, and table.csv with these cells changed
  ntdne train photos/ --labels relabelled/photos/labels.csv --noise none

Written into one folder, which is complete or as it was before. What was read stays as it is.
"""


def add_audit(command: argparse.ArgumentParser) -> None:
    """The arguments of `ntdne audit`."""
    command.add_argument(
        "data", help="features: .npy, .npz, .pt, .parquet, or a folder; or images, as for ntdne train, and --checkpoint"
    )
    files = command.add_argument_group("what is read")
    _add_encoded(files)
    _add_label_files(files)
    files.add_argument(
        "--decisions",
        nargs="+",
        type=Path,
        default=[],
        metavar="decisions.csv",
        help="what people decided on the labels, one file for each person: they are trusted, and say how probably the "
        "others are wrong",
    )
    _add_conflicts(files)
    judged = command.add_argument_group("how it is judged")
    judged.add_argument(
        "--sigma",
        type=positive,
        help="temperature of the neighbourhood (that of the checkpoint's loss, else chosen by the labels)",
    )
    judged.add_argument(
        "--threshold",
        type=threshold,
        default="rate",
        metavar="METHOD",
        help=f"how suspects are chosen: {', '.join(AUDIT_METHODS)}, or a number k: a score of k or less (rate)",
    )
    judged.add_argument(
        "--top", type=count, default=10, metavar="M", help="classes kept of each image's neighbours (10)"
    )
    written = command.add_argument_group("what is written")
    written.add_argument("--output", type=Path, metavar="FOLDER", help="default: audit/NAME")
    written.add_argument("--format", choices=("csv", "parquet"), default="csv", help="of the table (csv)")
    written.add_argument("--fix", action="store_true", help="write corrected.csv too: suspects get the suggested label")
    written.add_argument(
        "--force", action="store_true", help="name and fix suspects also where the features cannot carry a noise rate"
    )
    written.add_argument("--worst", type=count, default=8, metavar="N", help="images of a class on the page (8)")
    written.add_argument("--neighbours", type=count, default=5, metavar="K", help="shown beside an image (5)")
    written.add_argument(
        "--review",
        type=number_from_0,
        metavar="N",
        help="labels in the review (suspects and the 1,000 lowest)",
    )
    written.add_argument("--no-review", dest="review", action="store_const", const=0, help="write no review")
    machine = command.add_argument_group("machine")
    machine.add_argument("--device", type=device, help="cpu, cuda, cuda:1 ... (a GPU where there is one)")
    machine.add_argument(
        "--dtype", choices=("float64", "float32", "float16", "bfloat16"), default="float32", help="(float32)"
    )
    machine.add_argument(
        "--scratch", type=Path, metavar="FOLDER", help="on a disk, for a copy of features that are larger than memory"
    )
    machine.add_argument("--cache", type=Path, help="folder for decoded images (default: in the user's cache folder)")
    machine.add_argument("--download", action="store_true", help="let torchvision or torchgeo download its archive")


def _add_conflicts(command: argparse._ActionsContainer) -> None:
    command.add_argument(
        "--conflicts",
        choices=("error", "latest", "skip"),
        default="error",
        help="where people decided differently on an image: stop; take the latest; or leave it as it is (error)",
    )


def add_relabel(command: argparse.ArgumentParser) -> None:
    """The arguments of `ntdne relabel`."""
    command.add_argument("data", metavar="ARCHIVE", help="what was audited: class folders, or features with labels")
    command.add_argument("decisions", nargs="+", type=Path, metavar="decisions.csv", help="one file for each person")
    files = command.add_argument_group("what is read, as for ntdne audit")
    _add_encoded(files)
    _add_label_files(files)
    files.add_argument("--cache", type=Path, help="folder of libraries' archives (default: in the user's cache folder)")
    _add_conflicts(command)
    command.add_argument("--drop-unsure", action="store_true", help="leave out images of which people cannot tell")
    command.add_argument(
        "--links",
        nargs="?",
        const="symbolic",
        choices=("symbolic", "hard", "copies"),
        help="make class folders with links to the images: symbolic (as --links alone), or, where these cannot be "
        "made, hard links or copies",
    )
    command.add_argument(
        "--export",
        nargs="+",
        default=[],
        choices=("fiftyone", "label-studio", "cvat", "cleanlab"),
        help="write what these import too, with the decisions",
    )
    command.add_argument(
        "--scores", type=Path, metavar="FILE", help="and with the scores of this table of ntdne audit, as audit.csv"
    )
    command.add_argument("--output", type=Path, metavar="FOLDER", help="default: relabelled/NAME")


def _add_encoded(files: argparse._ArgumentGroup) -> None:
    files.add_argument(
        "--checkpoint",
        type=Path,
        metavar="RUN",
        help="run of ntdne train, or its last.ckpt, that encodes what is audited",
    )
    files.add_argument(
        "--max-pixels", type=count, metavar="INT", help=f"files of more are not read ({MAX_PIXELS}; that of RUN)"
    )


def _add_label_files(files: argparse._ArgumentGroup) -> None:
    files.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help=".npy, .npz, .pt, .parquet, .json, .jsonl, .csv, or .txt with one a line",
    )
    files.add_argument("--paths", type=Path, metavar="FILE", help="names of the images' files, as --labels")
    files.add_argument(
        "--images", type=Path, metavar="FOLDER", help="folder that these names are relative to (this one)"
    )
    for content, default in (("features", "features"), ("label", "label, labels"), ("path", "path, paths")):
        files.add_argument(
            f"--{content}-column", metavar="NAME", help=f"column of .csv or .parquet, or array of .npz ({default})"
        )
