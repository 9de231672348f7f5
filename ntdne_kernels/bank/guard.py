"""Notices what others write into a bank's tensors: averages over a module's buffers or its state dict, `to_empty()`.

A bank's tensors are not buffers, so code that averages or casts a module's buffers does not reach them. Two cases are
left:

- AveragedModel averages the weights of a copy of the encoder, and the copy needs the bank they were trained with. Each
  bank has one buffer, its `average_mark`, whose value differs between a copy and its source. Once an average was
  written to it, the copy takes its source's bank at the next use.
- Code that writes into the tensors of state_dict() writes rows, and maybe labels and order. Each write raises a
  tensor's version counter, so it is noticed without reading values, which would synchronise; they are read where it
  was raised. The bank's own updates seal it anew, after those in compiled code at the next use.

Shapes: n images of this process.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ntdne_kernels.bank.shard import Shard
from ntdne_kernels.bank.unit_rows import first_not_unit

if TYPE_CHECKING:
    from ntdne_kernels.bank.module import BankModule

REWRITTEN = (
    "something outside wrote into the bank's tensors, an average over the entries of state_dict() or to_empty() say; "
    "keep the criterion out of what is averaged so. memory.load_state_dict(state), of a checkpoint or of the memory "
    "that was trained, brings back what was lost"
)


class Guard:
    """Which tensors a bank had when it was last known to be right, and the bank it was copied from."""

    def __init__(self) -> None:
        self.source: Callable[[], BankModule | None] | None = None
        """Returns the bank that this is a copy of, or None once it no longer exists."""
        self.generation = 0
        """What the bank writes into its `average_mark`: 0, for a copy one more than its source."""
        self._labels: tuple[int, int] | None = None
        self._order: tuple[int, int] | None = None
        self._rows: tuple[int, int] | None = None
        self._mark = 0
        self.updated_in_compiled_code = False
        """Whether the bank itself has written into the rows since they were sealed, where that could not be sealed."""

    def seal(self, labels: Tensor, order: Tensor, rows: Tensor, average_mark: Tensor) -> None:
        """The tensors are right as they are."""
        self._labels, self._order, self._mark = _identity(labels), _identity(order), _version(average_mark)
        self.seal_rows(rows)

    def seal_rows(self, rows: Tensor) -> None:
        """The bank itself has written into the rows, which were right before."""
        self._rows, self.updated_in_compiled_code = _identity(rows), False

    def unseal(self) -> None:
        """Let the next use check the values."""
        self._labels = self._order = self._rows = None

    def is_sealed(self, labels: Tensor, order: Tensor, rows: Tensor) -> bool:
        """Whether none of the tensors was written or replaced since it was sealed."""
        return (self._labels, self._order, self._rows) == (_identity(labels), _identity(order), _identity(rows))

    def order_was_written(self, order: Tensor) -> bool:
        """Whether the order was written or replaced since it was sealed."""
        return self._order is not None and self._order != _identity(order)

    def mark_was_written(self, average_mark: Tensor) -> bool:
        """Whether something was written to the mark since it was sealed."""
        return self._mark != _version(average_mark)

    def living_source(self) -> "BankModule":
        """The bank that this is a copy of.

        Raises:
            RuntimeError: it is no more.
        """
        source = None if self.source is None else self.source()
        if source is None:
            raise RuntimeError(
                "memory: this copy of a bank was averaged with another, and the bank it was copied from is no "
                "more: its rows and labels are those of when it was copied. memory.load_state_dict(state), of the "
                "memory that was trained, gives it those it should have"
            )
        return source

    def __getstate__(self) -> dict[str, Any]:
        """For a copy, by pickle too, which cannot hold a weak reference."""
        return self.__dict__ | {"source": None if self.source is None else _gone}


def check_labels_and_order(shard: Shard, guard: Guard) -> None:
    """RuntimeError unless labels and order are those of construction or `relabel`. Synchronises."""
    written = f"{REWRITTEN}; memory.relabel(labels) gives new labels"
    known = shard.image_order.labels_at(shard.image_order.position)
    differs = shard.labels != known
    if bool(differs.any()):
        image = int(differs.nonzero()[0])
        raise RuntimeError(
            f"memory: the labels of {int(differs.sum())} of {len(known)} images were changed, first that of image "
            f"{shard.images[image]} from {int(known[image])} to {shard.labels[image].item()}: {written}"
        )
    order = shard.image_order.order
    # A rank of many knows the images of its rows by their order alone: it cannot look whether that is right.
    changed = not shard.image_order.is_inverse_of(order) if shard.is_whole else guard.order_was_written(order)
    if changed:
        raise RuntimeError(f"memory: the order of the rows was changed: {written}")


def check_unit_rows(shard: Shard) -> None:
    """RuntimeError unless all rows are of unit length. Synchronises."""
    found = first_not_unit(shard.storage)
    if found is not None:
        image, length = int(shard.image_order.order[found[0]]), found[1]
        raise RuntimeError(f"memory: the row of image {image} has length {length:.4g} instead of 1: {REWRITTEN}")


def _identity(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), _version(tensor)


def _version(tensor: Tensor) -> int:
    """Rises with each write in place; tensors of inference mode count none."""
    return -1 if tensor.is_inference() else tensor._version


def _gone() -> None:
    """The source of a copy that came out of a file."""
