"""The review of an archive's labels by people, and what follows from their decisions."""

from ntdne_kernels.experiments.reviewing.decisions import (
    VERDICTS,
    ConflictError,
    Decisions,
    OtherArchiveError,
    archive_id,
    image_names,
    read_decisions,
)

__all__ = ["VERDICTS", "ConflictError", "Decisions", "OtherArchiveError", "archive_id", "image_names", "read_decisions"]
