"""Datasets that say which image each sample is."""

from typing import Any

from torch.utils.data import Dataset, IterableDataset


class IndexedDataset(Dataset[tuple[Any, ...]]):
    """A map-style dataset whose samples end with their index: (image, label) becomes (image, label, index).

    The index is the position in the wrapped dataset, whatever the sampler does, and names the image's row in the bank.

    Args:
        dataset: any dataset with `__getitem__` and `__len__`.

    Raises:
        TypeError: the dataset has no positions (an IterableDataset, or no `__len__`).
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        if isinstance(dataset, IterableDataset) or not (
            hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        ):
            raise TypeError(
                f"dataset: expected a map-style dataset with __getitem__ and __len__, got {type(dataset).__name__}"
            )
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: expected a position below {len(self)}, got {index}")
        sample = self.dataset[index]
        position = index % len(self)
        return (*sample, position) if isinstance(sample, tuple | list) else (sample, position)
