"""The backends by name, as arguments and custom ops give them."""

from collections.abc import Callable

from torch import Tensor

from ntdne_kernels.ops import reference
from ntdne_kernels.ops.leave_one_out import Backend, ClassSumsFunction
from ntdne_kernels.ops.streaming import STREAMING

try:
    from ntdne_kernels.ops import gpu
except ImportError:  # Triton exists for Linux
    gpu = None  # type: ignore[assignment]

BACKENDS: dict[str, Backend | None] = {"reference": None, "streaming": STREAMING}
if gpu is not None:
    BACKENDS["triton"] = gpu.TRITON


def triton_misses(bank: Tensor) -> str | None:
    """What the Triton kernels need and do not have here, or None where they can serve the bank."""
    return "the triton package" if gpu is None else gpu.missing(bank)


def class_sums_of(name: str) -> ClassSumsFunction:
    """How the backend makes `ClassSums`."""
    backend = BACKENDS[name]
    return reference.class_sums if backend is None else backend.class_sums


def class_masses_of(name: str) -> Callable[..., Tensor]:
    """How the backend sums over many classes at once, as `Backend.class_masses` says."""
    backend = BACKENDS[name]
    return reference.class_masses if backend is None else backend.class_masses
