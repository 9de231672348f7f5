"""What the page shows of images and numbers: thumbnails, a histogram and a heat map, as text that a page can hold.

Shapes: N images, C classes.
"""

import base64
import io
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ntdne_kernels.audit import LabelAudit

THUMBNAIL = 96  # pixels
TINY = 32  # pixels; JPEG would blur such small pictures
FORMATS = {"png": ".png", "jpeg": ".jpg"}  # and how the names of their files end
BINS = 50
SUSPECT, NOT_SUSPECT, DIAGONAL = "#D55E00", "#BBBBBB", "#777777"
BY_CLASS = ("auto",)  # methods whose threshold differs from class to class
MAX_DRAWN_CLASSES = 40  # beyond, a heat map cannot be read
MAX_CLASSES_WITH_NUMBERS = 16
MAX_NAME_LENGTH = 24
DPI = 110


def thumbnails(picture: Callable[[int], Image.Image], images: Iterable[int]) -> dict[int, str]:
    """A small picture of each image as a data URI; those that cannot be opened are left out."""
    return {
        image: f"data:image/{format};base64,{base64.b64encode(small).decode()}"
        for image, small, format in small_pictures(picture, images, THUMBNAIL)
    }


def small_pictures(
    picture: Callable[[int], Image.Image], images: Iterable[int], size: int
) -> Iterator[tuple[int, bytes, str]]:
    """Each image that can be opened, with its picture of at most size×size pixels as a file, and the file's format."""
    wanted = list(images)
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda image: _small_picture(picture, image, size), wanted)
        progress = tqdm(found, "Drawing thumbnails", len(wanted), unit="image", leave=False, disable=None)
        for image, (small, format) in zip(wanted, progress, strict=True):
            if small:
                yield image, small, format


def _small_picture(picture: Callable[[int], Image.Image], image: int, size: int) -> tuple[bytes, str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata
            shown = picture(image)
    except (ValueError, OSError, MemoryError):  # no image that can be read
        return b"", ""
    shown.thumbnail((size, size))
    file, format = io.BytesIO(), "png" if max(shown.size) <= TINY else "jpeg"
    shown.save(file, format, quality=80)
    return file.getvalue(), format


def quality_histogram(audit: LabelAudit, suspects: Tensor, method: str | float) -> str:
    """Histogram of the labels' quality, suspects apart, with the threshold where it is one number, as a data URI.

    Where the method is a threshold k on the score, it is a histogram of the scores.
    """
    by_score = not isinstance(method, str)
    values = (audit.score if by_score else audit.quality)[audit.judged].numpy()
    wrong = suspects[audit.judged].numpy()
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    axis = figure.subplots()
    axis.hist(
        [values[wrong], values[~wrong]],
        bins=np.linspace(0, 1, BINS + 1).tolist(),
        stacked=True,
        color=[SUSPECT, NOT_SUSPECT],
        hatch=["////", ""],
        edgecolor="white",
        linewidth=0.3,
        label=["suspect", "not suspect"],
    )
    if by_score or (method not in BY_CLASS and wrong.any()):
        threshold = float(method if by_score else values[wrong].max())
        axis.axvline(threshold, color="black", linestyle="--", label=f"threshold {threshold:.3g}")
    axis.set(
        xlim=(0, 1),
        xlabel="score p of the label (0: no neighbour has it)" if by_score else "quality of the label (low: suspect)",
        ylabel="images (logarithmic above 10)",
    )
    axis.set_yscale("symlog", linthresh=10)  # a few bad labels beside very many good ones
    axis.yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.0f}"))
    axis.spines[["top", "right"]].set_visible(False)
    if by_score or wrong.any():
        axis.legend(loc="best", fontsize="small", frameon=False)
    return _drawn(figure)


def transition_map(audit: LabelAudit) -> str:
    """P(given label | true class) as a heat map, as a data URI; "" where there are too many classes to read it."""
    C = len(audit.classes)
    if not 2 <= C <= MAX_DRAWN_CLASSES:
        return ""
    percent = 100 * audit.transition.numpy()
    wrong = np.where(np.eye(C, dtype=bool), np.nan, percent)
    side = 2.2 + 0.24 * max(C, 8)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axis = figure.subplots()
    axis.set_facecolor("#E8E8E8")  # the diagonal
    image = axis.imshow(wrong, cmap="Oranges", vmin=0, vmax=max(np.nanmax(wrong), 1))
    names = [
        name if len(name) <= MAX_NAME_LENGTH else f"{name[: MAX_NAME_LENGTH - 1]}…" for name in map(str, audit.classes)
    ]
    axis.set(xlabel="label given", ylabel="class it is thought to be", xticks=range(C), yticks=range(C))
    axis.set_xticklabels(names, rotation=90, fontsize="small")
    axis.set_yticklabels(names, fontsize="small")
    if C <= MAX_CLASSES_WITH_NUMBERS:
        dark = max(np.nanmax(wrong), 1) / 2
        for (row, column), value in np.ndenumerate(percent):
            if value >= 0.5:
                colour = "white" if row != column and value > dark else "black" if row != column else DIAGONAL
                axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize="x-small", color=colour)
    figure.colorbar(image, label="percent of the class", shrink=0.7)
    return _drawn(figure)


def _drawn(figure: Figure) -> str:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # matplotlib's font lacks some scripts
        figure.savefig(file, dpi=DPI)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
