"""Columns of files: features, labels and paths out of .npy, .npz, .pt, .parquet, .json, .jsonl, .csv and .txt.

Nothing is unpickled, and no file is written to.

Shapes: N images, D features.
"""

import base64
import csv
import io
import json
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ntdne_kernels.audit import free_memory

MAGIC = {".npy": b"\x93NUMPY", ".npz": b"PK", ".parquet": b"PAR1", ".pt": b"PK"}  # how these files begin
SUFFIXES = (*MAGIC, ".json")  # of files that hold features
NUMPY_ERRORS = (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error)  # raised for a broken file


def read_matrix(path: Path, names: Sequence[str]) -> NDArray[Any]:
    """Features (N, D) of float16, float32 or float64; .npy and .pt files are mapped into memory.

    Args:
        path: of one of the SUFFIXES. bfloat16, which NumPy does not have, becomes float32, in memory.
        names: the column has one of these.

    Raises:
        ValueError: the file is broken, lacks the column, or does not hold such features.
        OSError: the file cannot be read.
    """
    column = _column(path, "features", names)
    if isinstance(column, list):
        features = _stacked(path, column)
    else:
        features = column if isinstance(column, np.ndarray) else _matrix(path, column)
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"{path}: expected features of shape (images, values), got {features.shape}")
    if features.dtype.kind != "f" or features.dtype.itemsize > 8:
        raise ValueError(f"{path}: expected features as float16, float32 or float64, got {features.dtype}")
    return features


def read_values(path: Path, content: str, names: Sequence[str]) -> "list[Any] | NDArray[np.integer[Any]]":
    """A value for each image: an array of integers, or a list of Python's own types.

    Args:
        path: of one of the SUFFIXES, .csv, .jsonl or .txt.
        content: what a value is, for messages: "label" or "path".
        names: the column has one of these.

    Raises:
        ValueError: the file is broken, lacks the column, or the column is no list.
        OSError: the file cannot be read.
    """
    values = _column(path, content, names)
    if isinstance(values, list):
        return values
    if not isinstance(values, np.ndarray):
        return list(values.to_pylist())
    if values.ndim != 1:
        raise ValueError(f"{path}: expected a list of {content}s, got an array of shape {values.shape}")
    if values.dtype.kind in "iu":
        return values
    if values.dtype.kind == "S":
        values = np.char.decode(values, "utf-8", "surrogateescape")
    return list(values.tolist())


def has_column(path: Path, names: Iterable[str]) -> bool:
    """Whether the file has a column of one of the names; errors as `read_values`."""
    return has_names(path) and not set(names).isdisjoint(column_names(path))


def read_names(path: Path, column: str) -> list[str] | None:
    """A column of texts or numbers as text, "" for what is missing; None where there is none, or one of pictures."""
    if not has_column(path, [column]):
        return None
    if path.suffix == ".parquet":  # where a column of pictures may be larger than memory
        import pyarrow.types as types

        kind = _parquet(path).schema_arrow.field(column).type
        kind = kind.value_type if types.is_dictionary(kind) else kind
        known = types.is_string, types.is_large_string, types.is_integer, types.is_floating
        if not any(is_known(kind) for is_known in known):
            return None
    try:
        values = read_values(path, column, [column])
    except ValueError:
        return None
    return ["" if value is None else str(value) for value in values]


def column_name(path: Path, content: str, names: Sequence[str]) -> str:
    """The first of the names that a column of the file has; arguments and errors as `read_values`."""
    known = column_names(path)
    name = next((name for name in names if name in known), None)
    if name is None:
        raise ValueError(
            f"{path} has no column {' or '.join(names)}; it has {', '.join(filter(None, known)) or 'none'}; "
            f"--{content}-column names another"
        )
    return name


def has_names(path: Path) -> bool:
    """Whether the file has columns with names, or is one column."""
    return path.suffix not in (".npy", ".txt") and not (path.suffix == ".pt" and isinstance(_torch(path), Tensor))


def _column(path: Path, content: str, names: Sequence[str]) -> Any:
    """The column that has one of the names; of .npy and .txt, which have no names, all there is.

    An array, a list of texts, or pyarrow's column.
    """
    _check_beginning(path)
    if path.suffix == ".npy":
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except NUMPY_ERRORS as error:
            raise _broken(path, error) from None
    if path.suffix == ".txt":
        return _text(path).replace("\r\n", "\n").removesuffix("\n").split("\n")
    if not has_names(path):
        return _array(_torch(path))
    name = column_name(path, content, names)
    read = {
        ".npz": _npz_array,
        ".csv": _csv_column,
        ".parquet": _parquet_column,
        ".pt": lambda path, name: _array(_torch(path)[name]),
        ".json": _json_column,
        ".jsonl": _json_column,
    }
    return read[path.suffix](path, name)


