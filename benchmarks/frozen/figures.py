"""The figure of the results on frozen features: K-NN accuracy over the noise rate."""

from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.frozen.losses import OURS
from benchmarks.frozen.results import read
from benchmarks.frozen.tables import UNTUNED, by_run, cells_of, columns_of, own, standard_error

STYLES: dict[str, dict[str, Any]] = {  # ours black; the others in Paul Tol's "muted", made for the colour-blind
    UNTUNED: {"color": "#000000", "linewidth": 2.5, "zorder": 3},
    OURS: {"color": "#000000", "linestyle": "--"},
    "NTDNE, paper": {"color": "#000000", "linestyle": ":"},
    "t-RNSL": {"color": "#882255"},
    "GCE": {"color": "#117733"},
    "SNCA": {"color": "#332288"},
    "ArcFace": {"color": "#88CCEE"},
    "cross-entropy": {"color": "#CC6677", "linewidth": 2},
    "SCE": {"color": "#44AA99"},
    "MAE": {"color": "#999933"},
    "NSL": {"color": "#DDCC77"},
    "D-CNN": {"color": "#AA4499", "linestyle": "--"},
    "Triplet": {"color": "#777777", "linestyle": "-."},
}
"""Lines of the losses, in the order of the legend."""


def plot(results: Path, file: Path) -> None:
    """Draw a panel for each kind of noise; each loss but `UNTUNED` has its own learning rate. Bars are standard errors.

    Raises:
        ValueError: There is no result yet.
    """
    rows = read(results)
    cells = cells_of(by_run(rows), "knn", partial(own, rows))
    if not cells:
        raise ValueError(f"results: expected runs of the grid in {results}, got none")
    noises = list(dict.fromkeys(column.noise for column in columns_of(cells)))
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots(1, len(noises), sharey=True, squeeze=False)[0]
    for axis, noise in zip(axes, noises, strict=True):
        for method in STYLES:
            columns = [column for column in columns_of(cells) if column.noise == noise and (column, method) in cells]
            found = {column.rate: cells[column, method] for column in columns}
            means = [values.mean() for values in found.values()]
            errors = [standard_error(values) for values in found.values()]
            axis.errorbar(list(found), means, errors, label=method, marker="o", markersize=4, **STYLES[method])
        axis.grid(alpha=0.3)
        axis.set(title=f"{noise} noise", xlabel="share of wrong labels", xticks=sorted(found))
    axes[0].set_ylabel("K-NN accuracy by right labels, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
