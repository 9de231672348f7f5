"""What an audit leaves behind: a table with a row for each image, tables of findings, and a list of corrected labels.

Each file is written under another name first, so that it is whole or not there. Inputs are never written to.

Shapes: N images.
"""

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ntdne_kernels.audit import LabelAudit
from ntdne_kernels.experiments.auditing.findings import NAMES
from ntdne_kernels.experiments.auditing.inputs import Source
from ntdne_kernels.experiments.features import as_utf8
from ntdne_kernels.experiments.files import check_folder, write_whole
from ntdne_kernels.experiments.reviewing import review
from ntdne_kernels.interchange import to_frame

if TYPE_CHECKING:
    import pandas as pd

PAGE, CORRECTED, FINDINGS, SOURCE = "audit.html", "corrected.csv", "findings", "source.json"
FORMATS = ("csv", "parquet")


def check_output(folder: Path, inputs: list[Path], archive: Path | None, format: str) -> None:
    """Check before the audit what would otherwise fail after it.

    Args:
        folder: for the outputs.
        inputs: files that are read.
        archive: folder of class folders, if there is one.
        format: of the table.

    Raises:
        ValueError: the folder lies in the archive, cannot be written to, or has an input by an output's name, or files
            of others where the review's would be; or what writes the format is not installed.
    """
    check_folder(folder, archive)
    for name in (f"audit.{format}", CORRECTED, PAGE, *(f"{FINDINGS}/{name}.{format}" for name in NAMES)):
        path = folder / name
        if path.exists() and any(file.exists() and path.samefile(file) for file in inputs):
            raise ValueError(f"--output: {path} is read from, and would be replaced; give another folder")
    review.check_review(folder)
    for module in ("pandas", "pyarrow") if format == "parquet" else ("pandas",):
        try:
            importlib.import_module(module)
        except ImportError:
            raise ValueError(f"a table as .{format} needs {module}: pip install 'ntdne_kernels[audit]'") from None


def earlier_outputs(folder: Path, written: list[Path]) -> list[Path]:
    """Files that an earlier audit left in the folder and that were not replaced by those written now."""
    tables = ("audit", *(f"{FINDINGS}/{name}" for name in NAMES))
    files = (*(f"{name}.{format}" for format in FORMATS for name in tables), CORRECTED, review.PAGE)
    paths = [folder / name for name in files]
    return [path for path in paths if path.exists() and path not in written]


def write_source(source: Source, folder: Path) -> None:
    """Write source.json, by which a later audit knows whether it would replace that of another archive."""
    content = json.dumps({"source": source.origin}).encode()
    write_whole(folder / SOURCE, lambda file: file.write(content))


def write_table(audit: LabelAudit, source: Source, method: str | float | None, path: Path) -> None:
    """Write the table of `to_frame`, with a first column `image`, as .csv or .parquet.

    Without a method no suspects are chosen, and `is_label_issue` holds missing values.
    """
    frame = to_frame(audit, paths=source.paths, **({} if method is None else {"method": method}))
    if method is None:
        frame["is_label_issue"] = frame["is_label_issue"].astype("boolean").mask(frame["rank"] > 0)
    frame.insert(0, "image", range(len(frame)))
    _write_frame(frame, path)


def write_findings(tables: "dict[str, pd.DataFrame]", folder: Path, format: str) -> list[Path]:
    """Write the tables of `find_all` into a folder of their own, as .csv or .parquet; the files."""
    folder.mkdir(exist_ok=True)
    files = [folder / f"{name}.{format}" for name in tables]
    for file, frame in zip(files, tables.values(), strict=True):
        _write_frame(frame, file)
    return files


def write_corrected(audit: LabelAudit, source: Source, method: str | float, path: Path) -> None:
    """Write a list (path or image, label) of all images, in which suspects have the suggested label."""
    import pandas as pd

    labels = audit.corrected(method)
    frame = pd.DataFrame({"label": pd.Categorical.from_codes(labels.numpy(), list(audit.classes))})
    if source.paths is None:
        frame.insert(0, "image", range(len(labels)))
    else:
        frame.insert(0, "path", pd.Series(source.paths, dtype=object))
    _write_csv(frame, path)


def _write_frame(frame: "pd.DataFrame", path: Path) -> None:
    if path.suffix == ".csv":
        _write_csv(frame, path)
        return
    if "path" in frame:  # Parquet stores text as UTF-8
        frame = frame.assign(path=[as_utf8(name) for name in frame["path"]])
    write_whole(path, lambda file: frame.to_parquet(file, index=False))


def _write_csv(frame: "pd.DataFrame", path: Path) -> None:
    write_whole(path, lambda file: frame.to_csv(file, index=False, encoding="utf-8", errors="surrogateescape"))
