"""The backends by name, as arguments and ops give them. A new one is a file with a `Backend`, and a line here."""

from ntdne_kernels.ops import reference
from ntdne_kernels.ops.leave_one_out import Backend
from ntdne_kernels.ops.streaming import STREAMING

try:
    from ntdne_kernels.ops import gpu
except ImportError:  # Triton exists for Linux
    gpu = None  # type: ignore[assignment]

BACKENDS: dict[str, Backend] = {"reference": reference, "streaming": STREAMING}
if gpu is not None:
    BACKENDS["triton"] = gpu.TRITON
