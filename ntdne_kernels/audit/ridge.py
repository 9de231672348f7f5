"""One-vs-all ridge regression of the labels on the features, each image predicted by a fit to all others: exactly.

    W, b = argmin Σ_i |y_i − Wᵀx_i − b|² + λ|W|²        y_i: one-hot label; the bias b is not penalised
    z_i  = (ŷ_i − h_i·y_i)/(1 − h_i)                     what the fit without image i says of it
    h_i  = 1/n + x̃_iᵀ(X̃ᵀX̃ + λ)⁻¹x̃_i                      x̃: centred; the diagonal of the hat matrix

One eigendecomposition of X̃ᵀX̃ (D×D) serves all λ. Beside it and the class sums (C×D) nothing is kept: rows are read in
tiles, three times. λ and the temperature of softmax(z/T) are those of the highest likelihood that the predictions give
the labels, wrong ones included. (Hastie, Tibshirani and Friedman, The Elements of Statistical Learning, 7.10 and 12.)

Shapes: N images, n of them labelled, D features, C classes, B rows of a tile.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ntdne_kernels.arguments import accumulator_dtype
from ntdne_kernels.audit.inputs import rows_per_block
from ntdne_kernels.audit.neighbourhood import own_range
from ntdne_kernels.bank import MemoryBank
from ntdne_kernels.ops.chunked import chunks_of

STRENGTHS = tuple(10 ** (k / 2) for k in range(-8, 5))  # λ in units of the mean eigenvalue
TEMPERATURES = tuple(2 ** (k / 2) for k in range(-16, 5))
SAMPLE_SIZE = 4096  # images whose likelihood chooses λ and T
SAMPLE_VALUES = 1 << 24  # of their predictions, float64
SMALLEST_SAMPLE = 256
CLASS_BLOCK = 1024


class Ridge(NamedTuple):
    """A fit, in the coordinates of the eigenvectors; on the bank's device. Made by `fit_ridge`."""

    mean: Tensor
    """(D,) of the labelled rows."""
    basis: Tensor
    """(D, D) eigenvectors of X̃ᵀX̃, in columns."""
    inverse: Tensor
    """(D,) 1/(eigenvalue + λ)."""
    class_sums: Tensor
    """(C, D) sum of the centred rows of each class, in these coordinates."""
    frequencies: Tensor
    """(C,) of the labels."""
    n: int
    """Labelled images."""
    strength: float
    """λ in units of the mean eigenvalue."""
    temperature: float
    """T."""

    def log_shares(self, bank: MemoryBank, rows: Tensor) -> Tensor:
        """(B, C) log softmax(z/T), each labelled image predicted without itself; float32, or float64 of such a bank.

        Example:
            >>> from ntdne_kernels.audit import feature_bank, fit_ridge
            >>> features = torch.tensor([[9, 0], [9, 1], [9, 2], [9, 3], [0, 9], [1, 9], [2, 9]]).float()
            >>> bank = feature_bank(features, torch.tensor([0, 0, 0, 1, 1, 1, 1]))
            >>> fit_ridge(bank).log_shares(bank, bank.positions(torch.tensor([3, 4]))).exp().round(decimals=1)
            tensor([[0.8000, 0.2000],
                    [0.1000, 0.9000]])

        Args:
            bank: the one that was fitted.
            rows: (B,) rows of `bank.storage`; of images by `bank.positions`.
        """
        own = own_range(bank, rows) - 1
        rotated = _centred(bank.stored_rows(rows), self.mean) @ self.basis
        return torch.log_softmax(_leave_one_out(rotated, rotated.square(), own, self) / self.temperature, dim=1)


