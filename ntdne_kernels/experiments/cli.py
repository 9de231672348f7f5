"""The command `ntdne`: train, evaluate, reproduce, report, audit."""

import argparse
import dataclasses
import itertools
import math
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
import yaml

from ntdne_kernels.audit import METHODS as AUDIT_METHODS
from ntdne_kernels.experiments.files import check_folder
from ntdne_kernels.experiments.images import MAX_PIXELS
from ntdne_kernels.experiments.losses import LOSSES, loss_name, loss_options
from ntdne_kernels.experiments.paper import METHODS
from ntdne_kernels.experiments.settings import PRESETS, RATELESS, Settings, read_preset

if TYPE_CHECKING:
    from ntdne_kernels.experiments.run import Machine

# What trains and draws is imported where it is needed: Lightning alone takes as long to import as torch.

T = TypeVar("T")

PAPER_RATES = [0.1, 0.3, 0.5, 0.7]
WORDS = ("eurosat", "resisc45", "digits", "imagenet")  # that are no paths, whatever lies in the folder
USERS_ERRORS = (ValueError, OSError)  # what the person at the keyboard can mend

DESCRIPTION = """\
Train image encoders on archives with wrong labels, with NTDNE and the losses it is compared with, and judge them.

  ntdne train photos/ --preset scratch --rate 0.5     one run: wrong labels in, a trained encoder and its metrics out
  ntdne evaluate runs/photos/...                      the metrics of a run once more
  ntdne reproduce photos/ --rates 0.1 0.5             a grid of losses and noise, as in the paper; runs what is missing
  ntdne report runs/photos                            tables, figures and a page of all runs in a folder
  ntdne audit features.npy --labels labels.npy        which labels of an archive are probably wrong

photos/ holds a folder of images for each class. The labels found there count as right; wrong ones are made, so that it
is known which they are. Only audit makes none: it looks for those that are there. A command that was killed is started
again the same way; training goes on where it was.
"""


AUDIT = """\
from a folder of images for each class, with the encoder of a run:
  ntdne train photos/ --preset scratch --noise none --output runs/photos
  ntdne audit photos/ --checkpoint runs/photos

from features of your own encoder (in Python: numpy.save("features.npy", features), (N, D) floats; labels as integers,
-1 for none, or as names, "" for none), with or without the names of the images' files, for the pictures on the page:
  ntdne audit features.npy --labels labels.npy --paths files.txt --images photos/
  ntdne audit archive.npz              arrays features, labels and, if you like, paths
  ntdne audit archive.parquet          columns features (lists of floats), label and, if you like, path

Written: audit.html, a page with the worst images of each class beside their neighbours; audit.csv, a row for each
image; with --fix corrected.csv. Where the features cannot tell how many labels are wrong, that is said first, labels
are ranked, and none is called a suspect or corrected unless --force says so.

What was read stays as it is. Features in a .npy file may be larger than memory: they are read part by part, and
--scratch has the copy that the audit works with on a disk.
"""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"ntdne: {' '.join(message.split())}\n")


