"""The audit of an archive's labels as files: `ntdne audit`."""

import sys
from pathlib import Path

import torch

from ntdne_kernels.audit import LabelAudit, audit_bank, feature_bank
from ntdne_kernels.experiments.auditing.inputs import Source, encode_folder, read_features
from ntdne_kernels.experiments.auditing.outputs import (
    CORRECTED,
    PAGE,
    check_output,
    left_over,
    write_corrected,
    write_table,
)
from ntdne_kernels.experiments.auditing.page import as_html
from ntdne_kernels.experiments.files import write_whole
from ntdne_kernels.labels import encode_labels

__all__ = ["Source", "check_output", "encode_folder", "left_over", "read_features", "write_audit"]


def write_audit(
    source: Source,
    folder: Path,
    *,
    sigma: float | None = None,
    method: str | float = "rate",
    top: int = 10,
    neighbours: int = 5,
    worst: int = 8,
    format: str = "csv",
    fix: bool = False,
    force: bool = False,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    scratch: Path | None = None,
) -> tuple[LabelAudit, list[Path]]:
    """Audit labels, and write the table, the page and, for `fix`, the corrected list into a folder.

    Where the features cannot carry a noise rate (`LabelAudit.doubt`), no label is called a suspect or corrected.

    Args:
        source: what is audited.
        folder: see `check_output`.
        sigma: temperature; None: that of the source.
        method: of choosing the suspects, see `LabelAudit.suspects`.
        top, device, dtype, scratch: as in `audit_labels`.
        neighbours, worst: as in `as_html`.
        format: of the table: csv or parquet.
        force: treat the features as if they could carry a rate.

    Returns:
        The audit, and the files, the page first.

    Raises:
        TypeError, ValueError, OSError: as `audit_labels`, or a file cannot be written.
    """
    progress = sys.stderr.isatty()
    codes, classes = encode_labels(source.labels)
    bank = feature_bank(source.features, codes, device=device, dtype=dtype, scratch=scratch, progress=progress)
    sigma = source.sigma if sigma is None else sigma
    audit = audit_bank(bank, sigma=sigma, top=top, progress=progress, classes=classes)
    judging = force or not audit.doubt
    text = as_html(audit, bank, source, method=method if judging else None, worst=worst, neighbours=neighbours)
    folder.mkdir(parents=True, exist_ok=True)
    table, fixed, html = (folder / name for name in (f"audit.{format}", CORRECTED, PAGE))
    write_table(audit, source, method if judging else None, table)
    fix = fix and judging
    if fix:
        write_corrected(audit, source, method, fixed)
    write_whole(html, lambda file: file.write(text.encode(errors="replace")))
    return audit, [html, table, *([fixed] if fix else [])]
