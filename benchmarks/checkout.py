"""The package of another checkout, run by the benchmarks of this one in a process of its own."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def program(checkout: Path, statements: str) -> list[str]:
    """A command that executes statements with the checkout's `ntdne_kernels` and with these `benchmarks`."""
    package = f"import sys; sys.path[:0] = [{str(checkout)!r}]; import ntdne_kernels; sys.path[0] = {str(ROOT)!r}"
    return [sys.executable, "-c", f"{package}; {statements}"]


def version(checkout: Path) -> str:
    """By git, else the folder's name."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found = ""
    return found or checkout.name
