"""The command `ntdne relabel`: its arguments checked, labels written, and what is printed of the changes."""

import argparse
from pathlib import Path

from ntdne_kernels.experiments.auditing.inputs import archive_folder, origin_of, run_folder
from ntdne_kernels.experiments.features import archive_name
from ntdne_kernels.experiments.images import MAX_PIXELS
from ntdne_kernels.experiments.reviewing.decisions import ConflictError, Decisions
from ntdne_kernels.experiments.reviewing.exports import exports
from ntdne_kernels.experiments.reviewing.labelled import decisions_on, read_labelled
from ntdne_kernels.experiments.reviewing.relabel import Relabelled, check_output, relabel
from ntdne_kernels.experiments.settings import SMALLEST_IMAGE
from ntdne_kernels.experiments.sources import Decoding


def relabel_archive(arguments: argparse.Namespace) -> None:
    """Write the labels of what the arguments name, with the decisions on them.

    Raises:
        ValueError: the arguments contradict each other, or an input is not as described.
        OSError: a file cannot be read or written.
    """
    data = Path(arguments.data).expanduser()
    output = arguments.output or Path("relabelled") / archive_name(data).replace(":", "-")
    folder = arguments.images or archive_folder(arguments.data)
    inputs = [data, arguments.labels, arguments.paths, arguments.scores, *arguments.decisions]
    check_output(output, [file for file in inputs if file is not None and file.is_file()], folder)
    columns = {content: getattr(arguments, f"{content}_column") for content in ("features", "label", "path")}
    archive = read_labelled(
        arguments.data,
        arguments.labels,
        arguments.paths,
        arguments.images,
        columns,
        arguments.cache,
        _decoding(arguments.checkpoint, arguments.max_pixels),
    )
    try:
        archive, decisions = decisions_on(archive, arguments.decisions, arguments.conflicts)
    except ConflictError as error:
        for image, said in error.conflicts.items():
            print(f"{image}: {', '.join(f'{verdict} in {file}' for file, verdict in said.items())}")
        raise ValueError(f"{error}; --conflicts latest takes the latest of each, --conflicts skip none") from None
    found = relabel(
        archive,
        decisions,
        output,
        links=arguments.links,
        drop_unsure=arguments.drop_unsure,
        exports=exports(archive, decisions, arguments.export, arguments.scores),
        origin=origin_of(arguments.data),
    )
    _print_changes(found, decisions, archive.name)
    for path in found.written:
        print(path)


def _decoding(run: Path | None, max_pixels: int | None) -> Decoding:
    """How an audit with these arguments read files; the size of images does not matter here."""
    if run is None:
        return Decoding(SMALLEST_IMAGE, max_pixels=max_pixels or MAX_PIXELS)
    from ntdne_kernels.experiments.run import read_settings  # imports Lightning

    settings, _ = read_settings(run_folder(run))
    return Decoding(SMALLEST_IMAGE, settings.bands, max_pixels or settings.max_pixels)


def _print_changes(found: Relabelled, decisions: Decisions, name: str) -> None:
    counts = decisions.counts()
    said = ", ".join(f"{counts[verdict]} {verdict}" for verdict in counts if counts[verdict])
    print(f"{name}: {len(decisions)} decisions on {len(found.labels)} images" + (f": {said}" if said else ""))
    rows = [
        (old or "(no label)", new or "(left out)", images)
        for (old, new), images in sorted(
            found.changes.items(), key=lambda item: (-item[1], item[0][0], item[0][1] or "")
        )
    ]
    width = max((len(old) + len(new) for old, new, _ in rows), default=0)
    for old, new, images in rows:
        print(f"  {old} → {new}{' ' * (width - len(old) - len(new))}  {images}")
    if not rows:
        print("  no label changes")
    classes = sorted({label for label in found.labels if label} - set(found.given))
    if classes:
        print(f"new classes: {', '.join(classes)}")
    empty = sorted(set(found.given) - {""} - {label for label in found.labels if label})
    if empty:
        print(f"classes without an image any more: {', '.join(empty)}")
    if found.renamed:
        print(f"{found.renamed} links have another name than their images, which was taken")
