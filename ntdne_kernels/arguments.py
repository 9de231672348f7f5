"""What arguments may be: the sentinels, the dtypes of a bank, and the checks that name the argument that is wrong.

The ground floor: it imports nothing of the package.

Shapes: B queries, N bank rows, D features.
"""

from numbers import Real

import torch
from torch import Tensor

NOT_IN_BANK = -1
"""The index of a query that no bank row holds."""
UNLABELLED = -1
"""The label of an image without one."""
SHORTEST = 1e-12
"""Length of the shortest feature that has a direction: torch.nn.functional.normalize divides shorter ones by it."""
BANK_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for a float64 bank, float32 for every other: the dtype of sums, scores and losses."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_number(
    name: str, value: float, low: float, high: float, *, lower_included: bool = False, upper_included: bool = False
) -> None:
    """ValueError or TypeError that names the number unless it lies between low and high."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    above = value >= low if lower_included else value > low
    below = value <= high if upper_included else value < high
    if not (above and below):
        interval = f"{'[' if lower_included else '('}{low}, {high}{']' if upper_included else ')'}"
        raise ValueError(f"{name}: expected a number in {interval}, got {value}")


def check_choice(name: str, value: str | None, choices: tuple[str, ...]) -> None:
    """ValueError that names the argument unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_range(name: str, index: Tensor, N: int, *, look: bool = False) -> None:
    """IndexError unless every index is −1 or a row of a bank of N rows; looks at GPU values only if told to."""
    if not can_look_inside(index, look=look):
        return
    wrong = (index < NOT_IN_BANK) | (index >= N)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise IndexError(f"{name}: expected -1 or a bank row from 0 to {N - 1}, got {int(index[row])} at row {row}")


def check_classes(labels: Tensor, *, look: bool = False) -> None:
    """ValueError unless every label of a query is −1 or a class; looks at GPU values only if told to."""
    if can_look_inside(labels, look=look) and bool((labels < UNLABELLED).any()):
        row = int((labels < UNLABELLED).nonzero()[0])
        raise ValueError(f"labels: expected -1 (unlabelled) or a class from 0, got {int(labels[row])} at row {row}")


def check_directions(
    name: str, features: Tensor, index: Tensor | None = None, dtype: torch.dtype = torch.float32, *, look: bool = False
) -> None:
    """ValueError that names a row of the features (B, D) whose norm, summed in `dtype`, gives it no direction.

    Rows whose index is −1 are passed over. Looks at GPU values only if told to.
    """
    if not can_look_inside(features, look=look):
        return
    norm = torch.linalg.vector_norm(features.detach().to(torch.promote_types(dtype, torch.float32)), dim=1)
    wrong = ~((norm >= SHORTEST) & norm.isfinite())
    if index is not None:
        wrong &= index != NOT_IN_BANK
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name}: expected rows of finite norm, at least {SHORTEST}, got norm {float(norm[row])} in row {row}; "
            "nothing was written"
        )


def can_look_inside(tensor: Tensor, *, look: bool = False) -> bool:
    """Whether values cost nothing to read, on a CPU, or are to be read all the same; never in a compiler's trace."""
    return (look or tensor.device.type == "cpu") and not torch.compiler.is_compiling()


def check_matrix(name: str, matrix: Tensor, shape: str) -> None:
    """TypeError or ValueError unless the argument is a float matrix; the error names the expected `shape`."""
    if not isinstance(matrix, Tensor):
        raise TypeError(f"{name}: expected a float tensor, got {type(matrix).__name__}")
    if not matrix.is_floating_point():
        raise TypeError(f"{name}: expected a float tensor, got {matrix.dtype}")
    if matrix.dim() != 2:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(matrix.shape)}")
