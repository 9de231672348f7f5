"""Datasets that say which image each sample is, and which label each image has."""

import operator
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset

from ntdne_kernels.labels import as_index, as_labels, read_labels

INDEX = "index"  # key of the index in samples with keys
# Where torchvision's datasets, and others like them, keep labels:
LABEL_ATTRIBUTES = ("targets", "labels", "_labels")  # N labels
SAMPLE_ATTRIBUTES = ("samples", "imgs", "_samples")  # N pairs of a file and its label
LABEL_COLUMNS = ("label", "labels")  # of Hugging Face datasets


class IndexedDataset(Dataset[Any]):
    """A map-style dataset whose samples end with their index: (image, label) becomes (image, label, index).

    A sample with keys, as Hugging Face datasets have them, gets the key "index". The index is the position in the
    wrapped dataset, whatever the sampler does; the bank knows the image by it. A slice is a list of samples.

    Example:
        >>> dataset = IndexedDataset([("first image", 4), ("second image", 2)])
        >>> dataset[1]
        ('second image', 2, 1)
        >>> IndexedDataset(TensorDataset(torch.zeros(2, 3, 8, 8), torch.tensor([4, 2]))).labels
        tensor([4, 2])

    Args:
        dataset: any dataset with `__getitem__` and `__len__`.

    Raises:
        TypeError: the dataset is not map-style (an IterableDataset, or no `__len__`).
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

    def __getitem__(self, index: Any) -> Any:
        """The sample at an index, or the list of samples of a slice.

        Raises:
            IndexError: the index is out of range.
            ValueError: the sample has a key "index" already.
        """
        if isinstance(index, slice):
            return [self[position] for position in range(len(self))[index]]
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: expected a position below {len(self)}, got {index}")
        sample, position = self.dataset[index], index % len(self)
        if isinstance(sample, Mapping):
            if INDEX in sample:
                raise ValueError(
                    f"dataset: expected samples without a key {INDEX!r}, which would be replaced; rename it"
                )
            return {**sample, INDEX: position}
        return (*sample, position) if isinstance(sample, tuple | list) else (sample, position)

    @property
    def labels(self) -> Tensor:
        """(N,) int64: the label of each image, by index, −1 for none, as the criterion takes them. No image is read.

        Labels are looked for in attributes `targets`, `labels`, `samples` or `imgs`, in a TensorDataset's second
        tensor, and in the column of a Hugging Face dataset that is called label or labels or is its only ClassLabel;
        also in the parts of a ConcatDataset and behind a Subset, and so random_split.

        Raises:
            TypeError: there is no such place, or it holds no integers. For names, the message has the line that numbers
                them in the whole dataset, so that all of its parts have the same numbers.
            ValueError: labels have not one dimension, `targets` and `labels` differ, or those of a torchvision folder
                were changed in one of `targets` and `samples` alone.
        """
        return _labels_of(self.dataset)


def _labels_of(dataset: Any) -> Tensor:
    """(N,) int64 on the CPU: the labels of a dataset's samples."""
    if isinstance(dataset, IndexedDataset):
        return _labels_of(dataset.dataset)
    found = _labels_in_attributes(dataset)
    if found is not None:
        return found
    if isinstance(dataset, Subset):
        return _labels_of(dataset.dataset)[as_index(dataset.indices, "indices").cpu()]
    if isinstance(dataset, ConcatDataset):
        return torch.cat([_labels_of(part) for part in dataset.datasets])
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) > 1:
        return as_labels(dataset.tensors[1]).to("cpu", torch.int64)
    if hasattr(dataset, "column_names") and hasattr(dataset, "with_format"):
        return _labels_in_column(dataset)
    raise TypeError(
        f"dataset: found no labels of {type(dataset).__name__} without reading its images; give it an attribute "
        f"`targets` with all {len(dataset)} of them, or the criterion labels in the order of the dataset"
    )


