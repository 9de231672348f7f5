"""How far a pass over a loader has come, on stderr."""

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sized
from typing import Any


def with_progress(loader: Iterable[Any], description: str) -> Iterator[Any]:
    """The batches of the loader: with a bar on a terminal, and a line for each tenth elsewhere."""
    if sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            loader = tqdm(loader, desc=description, unit="batch", leave=False)
            yield from loader
            return
    total = len(loader) if isinstance(loader, Sized) else 0
    for done, batch in enumerate(loader, start=1):
        yield batch
        if total and done * 10 // total > (done - 1) * 10 // total:
            print(f"{description}: {done} of {total} batches", file=sys.stderr)