def column_names(path: Path) -> list[str]:
    """The names of a file's columns, of one that `has_names`; errors as `read_values`."""
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return list(arrays.files)
        except NUMPY_ERRORS as error:
            raise _broken(path, error) from None
    if path.suffix == ".csv":
        return next(_csv_rows(path))
    if path.suffix == ".pt":
        return list(map(str, _torch(path)))
    if path.suffix in (".json", ".jsonl"):
        return list(dict.fromkeys(name for record in _records(path) for name in record))
    return list(_parquet(path).schema_arrow.names)


def _npz_array(path: Path, name: str) -> NDArray[Any]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            _check_fits(path, arrays.zip.getinfo(f"{name}.npy").file_size)
            array: NDArray[Any] = arrays[name]
            return array
    except NUMPY_ERRORS as error:
        raise _broken(path, error) from None


def _csv_column(path: Path, name: str) -> list[str]:
    rows = _csv_rows(path)
    column = next(rows).index(name)
    return [row[column] if column < len(row) else "" for row in rows]


def _parquet_column(path: Path, name: str) -> Any:
    file = _parquet(path)
    groups = map(file.metadata.row_group, range(file.num_row_groups))
    chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
    # The values of a column of lists are called features.list.element.
    size = sum(each.total_uncompressed_size for each in chunks if f"{each.path_in_schema}.".startswith(f"{name}."))
    _check_fits(path, size)
    return file.read(columns=[name])[name]


def _torch(path: Path) -> Any:
    """The tensor, or the dictionary, that torch.save wrote; tensors are mapped into memory."""
    try:
        saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch.load raises exceptions of many types
        reason = str(error).partition(". ")[0] or type(error).__name__  # the rest advises loading with code execution
        raise ValueError(f"{path} cannot be read: {reason}") from None
    if not isinstance(saved, Tensor | Mapping):
        raise ValueError(f"{path}: expected a tensor or a dictionary of columns, got {type(saved).__name__}")
    return saved


def _array(column: Any) -> Any:
    """A tensor as an array, which NumPy has for all dtypes but bfloat16; a list as it is."""
    if not isinstance(column, Tensor):
        return column if isinstance(column, np.ndarray) else list(column)
    return (column.float() if column.dtype == torch.bfloat16 else column).detach().numpy()


