"""Print tables in Markdown, and write numbers as people read them."""

from collections.abc import Iterable


def print_head(cells: Iterable[str]) -> None:
    """The first row of a table, and the line below it."""
    cells = list(cells)
    print_row(cells)
    print("|" + "---|" * len(cells))


def print_row(cells: Iterable[str]) -> None:
    """A row of a table."""
    print("| " + " | ".join(cells) + " |")


def duration(seconds: float) -> str:
    """In seconds, milliseconds or microseconds."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def rate(value: float, unit: str) -> str:
    """In units of 10⁹ or 10¹²: 2e12 and "B/s" make "2 TB/s"."""
    return f"{value / 1e12:.3g} T{unit}" if value >= 1e12 else f"{value / 1e9:.3g} G{unit}"
