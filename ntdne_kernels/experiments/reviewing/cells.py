"""Copies of files in which labels of some images are changed, and nothing else.

CSV, JSON and text keep all other bytes. Parquet keeps its columns, types, metadata, row groups and codecs.

Shapes: N rows.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ntdne_kernels.experiments.columns import column_name, has_names
from ntdne_kernels.experiments.files import write_whole

SUFFIXES = (".csv", ".txt", ".json", ".jsonl", ".parquet")  # of files that can be copied so
CSV_CELL = re.compile(r'("(?:[^"]|"")*"[^,\r\n]*|[^,\r\n]*)(,|\r\n|\n|\r|\Z)')
LINE = re.compile(r"([^\n]*?)(?:\r?\n|\Z)")
SPACE = re.compile(r"[ \t\r\n]*")
DECODER = json.JSONDecoder()
Changes = Mapping[int, str | None]  # the label that a row gets, by the row; None: no label


def write_changed(path: Path, names: Sequence[str], changes: Changes, copy: Path) -> None:
    """Write a copy of the file in which rows have other labels.

    Args:
        path: of one of the SUFFIXES.
        names: the column of labels has one of these, as `columns.read_values` takes them.
        changes: by row. In a column of numbers the text is one.
        copy: is written.

    Raises:
        ValueError: the column cannot hold a label, as a column of small integers a large one.
        OSError: a file cannot be read or written.
    """
    name = column_name(path, "label", names) if has_names(path) else ""
    if path.suffix == ".parquet":
        _write_parquet(path, name, changes, copy)
        return
    content = path.read_bytes()
    of_json = path.suffix in (".json", ".jsonl")
    encoding, errors = (json.detect_encoding(content), "surrogatepass") if of_json else ("utf-8", "surrogateescape")
    text = content.decode(encoding, errors)  # as they are read
    edits = {".csv": _csv_edits, ".txt": _line_edits}.get(path.suffix, _json_edits)(text, name, changes)
    pieces, at = [], 0
    for edit in sorted(edits):
        pieces += [text[at : edit.start], edit.text]
        at = edit.end
    pieces.append(text[at:])
    write_whole(copy, lambda file: file.write("".join(pieces).encode(encoding, errors)))


class _Edit(NamedTuple):
    start: int
    end: int
    text: str


def _line_edits(text: str, name: str, changes: Changes) -> Iterator[_Edit]:
    for row, line in enumerate(LINE.finditer(text, len(_mark(text)))):
        if row in changes:
            yield _Edit(*line.span(1), changes[row] or "")


def _csv_edits(text: str, name: str, changes: Changes) -> Iterator[_Edit]:
    column, row, place = -1, -1, 0  # the header is row −1
    for cell in CSV_CELL.finditer(text, len(_mark(text))):
        ends = cell[2] != ","
        if row < 0 and column < 0 and _unquoted(cell[1]) == name:
            column = place
        elif row in changes and (place == column or (ends and place < column)):
            missing = "," * (column - place)  # a blank line is a row without a label
            start = cell.end(1) if missing else cell.start(1)
            yield _Edit(start, cell.end(1), missing + _quoted(changes[row] or "", cell[1]))
        place = 0 if ends else place + 1
        row += ends


def _unquoted(cell: str) -> str:
    return cell[1:-1].replace('""', '"') if cell.startswith('"') else cell


def _quoted(value: str, before: str) -> str:
    """The value as a cell, in quotes where it needs them or the cell had them before."""
    quoted = before.startswith('"') or value != value.strip() or any(each in value for each in ',"\r\n')
    return '"' + value.replace('"', '""') + '"' if quoted else value


def _json_edits(text: str, name: str, changes: Changes) -> Iterator[_Edit]:
    rows = list(_json_rows(text))
    label = next((value for row in rows if (value := DECODER.raw_decode(text, row)[0].get(name)) is not None), None)
    for row, new in changes.items():
        yield _json_edit(text, rows[row], name, new, label)


def _json_edit(text: str, record: int, name: str, new: str | None, label: Any) -> _Edit:
    """The edit of one record; `label` is how any label of the column looks."""
    last = record + 1
    for key, start, end in _members(text, record):
        last = end
        if key != name:
            continue
        value = DECODER.raw_decode(text, start)[0]
        if isinstance(value, dict) and new is not None:
            if "label" in value:
                inner = next(member for member in _members(text, start) if member.key == "label")
                return _Edit(inner.start, inner.end, _json_value(new, value["label"]))
            label = value | {"label": ""}
        return _Edit(start, end, _json_value(new, label if value is None or isinstance(value, dict) else value))
    comma = ", " if last > record + 1 else ""
    return _Edit(last, last, f"{comma}{json.dumps(name)}: {_json_value(new, label)}")


def _json_value(new: str | None, like: Any) -> str:
    """The label as JSON, of the type of another one."""
    if new is None:
        return "null"
    if isinstance(like, dict):  # FiftyOne's Classification
        kept = {key: value for key, value in like.items() if key in ("_cls", "tags")}
        return json.dumps(kept | {"label": new})
    number = isinstance(like, int | float)
    return json.dumps(type(like)(new) if number else new)


class _Member(NamedTuple):
    key: str | None
    start: int
    end: int


def _members(text: str, start: int) -> Iterator[_Member]:
    """Where the values of the JSON object or array are that begins at `start`."""
    named = text[start] == "{"
    at = _skip(text, start + 1)
    while text[at] not in "}]":
        key = None
        if named:
            key, at = DECODER.raw_decode(text, at)
            at = _skip(text, _skip(text, at) + 1)  # the colon
        _, end = DECODER.raw_decode(text, at)
        yield _Member(key, at, end)
        at = _skip(text, end)
        at = _skip(text, at + 1) if text[at] == "," else at


def _json_rows(text: str) -> Iterator[int]:
    """Where the records begin: of a list, of the list `samples`, or one after the other."""
    at = _skip(text, len(_mark(text)))
    if text[at] == "{":
        first, end = DECODER.raw_decode(text, at)
        if _skip(text, end) < len(text) or not isinstance(first.get("samples"), list):  # lines of records
            while at < len(text):
                yield at
                at = _skip(text, DECODER.raw_decode(text, at)[1])
            return
        at = next(member.start for member in _members(text, at) if member.key == "samples")
    yield from (member.start for member in _members(text, at))


def _skip(text: str, at: int) -> int:
    found = SPACE.match(text, at)
    return found.end() if found else at


def _mark(text: str) -> str:
    """The byte order mark at the beginning, if there is one."""
    return "\ufeff" if text.startswith("\ufeff") else ""


def _write_parquet(path: Path, name: str, changes: Changes, copy: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    source = pq.ParquetFile(path)
    schema, groups = source.schema_arrow, source.metadata
    place = schema.get_field_index(name)
    field = schema.field(place)
    codecs = {}
    if groups.num_row_groups:
        chunks = map(groups.row_group(0).column, range(groups.num_columns))
        codecs = {each.path_in_schema: each.compression.lower().replace("uncompressed", "none") for each in chunks}

    def write(file: Any) -> None:
        first = 0
        with pq.ParquetWriter(file, schema, compression=codecs or "snappy") as writer:
            for group in range(groups.num_row_groups):
                table = source.read_row_group(group)
                labels = table.column(place).combine_chunks()
                own = {row - first: new for row, new in changes.items() if first <= row < first + len(table)}
                writer.write_table(
                    table.set_column(place, field, _arrow_changed(pa, labels, own)) if own else table,
                    row_group_size=max(len(table), 1),
                )
                first += len(table)

    try:
        write_whole(copy, write)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, ValueError) as error:
        raise ValueError(f"{path}: column {name} of {field.type} cannot hold a label: {error}") from None


def _arrow_changed(pa: Any, labels: Any, changes: Changes) -> Any:
    if isinstance(labels, pa.ChunkedArray):
        labels = labels.chunk(0) if labels.num_chunks else pa.array([], labels.type)
    if pa.types.is_dictionary(labels.type):
        names = labels.dictionary.to_pylist()
        names += sorted({new for new in changes.values() if new is not None} - set(map(str, names)))
        code = {str(name): place for place, name in enumerate(names)}
        codes = labels.indices.to_pylist()
        for row, new in changes.items():
            codes[row] = None if new is None else code[new]
        kind = labels.type
        dictionary = pa.array([_arrow_value(pa, name, kind.value_type) for name in names], kind.value_type)
        return pa.DictionaryArray.from_arrays(pa.array(codes, kind.index_type), dictionary, ordered=kind.ordered)
    values = labels.to_pylist()
    for row, new in changes.items():
        values[row] = None if new is None else _arrow_value(pa, new, labels.type)
    return pa.array(values, labels.type)


def _arrow_value(pa: Any, value: Any, kind: Any) -> Any:
    """A label as Python's type for a column."""
    if pa.types.is_integer(kind):
        return int(value)
    return float(value) if pa.types.is_floating(kind) else value
