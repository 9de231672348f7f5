"""How far a pass over a loader has come, on standard error."""

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import Any


def with_progress(loader: Iterable[Any], description: str) -> Iterator[Any]:
    """The batches of the loader, with a bar on a terminal and a line for each tenth elsewhere.

    The bar needs tqdm; without it there are lines.

    Example:
        >>> list(with_progress(range(3), "Reading"))
        [0, 1, 2]

    Args:
        loader: anything to iterate over. Lines need its length and are left out without one.
        description: what the pass does.
    """
    if sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ImportError:
            pass
        else:
            yield from tqdm(loader, desc=description, unit="batch", leave=False)
            return
    total = len(loader) if isinstance(loader, Sized) else 0
    for done, batch in enumerate(loader, start=1):
        yield batch
        if total and done * 10 // total > (done - 1) * 10 // total:
            print(f"{description}: {done} of {total} batches", file=sys.stderr)
