"""The paper's protocol on any archive: label noise, nine losses, training, evaluation, tables and figures.

The command `ntdne` is the way in (`ntdne --help`). Nothing in the core imports from here.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ntdne_kernels.experiments.embedding import embed as embed
    from ntdne_kernels.experiments.retrieval import search as search
    from ntdne_kernels.experiments.reviewing import read_decisions as read_decisions
    from ntdne_kernels.experiments.trained_encoder import load_encoder as load_encoder

# The module of each function, imported when it is asked for: torchvision takes seconds.
FUNCTIONS = {
    "embed": "embedding",
    "search": "retrieval",
    "load_encoder": "trained_encoder",
    "read_decisions": "reviewing",
}


def __getattr__(name: str) -> Any:
    if name not in FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{FUNCTIONS[name]}"), name)


def main() -> int:
    """The command `ntdne`; says what to install where the extra was left out."""
    try:
        from ntdne_kernels.experiments import cli

        return cli.main()
    except ModuleNotFoundError as error:
        print(f"ntdne: {error.name} is not installed; pip install 'ntdne_kernels[experiments]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ntdne: stopped", file=sys.stderr)
        return 130
