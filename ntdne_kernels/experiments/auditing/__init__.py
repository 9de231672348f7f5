"""The audit of an archive's labels as files: `ntdne audit`."""

import sys
from pathlib import Path

import torch
from torch import Tensor

from ntdne_kernels.audit import LabelAudit, audit_bank, feature_bank
from ntdne_kernels.experiments.auditing.findings import find_all
from ntdne_kernels.experiments.auditing.inputs import Source, encode_features, encode_folder, origin_of, read_source
from ntdne_kernels.experiments.auditing.options import AuditOptions
from ntdne_kernels.experiments.auditing.outputs import (
    CORRECTED,
    FINDINGS,
    PAGE,
    SOURCE,
    check_output,
    earlier_outputs,
    write_corrected,
    write_findings,
    write_source,
    write_table,
)
from ntdne_kernels.experiments.auditing.page import audit_page
from ntdne_kernels.experiments.files import write_whole
from ntdne_kernels.experiments.reviewing.decisions import EXCLUDE, KEEP, RELABEL, UNSURE, read_decisions
from ntdne_kernels.experiments.reviewing.review import write_review
from ntdne_kernels.labels import encode_labels

__all__ = [
    "SOURCE",
    "AuditOptions",
    "Source",
    "check_output",
    "earlier_outputs",
    "encode_features",
    "encode_folder",
    "origin_of",
    "read_source",
    "write_audit",
]


def write_audit(source: Source, folder: Path, options: AuditOptions) -> tuple[LabelAudit, list[Path]]:
    """Audit labels, and write the tables, the page, the review and, for `fix`, the corrected list into a folder.

    Where the features cannot carry a noise rate (`LabelAudit.doubt`), no label is called a suspect or corrected, unless
    `force` says so.

    Args:
        source: what is audited.
        folder: see `check_output`.
        options: how labels are judged and what is written.

    Returns:
        The audit, and the files, the page first.

    Raises:
        TypeError, ValueError, OSError: as `audit_labels` and `read_decisions`, or a file cannot be written.
    """
    progress = sys.stderr.isatty()
    labels, classes = encode_labels(source.labels)
    given: Tensor | None = None
    checked, unsure = torch.zeros((2, len(labels)), dtype=torch.bool)
    if options.decisions:
        decisions = read_decisions(options.decisions, source.paths, source.labels, options.conflicts)
        given = labels
        labels, classes = decisions.apply(source.labels)
        checked[decisions.having(KEEP, RELABEL, EXCLUDE)] = True
        unsure[decisions.having(UNSURE)] = True
    bank = feature_bank(
        source.features,
        labels,
        device=options.device,
        dtype=options.dtype,
        scratch=options.scratch,
        progress=progress,
    )
    sigma = source.sigma if options.sigma is None else options.sigma
    audit = audit_bank(
        bank,
        sigma=sigma or "auto",
        top=options.top,
        progress=progress,
        classes=classes,
        checked=checked,
        given=given,
        unsure=unsure,
        near_copies=True,
    )
    method = options.method if options.force or not audit.doubt else None
    tables = find_all(audit, bank, source, trusted=method is not None)
    shown = {"worst": options.worst, "neighbours": options.neighbours}
    html = audit_page(audit, bank, source, tables, method=method, **shown)
    folder.mkdir(parents=True, exist_ok=True)
    write_source(source, folder)
    table, corrected, page = (folder / name for name in (f"audit.{options.format}", CORRECTED, PAGE))
    write_table(audit, source, method, table)
    written = [page, table, *write_findings(tables, folder / FINDINGS, options.format)]
    if options.fix and method is not None:
        write_corrected(audit, source, method, corrected)
        written.append(corrected)
    write_whole(page, lambda file: file.write(html.encode(errors="replace")))
    if options.review != 0:
        K, count = options.neighbours, options.review
        written.insert(1, write_review(audit, bank, source, folder, method=method, count=count, neighbours=K))
    return audit, written
