"""Labels and indices from tensors, lists, arrays and Series of numbers or names, read the same way everywhere.

NumPy is imported only for arrays and the like, whose owner has it.

Shapes: N images, n values.
"""

import operator
import re
import unicodedata
from collections.abc import Iterable, Mapping, Set
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ntdne_kernels.arguments import UNLABELLED, check_classes

if TYPE_CHECKING:
    import numpy as np

NUMBER = re.compile(r"[+-]?(0|[1-9][0-9]*)(\.[0-9]*)?([eE][+-]?[0-9]{1,2})?", re.ASCII)  # 007 is a name
INT64_END = 2**63  # integers are at least −2^63 and below 2^63


def as_labels(labels: Any, name: str = "labels", device: torch.device | None = None) -> Tensor:
    """The labels (N,) as a tensor of integers, −1 for those without one.

    Example:
        >>> as_labels([2, None, 0])
        tensor([ 2, -1,  0])
        >>> as_labels(["1", " -1 ", "3.0"])
        tensor([ 1, -1,  3])

    Args:
        labels: integers in a tensor, whose dtype and device are kept. Or a list, array, Series and the like of
            integers, whole numbers, or text in which all is whole numbers (" -1 ", "-1.0e+00"); None, NaN and blank
            text mean unlabelled. These become int64, but for arrays of integers, which keep their dtype.
        name: of the argument, in errors.
        device: of the result where labels are no tensor; None: the CPU.

    Raises:
        TypeError: they are names, which `encode_labels` numbers, or anything else.
        ValueError: they have not one dimension.
    """
    if isinstance(labels, Tensor):
        return _check_tensor(labels, name)
    values = read_labels(labels, name)
    if not isinstance(values, Tensor):
        example = next(value for value in values if value is not None)
        raise TypeError(
            f"{name}: expected integers, got names such as {example!r}; this line numbers them: "
            f"{name}, classes = ntdne_kernels.encode_labels({name})"
        )
    return values if device is None else values.to(device)


def as_index(index: Any, name: str = "index", device: torch.device | None = None) -> Tensor:
    """The indices (n,) as int64.

    Example:
        >>> as_index(range(3))
        tensor([0, 1, 2])

    Args:
        index: integers in a tensor, whose device is kept, or in a list, array, Series and the like.
        name: of the argument, in errors.
        device: of the result where the index is no tensor; None: the CPU.

    Raises:
        TypeError: they are no integers.
        ValueError: they have not one dimension.
    """
    if isinstance(index, Tensor):
        return _check_tensor(index, name).to(torch.int64)
    values = _array_or_list(index, name, "integers")
    if not isinstance(values, list):
        if values.dtype.kind not in "iu":
            raise TypeError(f"{name}: expected integers, got {values.dtype}")
        return _from_array(values, name).to(device or "cpu", torch.int64)
    wrong = next((value for value in values if isinstance(value, bool) or not hasattr(value, "__index__")), None)
    if wrong is not None or None in values:
        raise TypeError(f"{name}: expected integers, got {wrong!r}")
    return torch.tensor([operator.index(value) for value in values], dtype=torch.int64, device=device or "cpu")


def encode_labels(labels: Any) -> tuple[Tensor, tuple[Any, ...]]:
    """Number the classes of labels from 0.

    Example:
        >>> encode_labels(["oak", "ash", None, "oak"])
        (tensor([ 1,  0, -1,  1]), ('ash', 'oak'))
        >>> encode_labels([7, 3, -1, 7])
        (tensor([ 1,  0, -1,  1]), (3, 7))

    Args:
        labels: (N,) as `as_labels` takes them; or names in a list, array, Series and the like, of which blanks at both
            ends are dropped; those that differ in Unicode form alone become one, in NFC.

    Returns:
        The code (N,) of each image's class, −1 for unlabelled, and the C classes by code: integers or names, ascending.

    Raises:
        TypeError: labels are neither integers nor names.
        ValueError: they have not one dimension, or some are below −1.
    """
    values = _check_tensor(labels, "labels") if isinstance(labels, Tensor) else read_labels(labels, "labels")
    if not isinstance(values, Tensor):
        names = tuple(sorted({value for value in values if value is not None}))
        code = {name: place for place, name in enumerate(names)} | {None: UNLABELLED}
        return torch.tensor([code[value] for value in values], device="cpu"), names
    integers = values.to("cpu", torch.int64)
    check_classes(integers)
    classes, codes = torch.unique(integers, return_inverse=True)
    unlabelled = int(len(classes) > 0 and int(classes[0]) == UNLABELLED)
    return codes - unlabelled, tuple(classes[unlabelled:].tolist())


