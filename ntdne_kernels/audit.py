"""Which labels of an archive are probably wrong: each image against all others, in one streamed sweep.

    p_ic = Σ_{j of class c} exp(f_i·f_j/σ) / Σ_j exp(f_i·f_j/σ),  j ≠ i      class c's share of i's neighbours
    p_i  = p_ic of i's own label c                                           the leave-one-out score (eq. 4)

No image votes on its own label, so the shares are class probabilities that were predicted out of sample, as a
classifier's cross-validation gives them: the methods for such probabilities (confident learning) work on them.

Shapes: B queries, N images, D features, C classes, m classes kept of each image's neighbours.
"""

import contextlib
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ntdne_kernels.arguments import (
    BANK_DTYPES,
    NOT_IN_BANK,
    UNLABELLED,
    accumulator_dtype,
    check_choice,
    check_number,
    check_range,
)
from ntdne_kernels.bank import MemoryBank
from ntdne_kernels.functional import choose_backend
from ntdne_kernels.labels import as_index, encode_labels
from ntdne_kernels.ops.backends import BACKENDS
from ntdne_kernels.ops.chunked import CHUNK_BYTES, chunks_of
from ntdne_kernels.progress import with_progress
from ntdne_kernels.user_warning import warn_user

QUERIES = {"cpu": 4096, "cuda": 32768}  # of a batch: enough of them fill a GPU, and read a bank on disk seldom enough
CLASSES = 1024  # summed at once: B·1024 float64 are 34 MB on a CPU, 268 MB on a GPU
VALUES = 1 << 23  # of features looked at together: 65,536 rows of 128
NEIGHBOUR_QUERIES = 256  # compared with as many rows
MOST_DENSE_CLASSES = 10_000  # for (C, C) matrices: 800 MB
METHODS = ("rate", "otsu", "auto")
WITNESSES = 4096  # images whose nearest neighbours are asked whether the features can carry a rate
NEAREST = 10  # of each; fewer where classes are small
LEAST_NEAREST = 4  # that four of them can agree
# When features carry a noise rate, by `Evidence`; chosen with `python -m benchmarks.audit calibrate`
LEAST_SIGNIFICANCE, LEAST_AGREEMENT = 3.0, 0.6
MOST_ABOVE, MOST_BELOW, MOST_UNEVEN = 0.03, 0.12, 0.07


def audit_labels(
    features: Any,
    labels: Any,
    *,
    sigma: float = 0.1,
    top: int = 10,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    scratch: str | os.PathLike[str] | None = None,
    backend: str | None = None,
    progress: bool = False,
) -> "LabelAudit":
    """Score the labels of a whole archive by the neighbours of each image.

    Exact, over all N·(N − 1) pairs, in memory for one copy of the features, in class order, and the result.

    Args:
        features: (N, D) of any length but 0, float tensor, NumPy array, memory map or DataFrame; read in order, once.
        labels: (N,) integers, −1 for unlabelled, or names, none ("", None, NaN) for unlabelled, as `encode_labels`
            takes them; a tensor, array, list or Series. They belong to features by position, not by a Series' index.
        sigma: temperature σ > 0 of the neighbourhood (eq. 3): that of training, where NTDNE made the features.
        top: m, the classes kept of each image's neighbours, at most C. Confident learning looks at these.
        device: where to compute; None: where the features are.
        dtype: of the copy, and so of the arithmetic.
        scratch: folder for the copy of an archive that is larger than memory. Nothing stays there, but where the
            process is killed while it makes room for the copy.
        backend: as in `functional.leave_one_out_log_scores`.
        progress: show it on standard error.

    Raises:
        TypeError, ValueError: an argument is not as described; of features that are not finite or 0 the rows are named.
        OSError: the features cannot be read, or the scratch folder has no place.
    """
    _check(sigma, top, backend)
    codes, classes = encode_labels(labels)
    bank = feature_bank(features, codes, device=device, dtype=dtype, scratch=scratch, progress=progress)
    return audit_bank(bank, sigma=sigma, top=top, backend=backend, progress=progress, classes=classes)


def _check(sigma: float, top: int, backend: str | None) -> None:
    check_number("sigma", sigma, 0, math.inf)
    if isinstance(top, bool) or not isinstance(top, int | np.integer) or top < 1:
        raise ValueError(f"top: expected a number of classes from 1, got {top!r}")
    if backend is not None:
        check_choice("backend", backend, tuple(BACKENDS))


