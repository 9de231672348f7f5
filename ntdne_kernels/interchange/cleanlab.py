"""A label audit as pandas and cleanlab have it. Both are imported only where they are used.

pandas writes the table of an audit and reads it again. Parquet keeps everything. A CSV keeps every value too, but by
default `read_csv` takes the class "01" for the number 1 and the class "NA" for a missing label:

    to_frame(audit, paths=paths).to_csv("audit.csv", index=False)
    pandas.read_csv("audit.csv", keep_default_na=False, na_values=[""],
                    dtype={"path": str, "given_label": str, "predicted_label": str, "duplicate_of": "Int64"})

FiftyOne reads that file as its CSVDataset (absolute paths, or names in `data_path`). Fields that are not text need a
function:

    fiftyone.Dataset.from_dir(
        dataset_type=fiftyone.types.CSVDataset, labels_path="audit.csv", media_field="path",
        fields={"given_label": lambda name: fiftyone.Classification(label=name), "label_score": float})

Shapes: N images, C classes.
"""

import os
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from ntdne_kernels.audit import LabelAudit

if TYPE_CHECKING:
    import pandas as pd


def to_frame(
    audit: LabelAudit, *, paths: Iterable[str | os.PathLike[str]] | None = None, method: str | float = "rate"
) -> "pd.DataFrame":
    """The audit as a table: a row for each image, in order. Columns that cleanlab's Datalab has too have its names.

        path             the image's path; only where `paths` are given
        given_label      its label, categorical; missing where unlabelled
        predicted_label  the suggested class, categorical: the one with the largest share
        is_label_issue   whether it is a suspect
        label_score      quality of its label in [0, 1], low is suspect; NaN where not judged
        rank             its place in the ranking; 1 is the most suspect, see `LabelAudit.ranking` for the last ones
        score            p: the share of its neighbourhood that carries its label (eq. 4); NaN where unlabelled
        label_share      the share of its label, with the ridge regression where the audit has one; NaN where not judged
        suggested_share  the share of the suggested class
        log_density      log of the mean of exp(f_i·f_j/σ) over the other images
        duplicate_of     the first image with exactly the same features; missing where there is none before it
        conflicting      whether an exact copy carries another label

    Where people decided on some of the labels, also

        checked            whether a person has checked the label
        decided_label      the label as it is now known, categorical: the given one, but where a person changed it;
                           missing where unlabelled or excluded
        wrong_probability  how probably the label is wrong; NaN where decisions are too few to say, and where not judged

    Example:
        >>> from ntdne_kernels.audit import audit_labels
        >>> features = torch.tensor([[9, 0], [9, 1], [9, 2], [9, 3], [0, 9], [1, 9], [2, 9]]).float()
        >>> audit = audit_labels(features, ["ash", "ash", "ash", "oak", "oak", "oak", "oak"])
        >>> frame = to_frame(audit, paths=[f"{image}.png" for image in range(7)])
        >>> frame.loc[frame["is_label_issue"], ["path", "given_label", "predicted_label"]].values.tolist()
        [['3.png', 'oak', 'ash']]

    Args:
        audit: of N images.
        paths: N paths, by position.
        method: which labels are suspects, as in `LabelAudit.suspects`.

    Raises:
        ImportError: pandas is missing.
        TypeError: method is neither text nor a number.
        ValueError: there are not as many paths as images, or method is unknown.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise ImportError("to_frame needs pandas: pip install 'ntdne_kernels[audit]'") from error

    columns: dict[str, Any] = {}
    if paths is not None:
        names = [os.fsdecode(path) for path in paths]
        if len(names) != len(audit):
            raise ValueError(f"paths: expected one for each of the {len(audit)} images, got {len(names)}")
        columns["path"] = pd.Series(names, dtype=object)  # pandas' str refuses file names that are not UTF-8
    rank = torch.empty_like(audit.ranking)
    rank[audit.ranking] = torch.arange(1, len(audit) + 1, device="cpu")
    columns |= {
        "given_label": pd.Categorical.from_codes(audit.labels.numpy(), list(audit.classes)),
        "predicted_label": pd.Categorical.from_codes(audit.suggested.numpy(), list(audit.classes)),
        "is_label_issue": audit.suspects(method).numpy(),
        "label_score": audit.quality.numpy(),
        "rank": rank.numpy(),
        "score": audit.score.numpy(),
        "label_share": audit.label_share.numpy(),
        "suggested_share": audit.suggested_share.numpy(),
        "log_density": audit.log_density.numpy(),
        "duplicate_of": pd.arrays.IntegerArray(audit.duplicate_of.numpy(), (audit.duplicate_of < 0).numpy()),
        "conflicting": audit.conflicting.numpy(),
    }
    if audit.checked.any() or audit.unsure.any():
        columns |= {
            "checked": audit.checked.numpy(),
            "decided_label": pd.Categorical.from_codes(audit.decided.numpy(), list(audit.classes)),
            "wrong_probability": audit.wrong_probability.numpy(),
        }
    return pd.DataFrame(columns)


def pred_probs(audit: LabelAudit) -> NDArray[np.floating[Any]]:
    """The leave-one-out class shares as cleanlab's functions take them: (N, C), classes in order of code.

    A row sums to 1; in an audit without the ridge, to 1 minus the share of unlabelled neighbours. cleanlab knows no
    unlabelled images: give its functions the rows where `audit.labels` is not −1, beside these labels.

    Example:
        >>> from ntdne_kernels.audit import audit_labels
        >>> features = torch.tensor([[9, 0], [9, 1], [9, 2], [9, 3], [0, 9], [1, 9], [2, 9]]).float()
        >>> pred_probs(audit_labels(features, [0, 0, 0, 1, 1, 1, 1]))[3].round(2).tolist()
        [0.99, 0.01]

    Raises:
        ValueError: the audit kept only the largest shares of each image, so the others are unknown.
    """
    kept, C = audit.top_shares.size(1), len(audit.classes)
    if kept < C:
        raise ValueError(f"audit: expected the shares of all {C} classes, got the largest {kept}; audit with top={C}")
    shares = audit.top_shares.new_zeros((len(audit), C))
    return shares.scatter_(1, audit.top_classes, audit.top_shares).numpy()


def noise_matrix(audit: LabelAudit) -> NDArray[np.floating[Any]]:
    """P(given label | true class) as cleanlab has it: (C, C), [given, true], each column with the sum 1.

    The transpose of `audit.transition`.

    Example:
        >>> from ntdne_kernels.audit import audit_labels
        >>> features = torch.tensor([[9, 0], [9, 1], [9, 2], [9, 3], [0, 9], [1, 9], [2, 9]]).float()
        >>> noise_matrix(audit_labels(features, [0, 0, 0, 1, 1, 1, 1])).tolist()
        [[0.75, 0.0], [0.25, 1.0]]

    Raises:
        ValueError: there are too many classes for a matrix.
    """
    return audit.transition.T.numpy()


@cache
def register_issue_manager() -> type:
    """Give cleanlab's Datalab a type of issue, "ntdne_label", that reports an audit; once in a process.

        register_issue_manager()
        lab = cleanlab.Datalab(frame, label_name="label")
        lab.find_issues(issue_types={"ntdne_label": {"audit": audit, "method": "rate"}})
        lab.get_issues("ntdne_label")  # is_ntdne_label_issue, ntdne_label_score

    The score of an image is its label's quality, and that of the whole data is 1 − the estimated noise rate. Datalab
    knows no images that were not judged: they score 1 and are no issue, and `num_not_judged` of the info counts them.
    Datalab wants a label for each image: where some have none, leave `label_name` out. Its `get_issues("label")` takes
    all columns with "label" in their names, and so shows ours beside its own.

    Returns:
        The registered IssueManager.

    Raises:
        ImportError: cleanlab is missing.
    """
    try:
        from cleanlab.datalab.internal.issue_manager import IssueManager
        from cleanlab.datalab.internal.issue_manager_factory import register
    except ImportError as error:
        raise ImportError("Datalab needs cleanlab: pip install cleanlab datasets") from error

    class AuditIssueManager(IssueManager):  # type: ignore[misc]  # cleanlab has no types
        issue_name = "ntdne_label"
        description = "Examples whose given label is not the one that all others foretell by their features."
        verbosity_levels: ClassVar = {0: [], 1: ["noise_rate", "num_not_judged"], 2: [], 3: []}

        def __init__(self, datalab: Any, audit: LabelAudit, method: str | float = "rate", **_: Any) -> None:
            # What may fail is done here: where find_issues raises, Datalab prints the error and goes on.
            super().__init__(datalab)
            if len(audit) != len(datalab.data):
                raise ValueError(f"audit: expected one of the Datalab's {len(datalab.data)} examples, got {len(audit)}")
            self.frame = to_frame(audit, method=method)
            self.noise_rate, self.sigma = audit.noise_rate, audit.sigma

        def find_issues(self, **_: Any) -> None:
            columns = {"is_label_issue": "is_ntdne_label_issue", "label_score": "ntdne_label_score"}
            self.issues = self.frame[list(columns)].rename(columns=columns).fillna({"ntdne_label_score": 1.0})
            self.summary = self.make_summary(score=1 - self.noise_rate)
            self.info = self.collect_info()

        def collect_info(self) -> dict[str, Any]:
            """What Datalab's get_info shows, named as in its own "label" where that has the same."""
            return {
                "num_label_issues": int(self.frame["is_label_issue"].sum()),
                "average_label_quality": float(self.frame["label_score"].mean()),
                "sigma": self.sigma,
                "num_not_judged": int(self.frame["label_score"].isna().sum()),
                "noise_rate": self.noise_rate,
                "given_label": self.frame["given_label"].tolist(),
                "predicted_label": self.frame["predicted_label"].tolist(),
            }

    registered: type = register(AuditIssueManager)
    return registered