def parser() -> argparse.ArgumentParser:
    main = Parser("ntdne", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = main.add_subparsers(dest="command", required=True, metavar="command")

    train = commands.add_parser(
        "train",
        help="train one encoder on noisy labels and evaluate it",
        epilog=_losses_and_options(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_settings(train, exclude=set())
    train.add_argument(
        "--output", type=Path, help="folder of the run (default: runs/ARCHIVE/NOISE-RATE/LOSS/seed-SEED)"
    )
    _add_machine(train)

    evaluate = commands.add_parser("evaluate", help="evaluate a trained run anew")
    evaluate.add_argument("run", type=Path, help="folder of the run")
    _add_machine(evaluate)

    reproduce = commands.add_parser(
        "reproduce",
        help="run what is missing of a grid of losses and noise",
        epilog=_losses_and_options(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_settings(reproduce, exclude={"loss", "noise", "rate", "seed"})
    grid = reproduce.add_argument_group("grid", "a run for each combination")
    grid.add_argument("--losses", nargs="+", default=METHODS, metavar="LOSS", help=f"default: {', '.join(METHODS)}")
    noises = next(setting for setting in dataclasses.fields(Settings) if setting.name == "noise").metadata["choices"]
    grid.add_argument("--noises", nargs="+", choices=noises, help="default: that of the preset, else uniform")
    grid.add_argument(
        "--rates", nargs="+", type=float, help="noise rates; default: that of the preset, else the paper's"
    )
    grid.add_argument("--seeds", nargs="+", type=int, help="default: that of the preset, else 0")
    grid.add_argument(
        "--k", nargs="+", type=_value, help="NTDNE once for each of these thresholds: numbers, auto, none (fig. 6)"
    )
    reproduce.add_argument("--output", type=Path, help="folder of the runs (default: runs/ARCHIVE)")
    _add_machine(reproduce)

    report = commands.add_parser("report", help="tables, figures and one HTML page of the runs in a folder")
    report.add_argument("runs", type=Path, help="folder with runs at any depth")
    report.add_argument("--output", type=Path, help="folder for the report (default: report/ in RUNS)")

    audit = commands.add_parser(
        "audit",
        help="rank the labels of an archive by how little each image's neighbours agree",
        epilog=AUDIT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_audit(audit)
    return main


def _add_audit(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "data", help="features: .npy, .npz or .parquet; or images, as for ntdne train, and --checkpoint"
    )
    files = command.add_argument_group("what is read")
    files.add_argument(
        "--checkpoint", type=Path, metavar="RUN", help="run of ntdne train, or its last.ckpt, that encodes the images"
    )
    files.add_argument(
        "--labels", type=Path, metavar="FILE", help=".npy, .npz, .parquet, .csv, or .txt with one a line"
    )
    files.add_argument("--paths", type=Path, metavar="FILE", help="names of the images' files, as --labels")
    files.add_argument(
        "--images", type=Path, metavar="FOLDER", help="folder that these names are relative to (this one)"
    )
    files.add_argument(
        "--max-pixels", type=_count, metavar="INT", help=f"files of more are not read ({MAX_PIXELS}; that of RUN)"
    )
    for kind, default in (("features", "features"), ("label", "label, labels"), ("path", "path, paths")):
        files.add_argument(
            f"--{kind}-column", metavar="NAME", help=f"column of .csv or .parquet, or array of .npz ({default})"
        )
    judged = command.add_argument_group("how it is judged")
    judged.add_argument(
        "--sigma", type=_positive, help="temperature of the neighbourhood (that of the checkpoint's loss, else 0.1)"
    )
    judged.add_argument(
        "--threshold",
        type=_threshold,
        default="rate",
        metavar="METHOD",
        help=f"how suspects are chosen: {', '.join(AUDIT_METHODS)}, or a number k: a score of k or less (rate)",
    )
    judged.add_argument(
        "--top", type=_count, default=10, metavar="M", help="classes kept of each image's neighbours (10)"
    )
    written = command.add_argument_group("what is written")
    written.add_argument("--output", type=Path, metavar="FOLDER", help="default: audit/NAME")
    written.add_argument("--format", choices=("csv", "parquet"), default="csv", help="of the table (csv)")
    written.add_argument("--fix", action="store_true", help="write corrected.csv too: suspects get the suggested label")
    written.add_argument(
        "--force", action="store_true", help="name and fix suspects also where the features cannot carry a noise rate"
    )
    written.add_argument("--worst", type=_count, default=8, metavar="N", help="images of a class on the page (8)")
    written.add_argument("--neighbours", type=_count, default=5, metavar="K", help="shown beside an image (5)")
    machine = command.add_argument_group("machine")
    machine.add_argument("--device", type=_device, help="cpu, cuda, cuda:1 ... (a GPU where there is one)")
    machine.add_argument(
        "--dtype", choices=("float64", "float32", "float16", "bfloat16"), default="float32", help="(float32)"
    )
    machine.add_argument(
        "--scratch", type=Path, metavar="FOLDER", help="on a disk, for a copy of features that are larger than memory"
    )
    machine.add_argument("--cache", type=Path, help="folder for decoded images (default: in the user's cache folder)")
    machine.add_argument("--download", action="store_true", help="let torchvision or torchgeo download its archive")


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
        "made:NxC (N made images in C classes, to try things out)",
    )
    command.add_argument(
        "--preset", default="paper", help=f"settings to start from: {', '.join(PRESETS)}, or a YAML file (paper)"
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
            options |= {"type": _bands, "metavar": "B,B,..."}
        elif isinstance(default, tuple):
            options |= {"nargs": "+", "metavar": "CLASS"}
        else:
            options |= {"type": type(default), "metavar": type(default).__name__.upper()}
            if setting.name == "loss":
                options |= {"metavar": "LOSS", "help": f"{', '.join(choices)}, in any case ({default})"}
            elif choices:
                options |= {"choices": choices, "metavar": None}
        group.add_argument(f"--{setting.name.replace('_', '-')}", **options)


def _add_machine(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("machine")
    group.add_argument("--cache", type=Path, help="folder for decoded images (default: in the user's cache folder)")
    group.add_argument("--download", action="store_true", help="let torchvision or torchgeo download its archive")
    group.add_argument("--accelerator", default="auto", choices=("auto", "cpu", "gpu"), help="where to train (auto)")
    if command.prog.split()[-1] != "evaluate":
        group.add_argument("--workers", type=int, default=0, help="processes that load images (0)")
        group.add_argument("--devices", type=int, default=1, help="GPUs or processes to train on (1)")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 2 where it was given something that it cannot work with, said in one line."""
    arguments = parser().parse_args(argv)
    commands = {"train": _train, "evaluate": _evaluate, "reproduce": _reproduce, "report": _report, "audit": _audit}
    try:
        commands[arguments.command](arguments)
    except USERS_ERRORS as error:
        return _fail(error)
    return 0


def _fail(error: BaseException | str) -> int:
    print(f"ntdne: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _train(arguments: argparse.Namespace) -> None:
    from ntdne_kernels.experiments.run import finished_results, run
    from ntdne_kernels.experiments.training import make_criterion

    settings, variant = _settings(arguments, {})
    folder = arguments.output or _archive_folder(arguments.data) / _cell(settings, variant)
    check_folder(folder, _images(arguments.data))
    make_criterion(settings, torch.tensor([0, 1]))  # before the images are decoded
    if finished_results(settings, folder) is None:
        _check_weights(settings)
    results = run(settings, variant, folder, _machine(arguments))
    if results is not None:
        _print_metrics(results)
        print(
            f"written to {folder}: last.ckpt, results.json, figures.npz; next: ntdne report {shlex.quote(str(folder))}"
        )


def _check_weights(settings: Settings) -> None:
    """Before the images are decoded."""
    from ntdne_kernels.experiments.encoders import make_encoder

    if settings.weights:
        with torch.random.fork_rng(devices=[]):
            make_encoder(settings.encoder, settings.dim, settings.weights)


def _evaluate(arguments: argparse.Namespace) -> None:
    from ntdne_kernels.experiments.run import evaluate

    _print_metrics(evaluate(arguments.run, _machine(arguments)))


def _reproduce(arguments: argparse.Namespace) -> None:
    from ntdne_kernels.experiments.run import finished_results, run
    from ntdne_kernels.experiments.training import make_criterion

    output = arguments.output or _archive_folder(arguments.data)
    check_folder(output, _images(arguments.data))
    cells = _cells(arguments, output)
    for settings, _, _ in cells:  # before hours are spent on the cells before it
        make_criterion(settings, torch.tensor([0, 1]))
    missing = [cell for cell in cells if finished_results(cell[0], cell[2]) is None]
    print(
        f"{output}: {_counted(len(cells), 'run')}, {len(cells) - len(missing)} of them finished before; "
        f"{_counted(len(missing), 'training')} to do",
        flush=True,
    )
    if missing:
        _check_weights(missing[0][0])  # the encoder is the same in all
    failed, took = [], []
    for number, (settings, variant, folder) in enumerate(missing, start=1):
        print(f"run {number} of {len(missing)}", flush=True)
        start = time.perf_counter()
        try:
            results = run(settings, variant, folder, _machine(arguments))
        except USERS_ERRORS as error:
            _fail(f"{folder}: {error}")
            failed.append(folder)
            continue
        if results is not None:
            _print_metrics(results)
            took.append(
                max(time.perf_counter() - start, results["seconds"])
            )  # the latter also of what was trained before
            if number < len(missing):
                left = mean(took) * (len(missing) - number)
                print(f"{_counted(len(missing) - number, 'training')} left, about {_duration(left)}", flush=True)
    if failed:
        raise ValueError(f"{len(failed)} of {len(missing)} runs failed, see above; the others are finished")
    print(f"next: ntdne report {shlex.quote(str(output))}")


def _cells(arguments: argparse.Namespace, output: Path) -> list[tuple[Settings, str, Path]]:
    """Settings, variant and folder of each run of the grid; noise that has no rate comes once."""
    preset = read_preset(arguments.preset)
    losses = list(dict.fromkeys(map(loss_name, arguments.losses)))
    noises = arguments.noises or [preset.get("noise", "uniform")]
    rates = arguments.rates or ([preset["rate"]] if "rate" in preset else PAPER_RATES)
    seeds = [preset.get("seed", 0)] if arguments.seeds is None else arguments.seeds
    if arguments.k and "NTDNE" not in losses:
        raise ValueError("--k: expected NTDNE among --losses, whose threshold it is")
    cells = {}
    for noise, rate, loss, seed in itertools.product(noises, rates, losses, seeds):
        values = {"loss": loss, "noise": noise, "rate": 0.0 if noise in RATELESS else rate, "seed": seed}
        for options in [{"k": k} for k in arguments.k] if arguments.k and loss == "NTDNE" else [{}]:
            settings, variant = _settings(arguments, values, options)
            folder = output / _cell(settings, variant)
            cells[folder] = settings, variant, folder
    return list(cells.values())


def _report(arguments: argparse.Namespace) -> None:
    from ntdne_kernels.experiments.report import write_report

    output = arguments.output or arguments.runs / "report"
    check_folder(output)
    for path in write_report(arguments.runs, output):
        print(path)


def _audit(arguments: argparse.Namespace) -> None:
    from ntdne_kernels.experiments import auditing

    data, checkpoint = Path(arguments.data).expanduser(), arguments.checkpoint
    labels, paths = arguments.labels, arguments.paths
    images = data.is_dir() or arguments.data in WORDS or arguments.data.startswith("made:")
    if not images and not data.exists():
        raise ValueError(f"{data}: no such file or folder")
    if images and checkpoint is None:
        raise ValueError(f"{data} holds images: --checkpoint names the run that encodes them; or give their features")
    if images and any([labels, paths, arguments.images]):
        raise ValueError("--labels, --paths and --images are for features; the labels of images are their folders")
    if not images and checkpoint is not None:
        raise ValueError(f"--checkpoint encodes a folder of images, but {data} is a file of features")
    if arguments.scratch is not None and not arguments.scratch.is_dir():
        raise ValueError(f"--scratch: expected a folder, got {arguments.scratch}")
    output = arguments.output or Path("audit") / (data.resolve().name if images else data.stem).replace(":", "-")
    read = [file for file in (data, checkpoint, labels, paths) if file is not None]
    auditing.check_output(output, read, _images(arguments.data), arguments.format)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if images:
        source = auditing.encode_folder(
            arguments.data,
            checkpoint,
            cache=arguments.cache,
            download=arguments.download,
            max_pixels=arguments.max_pixels,
            device=device,
        )
    else:
        columns = {kind: getattr(arguments, f"{kind}_column") for kind in ("features", "label", "path")}
        source = auditing.read_features(data, labels, paths, arguments.images, columns, arguments.max_pixels)
    audit, written = auditing.write_audit(
        source,
        output,
        auditing.AuditOptions(
            sigma=arguments.sigma,
            method=arguments.threshold,
            top=arguments.top,
            force=arguments.force,
            format=arguments.format,
            fix=arguments.fix,
            worst=arguments.worst,
            neighbours=arguments.neighbours,
            device=device,
            dtype=getattr(torch, arguments.dtype),
            scratch=arguments.scratch,
        ),
    )
    judged = int(audit.judged.sum())
    about = f"{len(audit)} images, {len(audit.classes)} classes: "
    if judged == 0:
        about += "no label could be judged: no two images carry the same one"
    elif audit.doubt and not arguments.force:
        about += f"{judged} judged labels are ranked, the most suspect first"
    else:
        about += f"{int(audit.suspects(arguments.threshold).sum())} of {judged} judged labels are suspect; about "
        about += f"{100 * audit.noise_rate:.1f} % are estimated to be wrong"
    if judged and audit.doubt:
        print(f"how many labels are wrong cannot be said from these features: {audit.doubt}")
    print(about + (f"; {len(source.unreadable)} unreadable files left out" if source.unreadable else ""))
    for path in written:
        print(path)
    for path in auditing.earlier_outputs(output, written):
        print(f"ntdne: {path} is of an earlier audit", file=sys.stderr)
    if arguments.fix and audit.doubt and not arguments.force:
        raise ValueError(
            f"--fix: no corrected list was written, as most suspects would be right labels: {audit.doubt}; --force "
            "writes it all the same"
        )


def _positive(text: str) -> float:
    return _checked(float, text, lambda value: 0 < value < math.inf, "a positive number")


def _count(text: str) -> int:
    return _checked(int, text, lambda value: value >= 1, "a whole number from 1")


def _bands(text: str) -> tuple[int, ...]:
    bands = text.split(",")
    return _checked(
        lambda _: tuple(map(int, bands)), text, lambda found: min(found) >= 1, "numbers of bands from 1, as 4,3,2"
    )


def _threshold(text: str) -> str | float:
    expected = f"{', '.join(AUDIT_METHODS)}, or a number between 0 and 1"
    return text if text in AUDIT_METHODS else _checked(float, text, lambda value: 0 < value < 1, expected)


def _device(text: str) -> str:
    def device(text: str) -> str:
        try:
            torch.empty(0, device=text)
        except (RuntimeError, AssertionError) as error:
            raise ValueError from error
        return text

    return _checked(device, text, bool, "a device of this machine, as cpu")


def _checked(kind: Callable[[str], T], text: str, good: Callable[[T], bool], expected: str) -> T:
    """A value from the command line."""
    try:
        value = kind(text)
        if good(value):
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")


def _settings(
    arguments: argparse.Namespace, values: dict[str, Any], options: dict[str, Any] | None = None
) -> tuple[Settings, str]:
    """Settings of a run, and the name of its variant: what its loss has that differs from the preset.

    Values and options of the run come before the command line's, and these before the preset's.
    """
    preset = read_preset(arguments.preset)
    preset_options = preset.pop("losses")
    names = {setting.name for setting in dataclasses.fields(Settings)}
    given = {name: value for name, value in vars(arguments).items() if name in names and value is not None}
    values = {"loss": "NTDNE"} | preset | given | values
    values["loss"] = loss_name(values["loss"])
    values["classes"] = tuple(map(str, values.get("classes", ())))
    values["bands"] = tuple(values.get("bands", ()))
    for name in ("data", "weights", "noise_file"):  # so that a run is the same one from any folder
        path = values.get(name)
        if path and path not in WORDS and Path(path).exists():
            values[name] = str(Path(path).resolve())
    overrides = _overrides(arguments, values["loss"]) | (options or {})
    values["loss_options"] = preset_options.get(values["loss"], {}) | overrides
    variant = ", ".join(f"{name}={'none' if value is None else value}" for name, value in overrides.items())
    return Settings(**values), variant


def _overrides(arguments: argparse.Namespace, loss: str) -> dict[str, Any]:
    """What --loss-option says of a loss."""
    several = arguments.command == "reproduce"
    among = list(map(loss_name, arguments.losses)) if several else [loss]
    overrides = {}
    for text in arguments.loss_option:
        name, equals, value = text.partition("=")
        owner, dot, option = name.rpartition(".")
        if not equals or (several and not dot):
            expected = "LOSS.NAME=VALUE, as NTDNE.k=auto" if several else "NAME=VALUE, as k=auto"
            raise ValueError(f"--loss-option: expected {expected}, got {text!r}")
        if dot and loss_name(owner) not in among:
            raise ValueError(f"--loss-option: {text!r} is for {loss_name(owner)}, which is not trained here")
        if not dot or loss_name(owner) == loss:
            overrides[option] = _value(value)
    return overrides


def _value(text: str) -> Any:
    """A number, none for no value, or what else YAML makes of it."""
    if text.lower() == "none":
        return None
    try:
        return float(text) if re.fullmatch(r"[-+]?[\d.]+e[-+]?\d+", text, re.IGNORECASE) else yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"--loss-option: expected a number, auto or none, got {text!r}") from None


def _machine(arguments: argparse.Namespace) -> "Machine":
    from ntdne_kernels.experiments.run import Machine

    names = {setting.name for setting in dataclasses.fields(Machine)}
    return Machine(**{name: value for name, value in vars(arguments).items() if name in names})


def _images(data: str) -> Path | None:
    """The folder of class folders, if that is what the archive is."""
    return Path(data).expanduser() if Path(data).expanduser().is_dir() else None


def _archive_folder(data: str) -> Path:
    return Path("runs") / (Path(data).resolve().name if Path(data).exists() else data.replace(":", "-"))


def _cell(settings: Settings, variant: str) -> Path:
    noise = settings.noise if settings.noise in RATELESS else f"{settings.noise}-{settings.rate}"
    return Path(noise) / " ".join([settings.loss, *([variant] if variant else [])]) / f"seed-{settings.seed}"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number != 1 else "")


def _duration(seconds: float) -> str:
    """As "3 h 20 min", "12 min" or "40 s"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def _print_metrics(results: dict[str, Any]) -> None:
    counts, metrics = results["counts"], results["metrics"]
    print(
        f"{counts['train']} training images ({counts['flipped']} with a wrong label), {counts['test']} test images"
        + (f", {counts['skipped']} unreadable files left out" if counts["skipped"] else "")
    )
    print("  ".join(f"{name} {100 * value:.1f}" for name, value in metrics.items()), "(in %)")


if __name__ == "__main__":
    sys.exit(main())
