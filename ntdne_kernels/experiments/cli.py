"""The command `ntdne`: train, evaluate, reproduce, report, embed, search, audit, relabel."""

import argparse
import codecs
import dataclasses
import io
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch

from ntdne_kernels.experiments.arguments import class_folders, parser
from ntdne_kernels.experiments.features import archive_name, as_utf8
from ntdne_kernels.experiments.files import check_folder
from ntdne_kernels.experiments.grid import PlannedRun, planned_grid, planned_run
from ntdne_kernels.experiments.settings import Settings

if TYPE_CHECKING:
    from ntdne_kernels.experiments.run import Machine

# What trains and draws is imported where it is needed: Lightning alone takes as long to import as torch.

USER_ERRORS = (ValueError, OSError)  # the person who gave the command can correct these


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        2 after an error of the user's, which is said in one line; 141 where nobody reads what is printed; else 0.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # no work fails because what it made cannot be printed
        codecs.register_error("ntdne", _escaped)
        sys.stdout.reconfigure(errors="ntdne")
    arguments = parser().parse_args(argv)
    commands = {
        "train": _train,
        "evaluate": _evaluate,
        "reproduce": _reproduce,
        "report": _report,
        "embed": _embed,
        "search": _search,
        "audit": _audit,
        "relabel": _relabel,
    }
    try:
        commands[arguments.command](arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except USER_ERRORS as error:
        _print_error(error)
        return 2
    return 0


def _escaped(error: UnicodeError) -> tuple[str | bytes, int]:
    """What is printed where the output's encoding fails: the bytes of a file's name that are no text, else escapes."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


def _print_error(error: Exception | str) -> None:
    print(f"ntdne: {' '.join(str(error).split())}", file=sys.stderr)


def _train(arguments: argparse.Namespace) -> None:
    from ntdne_kernels.experiments.run import finished_results, run
    from ntdne_kernels.experiments.training import make_criterion

    planned = planned_run(arguments)
    settings = planned.settings
    folder = arguments.output or _runs_folder(arguments.data) / planned.subfolder
    check_folder(folder, class_folders(arguments.data))
    make_criterion(settings, torch.tensor([0, 1]))  # names bad options before the images are decoded
    if finished_results(settings, folder) is None:
        _check_weights(settings)
    results = run(settings, planned.variant, folder, _machine(arguments))
    if results is not None:
        _print_metrics(results)
        print(
            f"written to {folder}: last.ckpt, encoder.pt, results.json, figures.npz; next: ntdne report "
            f"{shlex.quote(str(folder))}"
        )


def _check_weights(settings: Settings) -> None:
    """ValueError, before the images are decoded, where the first weights cannot be loaded."""
    from ntdne_kernels.experiments.encoders import HEADS, make_encoder

    if settings.weights and settings.encoder not in HEADS:  # whose shape follows from the features
        with torch.random.fork_rng(devices=[]):
            make_encoder(settings.encoder, settings.dim, settings.weights)


def _evaluate(arguments: argparse.Namespace) -> None:
    from ntdne_kernels.experiments.run import evaluate

    _print_metrics(evaluate(arguments.run, _machine(arguments)))


def _reproduce(arguments: argparse.Namespace) -> None:
    from ntdne_kernels.experiments.run import check_unchanged, finished_results
    from ntdne_kernels.experiments.training import make_criterion

    output = arguments.output or _runs_folder(arguments.data)
    check_folder(output, class_folders(arguments.data))
    planned = planned_grid(arguments)
    for each in planned:  # names a bad option before hours are spent on the runs before it
        make_criterion(each.settings, torch.tensor([0, 1]))
    missing = [each for each in planned if finished_results(each.settings, output / each.subfolder) is None]
    finished = [(each.settings, output / each.subfolder) for each in planned if each not in missing]
    check_unchanged(finished, _machine(arguments))
    print(
        f"{output}: {_counted(len(planned), 'run')}, {len(planned) - len(missing)} of them finished before; "
        f"{_counted(len(missing), 'training')} to do",
        flush=True,
    )
    if missing:
        _check_weights(missing[0].settings)  # the encoder is the same in all
    failed = _run_all(missing, output, _machine(arguments))
    if failed:
        raise ValueError(f"{failed} of {len(missing)} runs failed, see above; the others are finished")
    print(f"next: ntdne report {shlex.quote(str(output))}")


def _run_all(planned: list[PlannedRun], output: Path, machine: "Machine") -> int:
    """Do the runs one after the other, saying what is left; returns how many failed."""
    from ntdne_kernels.experiments.run import run

    failed, seconds = 0, []
    for number, each in enumerate(planned, start=1):
        print(f"run {number} of {len(planned)}", flush=True)
        folder = output / each.subfolder
        start = time.perf_counter()
        try:
            results = run(each.settings, each.variant, folder, machine)
        except USER_ERRORS as error:
            _print_error(f"{folder}: {error}")
            failed += 1
            continue
        if results is not None:
            _print_metrics(results)
            # The results also count the seconds of epochs that were trained before the command was killed.
            seconds.append(max(time.perf_counter() - start, results["seconds"]))
            if number < len(planned):
                left = mean(seconds) * (len(planned) - number)
                print(f"{_counted(len(planned) - number, 'training')} left, about {_duration(left)}", flush=True)
    return failed


def _report(arguments: argparse.Namespace) -> None:
    from ntdne_kernels.experiments.report import write_report

    output = arguments.output or arguments.runs / "report"
    check_folder(output)
    for path in write_report(arguments.runs, output):
        print(path)


def _embed(arguments: argparse.Namespace) -> None:
    from ntdne_kernels.experiments.embedding import FEATURES, FILES, LABELS, embed

    options = {name: value for name, value in vars(arguments).items() if name != "command"}
    found = embed(progress=True, **options)
    N, F = found.features.shape
    left_out = len(found.about["progress"]["unreadable"])
    classes = len(set(found.labels.tolist()) - {""})
    print(
        f"{_counted(N, 'image')} in {classes} class folder{'' if classes == 1 else 's'}, {F} values each"
        + (f"; {_counted(left_out, 'unreadable file')} left out" if left_out else "")
    )
    for name in (FEATURES, LABELS, FILES):
        print(found.folder / name)


def _search(arguments: argparse.Namespace) -> None:
    from ntdne_kernels.experiments.search_sheet import search_files

    head = None
    if arguments.checkpoint is not None:
        from ntdne_kernels.experiments.trained_encoder import load_encoder

        device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
        head = load_encoder(arguments.checkpoint, device)
        if head.image_size is not None:
            raise ValueError(f"--checkpoint: expected a run on features, got {arguments.checkpoint}, a run on images")
    archive, queries = arguments.archive, arguments.queries
    print(search_files(archive, queries, arguments.k, head=head, device=arguments.device, page=arguments.page))
    if arguments.page is not None:
        print(arguments.page)


def _audit(arguments: argparse.Namespace) -> None:
    from ntdne_kernels.experiments.auditing.command import audit

    audit(arguments)


def _relabel(arguments: argparse.Namespace) -> None:
    from ntdne_kernels.experiments.reviewing.command import relabel_archive

    relabel_archive(arguments)


def _machine(arguments: argparse.Namespace) -> "Machine":
    from ntdne_kernels.experiments.run import Machine

    names = {setting.name for setting in dataclasses.fields(Machine)}
    return Machine(**{name: value for name, value in vars(arguments).items() if name in names})


def _runs_folder(data: str) -> Path:
    """Where the runs of an archive go by default."""
    path = Path(data)
    return Path("runs") / as_utf8(archive_name(path) if path.exists() else data.replace(":", "-"))  # for TensorBoard


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