@torch.no_grad()
def fit_ridge(bank: MemoryBank) -> Ridge:
    """Fit the labels of a bank's images; unlabelled ones take no part, and are predicted all the same.

    Example:
        >>> from ntdne_kernels.audit import feature_bank
        >>> features = torch.tensor([[9, 0], [9, 1], [9, 2], [9, 3], [0, 9], [1, 9], [2, 9]]).float()
        >>> fit_ridge(feature_bank(features, torch.tensor([0, 0, 0, 1, 1, 1, 1]))).n
        7

    Args:
        bank: of N images, kept by one process. The dtype of its rows decides that of products: float32, or float64 of a
            float64 bank. Sums over images are float64.

    Raises:
        ValueError: fewer than two images are labelled.
    """
    C, D, dtype = len(bank.classes), bank.storage.size(1), accumulator_dtype(bank.storage.dtype)
    first = int(bank.offsets[0])
    n = len(bank) - first
    if n < 2:
        raise ValueError(f"bank: expected two labelled images or more, got {n}")
    labelled, block = bank.storage[first:], rows_per_block(D)
    total = torch.zeros(D, dtype=torch.float64, device=bank.device)
    for _, chunk in chunks_of(labelled, bank.device, block):
        total += chunk.to(dtype).sum(dim=0)
    mean = (total / n).to(dtype)
    # Products of centred rows: of features that are nearly alike, the mean would leave no digits to their differences.
    products = total.new_zeros((D, D))
    class_sums = total.new_zeros((C, D))
    for start, chunk in chunks_of(labelled, bank.device, block):
        rows = _centred(chunk, mean)
        products += rows.t() @ rows
        codes = own_range(bank, torch.arange(start, start + len(rows), device=bank.device) + first) - 1
        classes = slice(int(codes[0]), int(codes[-1]) + 1)  # rows are in class order
        sums = rows.new_zeros((classes.stop - classes.start, D))
        class_sums[classes] += sums.index_add_(0, codes - classes.start, rows)
    eigenvalues, basis = torch.linalg.eigh(products)
    del products
    for sums in class_sums.split(CLASS_BLOCK):
        sums.copy_(sums @ basis)
    return _choose(
        bank,
        eigenvalues.clamp(min=0),
        Ridge(
            mean=mean,
            basis=basis.to(dtype),
            inverse=eigenvalues,
            class_sums=class_sums.to(dtype),
            frequencies=(bank.offsets.diff().double() / n).to(dtype),
            n=n,
            strength=0.0,
            temperature=1.0,
        ),
    )


def _choose(bank: MemoryBank, eigenvalues: Tensor, fit: Ridge) -> Ridge:
    """The fit with the λ and T that make the labels of a sample of its images most likely."""
    first, C = len(bank) - fit.n, len(fit.class_sums)
    size = min(SAMPLE_SIZE, max(SAMPLE_VALUES // C, SMALLEST_SAMPLE))
    drawn = torch.randperm(fit.n, generator=torch.Generator().manual_seed(0), device="cpu")[:size] + first
    rows = drawn.to(bank.device)
    own = own_range(bank, rows) - 1
    rotated = _centred(bank.stored_rows(rows), fit.mean) @ fit.basis
    squared = rotated.square()
    unit = eigenvalues.mean().clamp(min=torch.finfo(torch.float32).tiny)
    best, highest = fit, -torch.inf
    for strength in STRENGTHS:
        tried = fit._replace(inverse=(1 / (eigenvalues + strength * unit)).to(fit.mean.dtype), strength=strength)
        predicted = _leave_one_out(rotated, squared, own, tried)
        for temperature in TEMPERATURES:
            logits = predicted / temperature
            likelihood = float((logits.gather(1, own.unsqueeze(1)).squeeze(1) - logits.logsumexp(dim=1)).mean())
            if likelihood > highest:
                best, highest = tried._replace(temperature=temperature), likelihood
    return best


def _leave_one_out(rotated: Tensor, squared: Tensor, own: Tensor, fit: Ridge) -> Tensor:
    """(B, C) predictions z of centred rows (B, D) in the fit's coordinates.

    Args:
        rotated: the rows.
        squared: their squares.
        own: (B,) their labels, −1 for none.
        fit: of all rows.
    """
    sums = fit.class_sums
    if len(sums) < len(rotated):  # the smaller of the two is multiplied
        sums = sums * fit.inverse
    else:
        rotated = rotated * fit.inverse
    predicted = torch.addmm(fit.frequencies, rotated, sums.t())
    hat = (1 / fit.n + squared @ fit.inverse).where(own >= 0, 0).unsqueeze(1)
    predicted.scatter_add_(1, own.clamp(min=0).unsqueeze(1), -hat)
    return predicted.div_(1 - hat)


def _centred(rows: Tensor, mean: Tensor) -> Tensor:
    return rows.to(mean.dtype) - mean