def feature_bank(
    features: Any,
    labels: Tensor,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    scratch: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> MemoryBank:
    """A bank of the features (N, D) with integer labels (N,), normalised; arguments and errors as `audit_labels`.

    Where the features do not fit a GPU, the bank stays in host memory.
    """
    if hasattr(features, "to_numpy"):
        features = features.to_numpy()
    shape = tuple(features.shape) if hasattr(features, "shape") else ()
    if len(shape) != 2 or 0 in shape:
        found = f"shape {shape}" if hasattr(features, "shape") else type(features).__name__
        raise ValueError(f"features: expected a tensor, array or DataFrame (N, D) of at least one value, got {found}")
    floating = features.is_floating_point() if isinstance(features, Tensor) else features.dtype.kind == "f"
    if not floating:
        raise TypeError(f"features: expected float values, got {features.dtype}")
    N, D = shape
    if len(labels) != N:
        raise ValueError(f"labels: expected one for each of the {N} rows of features, got {len(labels)}")
    if dtype not in BANK_DTYPES:
        raise TypeError(f"dtype: expected float64, float32, float16 or bfloat16, got {dtype!r}")
    if scratch is not None and not Path(scratch).is_dir():
        raise NotADirectoryError(f"scratch: expected a folder, got {os.fspath(scratch)}")
    if device is None:
        device = features.device if isinstance(features, Tensor) else "cpu"
    device = torch.device(device)
    needed, storage = N * D * dtype.itemsize, "device"
    if scratch is not None:
        storage = "disk"
    elif device.type == "cuda" and needed > 0.8 * torch.cuda.mem_get_info(device)[0]:
        storage = "host"
    if storage != "disk" and (device.type == "cpu" or storage == "host") and needed > (free := free_memory()):
        raise ValueError(
            f"features: a copy of {N} × {D} {str(dtype).removeprefix('torch.')} takes {needed / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB of memory are free; give a scratch folder on a disk with that much room"
        )
    with contextlib.ExitStack() as stack:
        path = None
        if scratch is not None:  # its name goes at once, the file with the last use of the bank
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ntdne-audit-", dir=scratch))
            path = Path(folder) / "bank"
        generator = torch.Generator(device).manual_seed(0)  # of the random start; the user's own stays as it is
        bank = MemoryBank(labels, D, generator=generator, device=device, dtype=dtype, storage=storage, path=path)
    bad: list[int] = []
    starts: Any = range(0, N, _rows_of(D))
    for start in with_progress(starts, "Reading features") if progress else starts:
        rows = features[start : start + _rows_of(D)]
        if not isinstance(rows, Tensor):
            # A copy, in the machine's byte order: memory maps may be read-only, and torch shares writable memory alone.
            rows = torch.from_numpy(np.array(rows, rows.dtype.newbyteorder("=")))
        bad += (_without_direction(rows.detach(), dtype) + start).tolist()
        if not bad:
            images = torch.arange(start, start + len(rows), device=device)
            bank.update_(rows.detach().to(device), images, momentum=0.0)
    _refuse("features", bad, N)
    return bank


def _rows_of(D: int) -> int:
    """Rows of D values that are looked at together."""
    return max(VALUES // D, 1)


def _without_direction(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Which rows (n, D) a bank of the dtype cannot normalise."""
    norm = torch.linalg.vector_norm(rows.to(accumulator_dtype(dtype)), dim=1)
    good: Tensor = (norm > 0) & norm.isfinite()
    return (~good).nonzero().squeeze(1).cpu()


def _refuse(name: str, rows: list[int], N: int) -> None:
    if rows:
        named = ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")
        raise ValueError(f"{name}: expected rows of a positive, finite norm, got others at {len(rows)} of {N}: {named}")


def free_memory() -> float:
    """Bytes; infinite where the system does not say."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024.0 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    return math.inf


@torch.no_grad()
def audit_bank(
    bank: MemoryBank,
    *,
    sigma: float = 0.1,
    top: int = 10,
    backend: str | None = None,
    progress: bool = False,
    classes: Sequence[Any] | None = None,
) -> "LabelAudit":
    """Score the labels of a memory bank by its rows as they are: fill it first, as `criterion.fill_bank` does.

    Arguments as `audit_labels`; `classes` are names of bank.classes (C,), None for the integers themselves.

    Raises:
        TypeError, ValueError: an argument is not as described, or the bank is sharded.
    """
    if not isinstance(bank, MemoryBank):
        raise TypeError(f"bank: expected a MemoryBank, got {type(bank).__name__}; a criterion's is criterion.memory")
    _check(sigma, top, backend)
    if bank.ranks is not None:
        raise ValueError("bank: expected one that is not sharded; give its rows and labels to audit_labels")
    classes = tuple(bank.classes.tolist() if classes is None else classes)
    if len(classes) != len(bank.classes):
        raise ValueError(f"classes: expected {len(bank.classes)} names, got {len(classes)}")
    if bank.fresh:
        warn_user("bank: its rows are still the random ones of its start; fill_bank brings an encoder's")
    N, m, D = len(bank), min(int(top), len(classes)), bank.storage.size(1)
    bad: list[int] = []
    for start in range(0, N, _rows_of(D)):
        wrong = _without_direction(bank.storage[start : start + _rows_of(D)], bank.storage.dtype)
        bad += bank.order[wrong.to(bank.device) + start].tolist()
    _refuse("bank", bad, N)
    sum_classes = BACKENDS[choose_backend(backend, bank.storage, bank.device)].class_log_sums
    log_score, log_density = torch.empty(N, device="cpu"), torch.empty(N, device="cpu")
    # Float64: from the 1 - 1e-9 of a tight class float32 makes 1, and of its labels' quality noise.
    top_classes = torch.empty((N, m), dtype=torch.int64, device="cpu")
    top_shares = torch.empty((N, m), dtype=torch.float64, device="cpu")
    batch = QUERIES.get(bank.device.type, QUERIES["cpu"])
    starts: Any = range(0, N, batch)
    for start in with_progress(starts, "Comparing images") if progress else starts:
        places = torch.arange(start, min(start + batch, N), device=bank.device)
        images = bank.order[places].cpu()
        found = _neighbourhood(bank, places, m, sigma, sum_classes)
        log_p = torch.where(found.log_own == -torch.inf, found.log_own, found.log_own - found.log_all).clamp(max=0)
        shares = torch.where(found.log_top == -torch.inf, 0, (found.log_top - found.log_all.unsqueeze(1)).exp())
        log_score[images], log_density[images] = log_p.float().cpu(), found.log_all.float().cpu()
        top_classes[images], top_shares[images] = found.top_classes.cpu(), shares.cpu()
    labels = bank.labels.cpu()
    codes = torch.searchsorted(bank.classes.cpu(), labels) if classes else labels
    codes = torch.where(labels == UNLABELLED, UNLABELLED, codes)
    witnesses, votes = _votes(bank, codes)
    return LabelAudit(
        classes=classes,
        labels=codes,
        sigma=float(sigma),
        log_score=log_score,
        top_classes=top_classes,
        top_shares=top_shares,
        log_density=log_density - math.log(max(N - 1, 1)),
        duplicate_of=_duplicates(bank),
        witnesses=witnesses,
        votes=votes,
    )


class _Neighbourhood(NamedTuple):
    log_own: Tensor
    """(B,): log Σ over the images of the query's label; −inf for none, NaN for an unlabelled query."""
    log_all: Tensor
    """(B,): over all."""
    top_classes: Tensor
    """(B, m): the classes with the largest sums."""
    log_top: Tensor
    """(B, m): these sums."""


def _neighbourhood(
    bank: MemoryBank, places: Tensor, m: int, sigma: float, sum_classes: Callable[..., Tensor]
) -> _Neighbourhood:
    """The sums of the rows at `places` over each class, from which those with no room among the top m are dropped.

    Classes are met in order, so that at most CLASSES are open at a time: no (B, C) is held where C is large.
    """
    queries, B = bank.take(places), len(places)
    # Range 0 holds the unlabelled rows, range 1 + c the rows of class c.
    bounds = torch.cat([bank.offsets.new_zeros(1), bank.offsets])
    begins = bounds.tolist()
    own = torch.searchsorted(bounds, places, right=True) - 1
    log_own = queries.new_full((B,), -torch.inf, dtype=torch.float64)
    log_all = log_own.clone()
    log_top, top_ranges = log_own.new_empty((B, 0)), own.new_empty((B, 0))
    cut: Tensor | None = None  # sums of a class that goes on in the next chunk
    length = len(bank) if bank.storage.device == bank.device else _chunk_rows(bank)
    for start, chunk in chunks_of(bank.storage, bank.device, length):
        stop = start + len(chunk)
        for first, last in _blocks(begins, start, stop):
            here = bounds[first : last + 1].clamp(start, stop)
            begin, end = max(begins[first], start), min(begins[last], stop)
            index = torch.where((places >= begin) & (places < end), places - begin, NOT_IN_BANK)
            sums = sum_classes(queries, chunk[begin - start : end - start], index, here - begin, sigma)
            sums = sums.to(torch.float64).clone(memory_format=torch.contiguous_format)
            log_all = torch.logaddexp(log_all, sums.logsumexp(dim=1))
            if cut is not None:
                sums[:, 0] = torch.logaddexp(sums[:, 0], cut)
                cut = None
            if begins[last] > stop:
                cut, sums, last = sums[:, -1], sums[:, :-1], last - 1
            inside = (own >= first) & (own < last)
            column = torch.where(inside, own - first, 0).unsqueeze(1)
            if last > first:
                log_own = torch.where(inside, sums.gather(1, column).squeeze(1), log_own)
            labelled = max(first, 1)
            best, columns = _largest(sums[:, labelled - first :], m)
            log_top, kept = _largest(torch.cat([log_top, best], dim=1), m)
            top_ranges = torch.cat([top_ranges, columns + labelled], dim=1).gather(1, kept)
    return _Neighbourhood(torch.where(own == 0, torch.nan, log_own), log_all, top_ranges - 1, log_top)


def _chunk_rows(bank: MemoryBank) -> int:
    return max(CHUNK_BYTES // (bank.storage.size(1) * bank.storage.element_size()), 1)


def _blocks(begins: list[int], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """(first range, last range + 1) of at most CLASSES ranges with rows from `start` to `stop`."""
    first, end = np.searchsorted(begins, [start, stop], side="right") - 1
    end += int(begins[end] < stop)
    for block in range(int(first), int(end), CLASSES):
        yield block, min(block + CLASSES, int(end))


def _largest(sums: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The m largest of the sums (B, K) in falling order, and their columns."""
    values, columns = sums.topk(min(m, sums.size(1)), dim=1)
    return values, columns


def _duplicates(bank: MemoryBank) -> Tensor:
    """(N,) the first image whose row is exactly the same, of those before; −1 for none."""
    D, hashes = bank.storage.size(1), torch.empty(len(bank), dtype=torch.int64, device="cpu")
    # Words of 16 bits: a changed sign is 2^63 times the factor in one of 64, the same for every odd factor.
    words = D * bank.storage.element_size() // 2
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (words,), generator=generator, device="cpu") * 2 + 1
    for start in range(0, len(bank), _rows_of(words)):
        part = slice(start, start + _rows_of(words))
        rows = bank.storage[part] + 0.0  # −0 is 0
        sums = (rows.view(torch.int16) * factors.to(rows.device)).sum(dim=1)  # modulo 2^64
        hashes[bank.order[part].cpu()] = sums.cpu()
    hashes, images = hashes.sort(stable=True)
    _, run, sizes = torch.unique_consecutive(hashes, return_inverse=True, return_counts=True)
    firsts = images[(torch.cumsum(sizes, 0) - sizes)[run]]
    images, firsts = images[firsts != images], firsts[firsts != images]
    duplicate_of = torch.full((len(bank),), NOT_IN_BANK, device="cpu")
    for image, first in zip(images.split(_rows_of(D)), firsts.split(_rows_of(D)), strict=True):
        equal = (bank.rows(image.to(bank.device)) == bank.rows(first.to(bank.device))).all(dim=1).cpu()
        duplicate_of[image[equal]] = first[equal]
    return duplicate_of


def nearest_neighbours(bank: MemoryBank, images: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k images most similar to each of the images (n,), itself left out, the nearest first.

    Returns:
        (n, k) images and their cosine similarities; fewer than k where the bank has fewer.

    Raises:
        TypeError, ValueError, IndexError: images are no integers (n,) of the bank, or k is not 1 or more.
    """
    images = as_index(images, "images")
    check_range("images", images, len(bank))
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k: expected 1 or more neighbours, got {k!r}")
    found = [_nearest(bank, block, min(k, len(bank) - 1)) for block in images.to(bank.device).split(NEIGHBOUR_QUERIES)]
    nearest, similarity = zip(*found, strict=True)
    return torch.cat(nearest), torch.cat(similarity)


def _nearest(bank: MemoryBank, images: Tensor, k: int) -> tuple[Tensor, Tensor]:
    wide = accumulator_dtype(bank.storage.dtype)
    queries, places, step = bank.rows(images).to(wide), bank.places(images), _rows_of(NEIGHBOUR_QUERIES)
    similarity, found = queries.new_empty((len(images), 0)), places.new_empty((len(images), 0))
    for start in range(0, len(bank), step):
        rows = torch.arange(start, min(start + step, len(bank)), device=places.device)
        here = (queries @ bank.take(rows).to(wide).t()).masked_fill_(rows == places.unsqueeze(1), -torch.inf)
        candidates = torch.cat([similarity, here], dim=1)
        similarity, columns = candidates.topk(min(k, candidates.size(1)), dim=1)
        found = torch.cat([found, rows.expand(len(images), -1)], dim=1).gather(1, columns)
    return bank.order[found].cpu(), similarity.cpu()


def _votes(bank: MemoryBank, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Labelled images (n,), drawn evenly where there are many, and the codes (n, K) of their nearest neighbours.

    K = 0 where classes are too small: most neighbours would be of other classes whatever the features.
    """
    labelled = (codes != UNLABELLED).nonzero().squeeze(1)
    drawn = torch.randperm(len(labelled), generator=torch.Generator().manual_seed(0), device="cpu")[:WITNESSES]
    witnesses = labelled[drawn.sort().values]
    if len(witnesses) == 0:
        return witnesses, witnesses.new_empty((0, 0))
    size = int(torch.bincount(codes[labelled])[codes[witnesses]].median())
    if size <= LEAST_NEAREST:
        return witnesses, witnesses.new_empty((len(witnesses), 0))
    nearest, _ = nearest_neighbours(bank, witnesses, min(max(size // 4, LEAST_NEAREST), NEAREST))
    return witnesses, codes[nearest]


class Evidence(NamedTuple):
    """What the labels of nearest neighbours say of the features, for which no right label is needed.

    Good features bring images of one class together. Then wrong labels alone keep nearest neighbours from having the
    same label, and as they fall on the images at random, they do so to the same extent everywhere in a class.
    """

    agreement: float
    """How much oftener than by chance two nearest neighbours of an image carry one label, against what follows from the
    confusions that the audit estimates. 1: as often as follows; 0: by chance; above 1: too many confusions.
    """
    significance: float
    """The same in standard errors of chance."""
    rate: float
    """How often a nearest neighbour does not carry the label suggested for the image."""
    rate_at_best: float
    """How often, where three others carry it.

    With good features both are the noise rate, whatever the three are. Features that confuse classes do so in some
    places more than in others, and three that agree are found where they do least.
    """


class Confusions(NamedTuple):
    """How many images are thought to carry the label `given` and to be of the class `true`, by confident learning."""

    given: Tensor
    """(P,) codes of classes, of the P pairs with any."""
    true: Tensor
    """(P,)"""
    images: Tensor
    """(P,) float64: how many; those of one `given` add up to the judged images with that label."""


@dataclass(frozen=True, eq=False, repr=False)
class LabelAudit:
    """What the neighbours of each image say of its label; tensors on the CPU, by image.

    Attributes:
        classes: the C classes, names or integers, in order of code.
        labels: (N,) code of each image's label; −1 for unlabelled.
        sigma: temperature of the neighbourhood.
        log_score: (N,) log p; −inf where no other image has the label, NaN for unlabelled.
        top_classes: (N, m) codes of the classes with the largest shares of the neighbourhood, the largest first.
        top_shares: (N, m) their shares. Unlabelled images have a part of it too.
        log_density: (N,) log of the mean of exp(f_i·f_j/σ) over the other images. The lowest are like nothing else in
            the archive: images of a class that is not there, or broken ones. What is said of their labels means little.
        duplicate_of: (N,) the first image whose features, normalised in the audit's dtype, are the same to the bit; −1
            for none, and for that first one.
        witnesses: (n,) labelled images, all or a sample.
        votes: (n, K) codes of the labels of their K nearest neighbours; K is 0 where classes are too small to ask.
    """

    classes: tuple[Any, ...]
    labels: Tensor
    sigma: float
    log_score: Tensor
    top_classes: Tensor
    top_shares: Tensor
    log_density: Tensor
    duplicate_of: Tensor
    witnesses: Tensor
    votes: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        judged = int(self.judged.sum())
        return (
            f"LabelAudit({len(self)} images, {len(self.classes)} classes, {judged} labels judged, sigma={self.sigma})"
        )

    @property
    def score(self) -> Tensor:
        """(N,) p: the share of the neighbourhood that carries the image's label (eq. 4)."""
        return self.log_score.exp()

    @property
    def suggested(self) -> Tensor:
        """(N,) place in `classes` of the class with the largest share of the neighbourhood; −1 for no class."""
        return self.top_classes[:, 0] if self.classes else torch.full_like(self.labels, UNLABELLED)

    @property
    def suggested_share(self) -> Tensor:
        """(N,) that share."""
        return self.top_shares[:, 0] if self.classes else torch.zeros(len(self), device="cpu")

    @cached_property
    def judged(self) -> Tensor:
        """(N,) bool: labelled, and with another image of the label. Nothing can be said of the others' labels."""
        return self.log_score > -torch.inf

    @cached_property
    def conflicting(self) -> Tensor:
        """(N,) bool: an exact copy of the image carries another label; one of the two is wrong."""
        group = torch.where(self.duplicate_of < 0, torch.arange(len(self), device="cpu"), self.duplicate_of)
        labelled = self.labels != UNLABELLED
        lowest = torch.full_like(group, len(self.classes)).scatter_reduce_(
            0, group[labelled], self.labels[labelled], "amin"
        )
        highest = torch.full_like(group, UNLABELLED).scatter_reduce_(0, group, self.labels, "amax")
        return labelled & (lowest < highest)[group]

    @cached_property
    def quality(self) -> Tensor:
        """(N,) H/(H − log p), in [0, 1]: how surprising the label is against how surprising a neighbour's is.

        H = −Σ_c p_ic log p_ic, the surprise to be expected, unlabelled neighbours being one class more. 0: no neighbour
        carries the label; 1/2: the label is as surprising as a neighbour's is on average; 1: all carry it. NaN where
        not `judged`. Confidence-weighted entropy (Kuan and Mueller, 2022) with −log p for 1/p. Ranked by p alone labels
        come out worse where classes are confused or unequal, by its margin over the next class where features are weak.

        The shares of classes that were not kept are thought of as equal.
        """
        shares = self.top_shares
        rest = (1 - shares.sum(dim=1)).clamp(min=0)
        others = max(len(self.classes) - shares.size(1), 1)
        entropy = -torch.xlogy(shares, shares).sum(dim=1) - torch.xlogy(rest, rest / others)
        entropy = entropy.clamp(min=torch.finfo(torch.float32).tiny)  # all neighbours of one class: 1 or 0, not 0/0
        return torch.where(self.judged, entropy / (entropy - self.log_score), torch.nan).float()

    @cached_property
    def ranking(self) -> Tensor:
        """(N,) images in order of quality, the most suspect label first, those not judged at the end."""
        return self.quality.nan_to_num(nan=torch.inf).argsort(stable=True)

    @cached_property
    def confident_classes(self) -> Tensor:
        """(N,) the class that the image is confidently of; −1 for none and where not `judged`.

        Confident learning (Northcutt, Jiang and Chuang, JAIR 2021): among the classes whose share is at least the mean
        score of the images with that label, the one with the largest share. Where that is not the image's own label but
        no class has a larger share than its own, it is its own: else the noise rate of archives with classes of unequal
        size comes out too high.
        """
        if not self.judged.any():
            return torch.full_like(self.labels, UNLABELLED)
        sizes, totals = self._sizes, torch.zeros(len(self.classes), dtype=torch.float64, device="cpu")
        totals.index_add_(0, self.labels[self.judged], self.score[self.judged].double())
        means = torch.where(sizes > 0, totals / sizes, torch.inf)
        # Less the rounding of shares and scores, which a class of equal scores would fall prey to.
        above = self.top_shares >= means[self.top_classes] - 1e-6
        first = above.to(torch.uint8).argmax(dim=1, keepdim=True)
        guess = self.top_classes.gather(1, first).squeeze(1)
        guess = torch.where(self.suggested == self.labels, self.labels, guess)
        return torch.where(above.any(dim=1) & self.judged, guess, UNLABELLED)

    @cached_property
    def confusions(self) -> Confusions:
        """The confident joint, calibrated to the number of judged images with each label."""
        sure, C = self.confident_classes != UNLABELLED, len(self.classes)
        pairs = self.labels[sure] * C + self.confident_classes[sure]
        # One right label at least in each class, as in cleanlab: no class is wrong altogether.
        diagonal = (self._sizes > 0).nonzero().squeeze(1) * (C + 1)
        pairs, count = torch.unique(torch.cat([pairs, diagonal]), return_counts=True)
        count = count.double()
        given, true = pairs // max(C, 1), pairs % max(C, 1)
        on_diagonal = given == true
        count[on_diagonal] = (count[on_diagonal] - 1).clamp(min=1)
        total = torch.zeros(C, dtype=torch.float64, device="cpu").index_add_(0, given, count)
        return Confusions(given, true, count * (self._sizes / total)[given])

    @cached_property
    def evidence(self) -> Evidence:
        """Whether nearest neighbours agree as they would if wrong labels alone kept them from it.

        NaN where that cannot be told: a single class, or classes that are too small.
        """
        if self.votes.numel() == 0 or len(self.classes) < 2:
            return Evidence(*4 * [math.nan])
        labelled, C = self.votes != UNLABELLED, len(self.classes)
        voters = labelled.sum(dim=1)
        votes = torch.where(labelled, self.votes, UNLABELLED - 1 - torch.arange(self.votes.size(1))).sort(dim=1).values
        same = torch.stack([(votes[:, lag:] == votes[:, :-lag]).sum() for lag in range(1, votes.size(1))]).sum()
        together = same.double() / (voters * (voters - 1) / 2).sum()
        sizes = torch.bincount(self.labels[self.labels != UNLABELLED], minlength=C).double()
        chance = (sizes / sizes.sum()).square().sum()
        _, true, images = self.confusions
        foretold = (images.square() / _summed(images, true, C)[true]).sum() / images.sum()
        error = (chance * (1 - chance) / len(votes)).sqrt()

        own = self.suggested[self.witnesses]
        count = (self.votes == own.unsqueeze(1)).sum(dim=1).double()
        images = _summed(torch.ones_like(count), own, C)

        def rate(others: int) -> Tensor:
            """How rarely a neighbour carries the label where the others do, the mean over the classes' images."""
            drawn = torch.stack([count - i for i in range(others)]).prod(dim=0) if others else torch.ones_like(count)
            asked, agreeing = (
                _summed(drawn * more, own, C) for more in ((voters - others).clamp(min=0), count - others)
            )
            weight = images[asked > 0]
            return 1 - (weight * (agreeing / asked)[asked > 0]).sum() / weight.sum()

        beyond = together - chance
        found = beyond / (foretold - chance), beyond / error, rate(others=0), rate(others=3)
        return Evidence(*map(float, found))

    @cached_property
    def doubt(self) -> str:
        """Why the features cannot say how many labels are wrong, by `evidence`; "" where they can.

        Where they cannot, the noise rate is nearly always too high, most of as many suspects are right labels, and the
        ranking alone may be of use. Features that have learned wrong labels by heart pass: their rate is too low.
        """
        agreement, significance, rate, at_best = self.evidence
        if len(self.classes) < 2:
            return ""  # no label can be wrong
        if math.isnan(significance):
            return (
                f"most images have fewer than {LEAST_NEAREST} others of their label, too few to judge the features by"
            )
        if significance < LEAST_SIGNIFICANCE:
            return "the nearest neighbours of an image agree on a label no more than any images would"
        error = math.sqrt(at_best * (1 - at_best) / len(self.witnesses))
        if agreement < LEAST_AGREEMENT or at_best - self.noise_rate > MOST_BELOW + error:
            return "the nearest neighbours of an image are of more classes than wrong labels would make them seem"
        if self.noise_rate - at_best > MOST_ABOVE + error or rate - at_best > MOST_UNEVEN + error:
            return "neighbours contradict labels in some places only, as features that confuse classes make them"
        return ""

    @property
    def noise_rate(self) -> float:
        """Estimated share of wrong labels among the judged ones; not to be believed where there is `doubt`.

        Far too high where the features hardly tell the classes apart.
        """
        given, true, images = self.confusions
        return float(images[given != true].sum() / images.sum()) if len(images) else 0.0

    @property
    def joint(self) -> Tensor:
        """(C, C) float64, estimated P(true class, given label): [true, given], with the sum 1.

        Raises:
            ValueError: too many classes; `confusions` has the pairs alone.
        """
        C = len(self.classes)
        if C > MOST_DENSE_CLASSES:
            raise ValueError(f"joint: expected at most {MOST_DENSE_CLASSES} classes, got {C}; use confusions")
        given, true, images = self.confusions
        joint = torch.zeros((C, C), dtype=torch.float64, device="cpu")
        joint[true, given] = images / images.sum()
        return joint

    @property
    def transition(self) -> Tensor:
        """(C, C) float64, estimated P(given label | true class): [true, given], each row with the sum 1.

        Row-stochastic, as in papers on label noise; cleanlab's noise_matrix is its transpose. A class that no image
        is thought to be of keeps its labels.
        """
        joint = self.joint
        total = joint.sum(dim=1, keepdim=True)
        return torch.where(total > 0, joint / total, torch.eye(len(joint), dtype=joint.dtype, device="cpu"))

    def suspects(self, method: str | float = "rate") -> Tensor:
        """(N,) bool: labels that are probably wrong; no clean label is needed for any of the methods.

        Args:
            method: "rate": as many of the lowest quality as the estimated noise rate says, which where there is
                `doubt` is too many.
                "otsu": the lower of the two groups of qualities that differ most (Otsu, 1979): a mixture of two
                components of one width.
                "auto": p is below chance, the label's share of the other images, as in `NTDNELoss(k="auto")`.
                A number k in (0, 1): p ≤ k, the paper's pruning (eq. 13).
                Labels that are the suggested ones are no suspects of "rate" and "otsu".

        Raises:
            TypeError, ValueError: method is none of these.
        """
        if not isinstance(method, str):
            check_number("method", method, 0, 1)
            return self.judged & (self.score <= method)
        check_choice("method", method, METHODS)
        if method == "auto":
            others = nn.functional.pad(self._sizes - 1, (0, 1))[self.labels]  # the last is for -1
            chance = others / max(len(self) - 1, 1)
            return self.judged & (self.score < chance)
        contested = self.judged & (self.suggested != self.labels)
        if method == "otsu":
            return contested & (self.quality < otsu_threshold(self.quality[self.judged]))
        worst = self.ranking[contested[self.ranking]][: round(self.noise_rate * int(self.judged.sum()))]
        return torch.zeros_like(contested).index_fill_(0, worst, True)

    def corrected(self, method: str | float = "rate") -> Tensor:
        """(N,) codes of labels in which suspects have the suggested class; `classes` tells what they stand for."""
        return torch.where(self.suspects(method), self.suggested, self.labels)

    @property
    def _sizes(self) -> Tensor:
        """(C,) judged images with each label, float64."""
        return torch.bincount(self.labels[self.judged], minlength=len(self.classes)).double()


def _summed(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """(count,) float64: the sum of the values (n,) of each group."""
    return torch.zeros(count, dtype=torch.float64, device="cpu").index_add_(0, groups, values)


def otsu_threshold(values: Tensor) -> float:
    """The cut of the values (n,) into two groups that explains most of their variance; the lower group is below it."""
    values = values.double().sort().values
    if len(values) < 2:
        return -math.inf
    lower = torch.arange(1, len(values), dtype=torch.float64, device="cpu")
    upper, sums = len(values) - lower, values.cumsum(0)
    between = lower * upper * (sums[:-1] / lower - (sums[-1] - sums[:-1]) / upper) ** 2
    return float(values[int(between.argmax()) + 1])
