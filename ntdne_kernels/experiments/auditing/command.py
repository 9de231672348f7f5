"""The command `ntdne audit`: its arguments checked, an audit written, and what is printed of it."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from ntdne_kernels.audit import LabelAudit
from ntdne_kernels.experiments.arguments import WORDS
from ntdne_kernels.experiments.auditing import (
    SOURCE,
    AuditOptions,
    Source,
    check_output,
    earlier_outputs,
    encode_features,
    encode_folder,
    origin_of,
    read_source,
    write_audit,
)
from ntdne_kernels.experiments.auditing.inputs import archive_folder
from ntdne_kernels.experiments.features import archive_name, features_file
from ntdne_kernels.experiments.files import check_source, locked


def audit(arguments: argparse.Namespace) -> None:
    """Audit what the arguments name.

    Raises:
        ValueError: the arguments contradict each other, or an input is not as described.
        OSError: a file cannot be read or written.
    """
    data, checkpoint = Path(arguments.data).expanduser(), arguments.checkpoint
    images = data.is_dir() or arguments.data in WORDS or arguments.data.startswith("made:")
    images &= features_file(arguments.data) is None
    _check(arguments, data, images)
    output = arguments.output or Path("audit") / archive_name(data).replace(":", "-")
    inputs = [data, checkpoint, arguments.labels, arguments.paths, *arguments.decisions]
    inputs = [file for file in inputs if file is not None]
    check_output(output, inputs, archive_folder(arguments.data), arguments.format)
    with locked(output):
        origin = origin_of(arguments.data)
        check_source(output / SOURCE, origin)
        _audit_into(output, arguments, data, images, origin)


def _audit_into(output: Path, arguments: argparse.Namespace, data: Path, images: bool, origin: str) -> None:
    """Write the audit, and print what it says."""
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    source = replace(_source(arguments, data, images, device), origin=origin)
    result, written = write_audit(
        source,
        output,
        AuditOptions(
            sigma=arguments.sigma,
            method=arguments.threshold,
            top=arguments.top,
            force=arguments.force,
            format=arguments.format,
            fix=arguments.fix,
            worst=arguments.worst,
            neighbours=arguments.neighbours,
            review=arguments.review,
            device=device,
            dtype=getattr(torch, arguments.dtype),
            scratch=arguments.scratch,
            decisions=tuple(arguments.decisions),
            conflicts=arguments.conflicts,
        ),
    )
    _print_summary(result, source, arguments)
    for path in written:
        print(path)
    for path in earlier_outputs(output, written):
        print(f"ntdne: {path} is of an earlier audit", file=sys.stderr)
    if arguments.fix and result.doubt and not arguments.force:
        raise ValueError(
            f"--fix: no corrected list was written, as most suspects would be right labels: {result.doubt}; --force "
            "writes it all the same"
        )


def _check(arguments: argparse.Namespace, data: Path, images: bool) -> None:
    """ValueError where the arguments do not fit what is audited."""
    if not images and not data.exists():
        raise ValueError(f"{data}: no such file or folder")
    if images and arguments.checkpoint is None:
        raise ValueError(f"{data} holds images: --checkpoint names the run that encodes them; or give their features")
    if images and any([arguments.labels, arguments.paths, arguments.images]):
        raise ValueError("--labels, --paths and --images are for features; the labels of images are their folders")
    if arguments.scratch is not None and not arguments.scratch.is_dir():
        raise ValueError(f"--scratch: expected a folder, got {arguments.scratch}")


def _source(arguments: argparse.Namespace, data: Path, images: bool, device: str) -> Source:
    if images:
        return encode_folder(
            arguments.data,
            arguments.checkpoint,
            cache=arguments.cache,
            download=arguments.download,
            device=device,
            max_pixels=arguments.max_pixels,
        )
    columns = {content: getattr(arguments, f"{content}_column") for content in ("features", "label", "path")}
    source = read_source(
        data,
        arguments.labels,
        arguments.paths,
        arguments.images,
        columns,
        max_pixels=arguments.max_pixels,
    )
    return source if arguments.checkpoint is None else encode_features(source, arguments.checkpoint, device)


def _print_summary(audit: LabelAudit, source: Source, arguments: argparse.Namespace) -> None:
    judged = int(audit.judged.sum())
    summary = f"{len(audit)} images, {len(audit.classes)} classes: "
    if judged == 0:
        summary += "no label could be judged: no two images carry the same one"
    elif audit.doubt and not arguments.force:
        summary += f"{judged} judged labels are ranked, the most suspect first"
    else:
        suspects = int(audit.suspects(arguments.threshold).sum())
        summary += f"{suspects} of {judged} judged labels are suspect; about "
        summary += f"{100 * audit.noise_rate:.1f} % are estimated to be wrong"
    if audit.checked.any() or audit.unsure.any():
        print(_said_by_decisions(audit))
    if judged and audit.doubt:
        print(f"how many labels are wrong cannot be said from these features: {audit.doubt}")
    summary += f"; {len(source.unreadable)} unreadable files left out" if source.unreadable else ""
    print(f"{summary}; sigma {audit.sigma:g}")


def _said_by_decisions(audit: LabelAudit) -> str:
    """What people have found, and what follows for the labels that nobody has checked."""
    checked, wrong = int(audit.checked.sum()), int(audit.wrong.sum())
    found = f"{checked} labels are checked, {wrong} of them were wrong"
    excluded = int((audit.checked & (audit.decided < 0)).sum())
    found += f", {excluded} images are excluded" if excluded else ""
    unsure = int((audit.unsure & ~audit.checked).sum())
    found += f"; of {unsure} people cannot tell, and they come last" if unsure else ""
    if audit.uncalibrated:
        return f"{found}; how many others are wrong is not said by decisions yet: {audit.uncalibrated}"
    others = audit.wrong_probability[~audit.checked].nansum()
    return f"{found}; by these decisions about {float(others):.0f} of the {len(audit) - checked} others are wrong"