def read_labels(labels: Any, name: str) -> "Tensor | list[str | None]":
    """Labels (N,) that are no tensor, as integers on the CPU, −1 for unlabelled, or as names, None for unlabelled.

    Raises:
        TypeError: they are neither integers nor names.
        ValueError: they have not one dimension.
    """
    values = _array_or_list(labels, name, "integers or names")
    if not isinstance(values, list):
        return _from_array(values, name)
    if all(type(value) is int for value in values):
        return _from_integers(values, name)
    if set(map(type, values)) <= {str, type(None)}:  # a million labels have few different names: read each name once
        value_of = {value: _plain_value(value) for value in set(values)}
        plain = [value_of[value] for value in values]
    else:
        plain = [_plain_value(value) for value in values]
    known = [value for value in plain if value is not None]
    types = set(map(type, known))
    nested = next((found for found in types if hasattr(found, "__len__") and found is not str), None)
    if nested is not None:
        raise ValueError(f"{name}: expected one dimension, got {type(labels).__name__} of {nested.__name__}")
    if types == {str}:
        integer_of = {text: _parse_integer(text) for text in set(known)}
        if None in integer_of.values():
            one = {name: form for form, same in unicode_forms(known).items() if len(same) > 1 for name in same}
            return [one.get(text, text) for text in plain] if one else plain
        plain = [None if text is None else integer_of[text] for text in plain]
    elif not types <= {int, float}:
        found_types = " and ".join(sorted(found.__name__ for found in types))
        raise TypeError(f"{name}: expected integers or names, got {found_types}")
    wrong = next((value for value in known if isinstance(value, float) and not value.is_integer()), None)
    if wrong is not None:
        raise _no_integer(name, wrong)
    return _from_integers([UNLABELLED if value is None else int(value) for value in plain], name)


def unicode_forms(names: Iterable[str]) -> dict[str, list[str]]:
    """The different names of each class by its name in Unicode's form NFC; macOS writes names of files in NFD."""
    forms: dict[str, list[str]] = {}
    for name in sorted(set(names)):
        forms.setdefault(unicodedata.normalize("NFC", name), []).append(name)
    return forms


def _check_tensor(values: Tensor, name: str) -> Tensor:
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"{name}: expected an integer tensor, got {values.dtype}")
    if values.dim() != 1:
        raise ValueError(f"{name}: expected one dimension, got shape {tuple(values.shape)}")
    return values


def _array_or_list(values: Any, name: str, expected: str) -> "np.ndarray[Any, Any] | list[Any]":
    """An array of numbers (n,), or a list of anything else."""
    if hasattr(values, "__array__"):  # arrays, Series, Categoricals
        import numpy as np

        array = np.asanyarray(values)
        if array.ndim != 1:
            raise ValueError(f"{name}: expected one dimension, got shape {array.shape}")
        if np.ma.is_masked(array):
            return list(array.tolist())  # None for what is masked
        array = np.asarray(array)
        if array.dtype.kind not in "iufOUS":
            raise TypeError(f"{name}: expected {expected}, got {array.dtype}")
        return array if array.dtype.kind in "iuf" else list(array.tolist())
    if isinstance(values, str | bytes | Mapping | Set) or not isinstance(values, Iterable):
        raise TypeError(f"{name}: expected {expected}, got {type(values).__name__}")
    return list(values)


def _from_array(array: "np.ndarray[Any, Any]", name: str) -> Tensor:
    """The whole numbers (n,) of an array, NaN as −1."""
    import numpy as np

    if array.dtype.kind == "f":
        array = np.where(np.isnan(array), UNLABELLED, array).astype(np.float64)
        whole = (array == np.floor(array)) & (np.abs(array) < float(INT64_END))
        if not whole.all():
            raise _no_integer(name, array[~whole][0])
        array = array.astype(np.int64)
    elif array.dtype.kind == "u" and array.dtype.itemsize == 8:
        if len(array) and array.max() >= INT64_END:
            raise _no_integer(name, array.max())
        array = array.astype(np.int64)
    # A copy in native byte order: torch takes no other order and no negative strides, and warns of read-only memory.
    return torch.from_numpy(np.array(array, array.dtype.newbyteorder("=")))


def _from_integers(values: list[int], name: str) -> Tensor:
    wrong = next((value for value in values if not -INT64_END <= value < INT64_END), None)
    if wrong is not None:
        raise _no_integer(name, wrong)
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def _no_integer(name: str, value: Any) -> TypeError:
    return TypeError(f"{name}: expected integers of 64 bits or names, got numbers such as {value}")


def _plain_value(value: Any) -> Any:
    """A label as an int, float, text without blanks at its ends, or None where it is missing."""
    if type(value).__name__ in ("NAType", "NaTType", "MaskedConstant"):  # pandas' and NumPy's
        return None
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()  # NumPy's and torch's scalars
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    if isinstance(value, str):
        return str(value).strip() or None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return None if value != value else int(value) if isinstance(value, int) else float(value)
    return value


def _parse_integer(text: str) -> int | None:
    """The 64-bit integer that the text is, or None."""
    if not NUMBER.fullmatch(text):
        return None
    number = Decimal(text)
    return int(number) if number == int(number) and -INT64_END <= number < INT64_END else None