def _labels_in_attributes(dataset: Any) -> Tensor | None:
    """Labels that a dataset keeps in an attribute, one for each sample, after its `target_transform`."""
    _check_folder(dataset)
    _check_public(dataset)
    for name in LABEL_ATTRIBUTES + SAMPLE_ATTRIBUTES:
        labels = _of_each_image(dataset, name)
        if labels is None:
            continue
        if name in SAMPLE_ATTRIBUTES:
            if not all(isinstance(sample, tuple | list) and len(sample) > 1 for sample in labels):
                continue
            labels = [sample[1] for sample in labels]
        transform = getattr(dataset, "target_transform", None)
        if transform is not None:
            labels = [transform(label) for label in (labels.tolist() if hasattr(labels, "tolist") else labels)]
        return as_labels(labels, "labels" if name in SAMPLE_ATTRIBUTES else f"dataset.{name}").to("cpu", torch.int64)
    return None


def _of_each_image(dataset: Any, name: str) -> Any:
    """An attribute with a value for each image; None where it has others, as names of classes, or there is none."""
    values: Any = getattr(dataset, name, None)
    return values if hasattr(values, "__len__") and len(values) == len(dataset) else None


def _check_public(dataset: Any) -> None:
    """ValueError where `targets` and `labels` are both labels and differ: samples may carry either, or others."""
    found: list[Tensor] = []
    for name in ("targets", "labels"):
        values = _of_each_image(dataset, name)
        with suppress(TypeError, ValueError):  # names of the classes of `targets`, say, or several numbers an image
            found += [] if values is None else [as_labels(values).to("cpu", torch.int64)]
    if len(found) == 2 and not found[0].equal(found[1]):
        row = int((found[0] != found[1]).nonzero()[0, 0])
        raise ValueError(
            f"dataset: expected the same labels in `targets` and `labels` of {type(dataset).__name__}, got "
            f"{int(found[0][row])} and {int(found[1][row])} for image {row}; remove those that its samples do not "
            "carry, or give the criterion labels in the order of the dataset"
        )


def _check_folder(dataset: Any) -> None:
    """ValueError where a torchvision folder gives other labels, those of its `samples`, than its `targets` say.

    One with a `__getitem__` of its own may give either: there an image tells, the first for which they differ.
    """
    owners = [base.__name__ for base in type(dataset).__mro__ if "__getitem__" in vars(base)]
    targets, samples = getattr(dataset, "targets", None), getattr(dataset, "samples", None)
    if "DatasetFolder" not in owners or not isinstance(targets, list) or not isinstance(samples, list):
        return
    pairs = zip(targets, (sample[1] if isinstance(sample, tuple) else None for sample in samples), strict=False)
    for row, (target, label) in enumerate(pairs):
        if isinstance(target, int) and isinstance(label, int) and target != label:
            if owners[0] != "DatasetFolder" and not _gives(dataset, row, label):
                return
            raise ValueError(
                f"dataset: expected the same labels in `targets` and `samples`, got {target} and {label} for image "
                f"{row}; the dataset gives those of `samples`: dataset.targets = [label for _, label in "
                "dataset.samples] takes them"
            )


def _gives(dataset: Any, row: int, label: int) -> bool:
    """Whether a sample has the label, as `target_transform` makes it, right after the image."""
    transform, sample = getattr(dataset, "target_transform", None), dataset[row]
    return isinstance(sample, tuple) and len(sample) > 1 and sample[1] == (transform(label) if transform else label)


def _labels_in_column(dataset: Any) -> Tensor:
    """Labels of a Hugging Face dataset.

    Raises:
        TypeError: no column or several may be meant, or the labels are names.
    """
    named = [name for name in LABEL_COLUMNS if name in dataset.column_names]
    typed = [name for name, feature in dataset.features.items() if type(feature).__name__ == "ClassLabel"]
    columns = named or typed
    if len(columns) != 1:
        found = ", ".join(columns or dataset.column_names)
        raise TypeError(
            f"dataset: expected one column of labels, found {found}; dataset.rename_column('...', 'label') chooses"
        )
    name = columns[0]
    labels = read_labels(dataset.with_format(None)[name][:], name)  # without transforms, which expect images
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"{name}: expected integers, got names; this line numbers them: "
            f"dataset = dataset.class_encode_column({name!r})"
        )
    return labels