def _records(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON list, of lines of JSON, or of samples.json, as FiftyOne exports a dataset of its type."""
    try:
        if path.suffix == ".jsonl":
            records = [json.loads(line) for line in path.read_bytes().splitlines() if line.strip()]
        else:
            records = json.loads(path.read_bytes())
            records = records if isinstance(records, list) else records["samples"]
    except (ValueError, KeyError, TypeError):
        records = None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(
            f"{path}: expected samples.json of an export as fiftyone.types.FiftyOneDataset, or a list of objects, "
            "found others"
        )
    return records


def _json_column(path: Path, name: str) -> list[Any]:
    """A field of all records: of FiftyOne's Classification its label; of its vectors the values."""
    return [_fiftyone_value(path, name, record.get(name)) for record in _records(path)]


def _fiftyone_value(path: Path, name: str, value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    kind = value.get("_cls") or list(value)
    if "label" in value or kind == "Classification":  # FiftyOne leaves a label of None out
        return value.get("label")
    if "$binary" not in value:  # Detections, say, have many labels
        raise ValueError(f"{path}, column {name}: expected plain values, vectors or a Classification, got {kind}")
    binary = value["$binary"]  # bson's JSON of what FiftyOne makes of an array: .npy, compressed
    try:
        data = base64.b64decode(binary["base64"] if isinstance(binary, dict) else binary)
        return np.load(io.BytesIO(zlib.decompress(data)), allow_pickle=False)
    except (*NUMPY_ERRORS, TypeError) as error:
        raise _broken(path, error) from None


def _check_beginning(path: Path) -> None:
    """ValueError unless the file's name ends as one that can be read, and the file begins as its name says."""
    known = (*SUFFIXES, ".jsonl", ".csv", ".txt")
    if path.suffix not in known:
        raise ValueError(f"{path}: expected a file {', '.join(known)}, got {path.suffix or 'no suffix'}")
    with path.open("rb") as file:
        beginning = file.read(max(map(len, MAGIC.values())))
    if not beginning:
        raise ValueError(f"{path} is empty")
    found = [suffix for suffix, magic in MAGIC.items() if beginning.startswith(magic)]
    if path.suffix not in (found if path.suffix in MAGIC or found else [path.suffix]):
        looks = f"it begins like a {found[0]} file" if found else "it begins like something else"
        raise ValueError(f"{path} is no {path.suffix} file: {looks}")


def _check_fits(path: Path, size: int) -> None:
    if size > (free := free_memory()):
        raise ValueError(
            f"{path} takes {size / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free; save its features as .npy, "
            "which is read part by part, and give --scratch"
        )


def _csv_rows(path: Path) -> Iterator[list[str]]:
    """The header and then the cells of each row as text, since a class may be called NA or 007; [] for a blank line.

    Rows may be shorter than the header, or may all have an empty cell more, as some programs end lines with a comma.

    Raises:
        ValueError: a row is longer, as where a text with a comma has no quotes, so that other cells are under a name;
            or quotes are wrong.
    """
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    lines: dict[bool, int] = {}  # the first line that has an empty cell more, and the first that has not
    try:
        header = next(reader, [])
        yield header
        for row in reader:
            spare = len(row) == len(header) + 1 and not row[-1]
            if row:
                lines.setdefault(spare, reader.line_num)
            if len(row) > len(header) + spare or len(lines) == 2:
                line = reader.line_num if len(row) > len(header) else lines[True]
                raise ValueError(
                    f"{path}: expected at most {len(header)} cells in a row, as in the header, got more in line "
                    f"{line}; a text with a comma needs quotes"
                )
            yield row
    except csv.Error as error:
        raise ValueError(f"{path} cannot be read: line {reader.line_num}: {error}") from None


def _text(path: Path) -> str:
    """The text of a file in UTF-8, in which a file's name may be any bytes; ValueError where it is UTF-16."""
    content = path.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content:
        raise ValueError(f"{path}: expected text in UTF-8, got UTF-16 or no text; save it as UTF-8")
    return content.decode("utf-8-sig", "surrogateescape")


def _parquet(path: Path) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError(f"{path} needs pyarrow: pip install 'ntdne_kernels[audit]'") from None
    try:
        return pq.ParquetFile(path)
    except pa.ArrowException as error:
        raise _broken(path, error) from None


def _matrix(path: Path, column: Any) -> NDArray[Any]:
    """(N, D) from a Parquet column of lists of numbers."""
    import pyarrow as pa
    import pyarrow.compute as pc

    of_lists = pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list
    if not any(is_list(column.type) for is_list in of_lists):
        raise ValueError(f"{path}: expected features as lists of numbers, got {column.type}")
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    if len(lengths) == 0:
        raise ValueError(f"{path} has no rows")
    wrong = np.flatnonzero((lengths != lengths[0]) | (lengths == 0))
    if len(wrong):
        raise ValueError(
            f"{path}: expected lists of features of one length, got {lengths[wrong[0]]} values in row {wrong[0]} and "
            f"{lengths[0]} in row 0"
        )
    values: NDArray[Any] = pc.list_flatten(column).to_numpy()
    return values.reshape(len(lengths), -1)


def _stacked(path: Path, rows: list[Any]) -> NDArray[Any]:
    """(N, D) from a list of rows."""
    if not rows:
        raise ValueError(f"{path} has no rows")
    lengths = [np.size(row) if row is not None else 0 for row in rows]
    wrong = next((i for i, length in enumerate(lengths) if length != lengths[0] or length == 0), None)
    if wrong is not None:
        raise ValueError(
            f"{path}: expected lists of features of one length, got {lengths[wrong]} values in row {wrong} and "
            f"{lengths[0]} in row 0"
        )
    try:
        return np.stack([np.asarray(row, np.asarray(rows[0]).dtype) for row in rows])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: expected features as lists of numbers: {error}") from None


def _broken(path: Path, error: BaseException) -> ValueError:
    reason = str(error) or type(error).__name__
    if "bject" in reason:  # an array of Python objects: "Object arrays cannot ..." or "... Python objects ..."
        reason = "it holds Python objects, which are not loaded; save numbers, or names as array.astype(str)"
    return ValueError(f"{path} cannot be read: {reason}")
