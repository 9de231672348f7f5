"""The numbers the paper prints in Tables I to IV, for tables that show ours beside them.

paper_results.csv has them in percent: a row per metric, dataset, noise and rate, a column per method. To be read with
care:

- "map20": eq. 18 divides the average precision at R = 20 by all relevant images, of which a class has hundreds. That
  caps it near 0.09; Table IV has 0.40 to 0.97, so another normaliser was used (the hits among the 20, or 20 at most).
- D-CNN on NWPU-RESISC45 with uniform noise scores higher at η = 0.5 than at 0.3 in all four tables (K-NN: 88.62 after
  81.92), which looks like a misprint.
- MAE with label-dependent noise has the same four values in Table IV for both datasets.

Missing are Table I for NWPU-RESISC45 with label-dependent noise from 0.3 up, and Table IV for NTDNE.
"""

import csv
from functools import cache
from importlib.resources import files

METHODS = ("D-CNN", "Triplet", "NSL", "SNCA", "ArcFace", "MAE", "SCE", "t-RNSL", "NTDNE")  # in the order of the tables


def published(metric: str, dataset: str, noise: str, rate: float, method: str) -> float | None:
    """A number of the paper as a share of 1, or None where it has none.

    Args:
        metric: "knn" (Table I), "nmi" (II), "acc" (III) or "map20" (IV).
        dataset: "AID" or "NWPU-RESISC45".
        noise: "uniform" or "label-dependent".
        rate: noise rate η; the paper has 0.1, 0.3, 0.5 and 0.7.
        method: as the paper writes it, for instance "D-CNN" or "NTDNE".

    Example:
        >>> published("knn", "AID", "uniform", 0.5, "NTDNE")
        0.9025
    """
    percent = _rows().get((metric, dataset, noise, rate), {}).get(method)
    return round(float(percent) / 100, 4) if percent else None


@cache
def _rows() -> dict[tuple[str, str, str, float], dict[str, str]]:
    text = files(__package__).joinpath("paper_results.csv").read_text(encoding="utf-8")
    return {
        (row["metric"], row["dataset"], row["noise"], float(row["rate"])): row
        for row in csv.DictReader(text.splitlines())
    }
