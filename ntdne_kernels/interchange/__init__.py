"""Audits and decisions on labels, as pandas, cleanlab and annotation tools have them."""

from ntdne_kernels.interchange.annotation_tools import to_cvat, to_fiftyone, to_label_studio
from ntdne_kernels.interchange.cleanlab import noise_matrix, pred_probs, register_issue_manager, to_frame

__all__ = [
    "noise_matrix",
    "pred_probs",
    "register_issue_manager",
    "to_cvat",
    "to_fiftyone",
    "to_frame",
    "to_label_studio",
]
