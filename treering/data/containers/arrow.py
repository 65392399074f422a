"""Tables in Arrow's memory layout: Parquet, Arrow files and streams, Feather."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, BinaryIO

from treering.data.containers import Found, Source
from treering.data.containers.sizes import written_out
from treering.data.values import RowError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_ARROW_FILE = b"ARROW1"

_ROWS, _BYTES = 1024, 1 << 26
"""How much is decoded at once, at most."""

_PIECE = 1 << 30
"""Bytes of one column of a batch beyond which its length is taken for damage, if there is no memory for it."""

_PLAINLY = {"PLAIN", "RLE", "BIT_PACKED", "PLAIN_DICTIONARY", "RLE_DICTIONARY"}
"""Encodings of Parquet that a column which is read as a dictionary may have."""


def read_parquet(source: Source) -> Iterator[Found]:
    """The rows of a Parquet file."""
    import pyarrow.parquet as pq

    def batches(file: BinaryIO) -> Iterator[pa.RecordBatch]:
        about = pq.read_metadata(file)
        groups = [about.row_group(at) for at in range(about.num_row_groups)]
        # A text that many rows have is there once; written out, a small file could fill the memory.
        texts = _dictionaries(groups)
        table = pq.ParquetFile(file, metadata=about, page_checksum_verification=True, read_dictionary=texts)
        # Other columns may hold images, or dates that Python cannot.
        known = source.columns(table.schema_arrow.names)
        long = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)
        rows = max(1, min(_ROWS, _BYTES // max(1, long)))
        for at in range(len(groups)):  # Each alone, for pyarrow joins no nested dictionaries of two.
            yield from table.iter_batches(rows, row_groups=[at], columns=known)

    return _rows(source, batches, "Parquet")


def read_arrow(source: Source) -> Iterator[Found]:
    """The rows of an Arrow file (as Feather is one) or stream (as `datasets` writes them)."""
    import pyarrow as pa

    def batches(file: BinaryIO) -> Iterator[pa.RecordBatch]:
        is_file = file.read(len(_ARROW_FILE)) == _ARROW_FILE
        file.seek(0)
        kind = pa.ipc.open_file if is_file else pa.ipc.open_stream
        names = kind(file).schema.names
        known = source.columns(names)
        file.seek(0)
        options = pa.ipc.IpcReadOptions(included_fields=[place for place, name in enumerate(names) if name in known])
        reader = kind(file, options=options)
        found = (reader.get_batch(place) for place in range(reader.num_record_batches)) if is_file else reader
        for batch in found:
            # What the file says of its own lengths and offsets is believed by nobody before this.
            batch.validate(full=True)
            yield batch

    return _rows(source, batches, "Arrow data")


class _File(io.BufferedReader):
    """A file of which no more is asked for than there is: a damaged one may say that it goes on for petabytes."""

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(0, os.fstat(self.fileno()).st_size - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left))


def _rows(source: Source, batches: Any, what: str) -> Iterator[Found]:
    number = 0
    try:
        with _File(io.FileIO(source.path)) as file:
            for batch in (part for whole in batches(file) for part in _parts(whole)):
                labels = _label_names(batch.schema)
                for found in _batch(batch, number):
                    number += 1
                    yield found._replace(value=_with_names(found.value, labels)) if labels else found
    except RowError:
        raise
    except Exception as error:  # a damaged file makes pyarrow raise nearly anything
        if isinstance(error, MemoryError) and not _absurd(error):
            raise
        raise RowError(
            "unreadable", f"the {what} cannot be read after row {number}: {error}; write the file again"
        ) from error


def _absurd(error: MemoryError) -> bool:
    """Whether so much memory was asked for in one piece that the file is to blame, not the machine."""
    asked = re.search(r"of size (\d+)", str(error))
    return "capacity too large" in str(error) or (asked is not None and int(asked[1]) > _PIECE)


def _dictionaries(groups: Sequence[pq.RowGroupMetaData]) -> list[str]:
    """The columns of texts that pyarrow can keep as dictionaries: such as are one everywhere."""
    columns = [[group.column(at) for group in groups] for at in range(groups[0].num_columns if groups else 0)]
    return [
        parts[0].path_in_schema
        for parts in columns
        if all(part.physical_type == "BYTE_ARRAY" and _PLAINLY.issuperset(part.encodings) for part in parts)
    ]


def _parts(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """As few rows together as are no more than `_ROWS`, with no more than `_BYTES`."""
    rows = batch.num_rows
    if rows <= 1 or (rows <= _ROWS and written_out(batch.to_struct_array()) <= _BYTES):
        yield batch
        return
    for half in (batch.slice(0, rows // 2), batch.slice(rows // 2)):
        yield from _parts(half)


def _batch(batch: pa.RecordBatch, before: int) -> list[Found]:
    if batch.num_rows == 1 and (size := written_out(batch.to_struct_array())) > _BYTES:
        reason = f"the row has {size:,} bytes written out, more than {_BYTES:,}; split it"
        return [Found(before + 1, None, "", RowError("too-large", reason))]
    try:
        return [Found(number, row) for number, row in enumerate(batch.to_pylist(), before + 1)]
    except ValueError:  # one row is not what the schema says; find out which
        return [_one(batch.slice(place, 1), before + place + 1) for place in range(batch.num_rows)]


def _one(batch: pa.RecordBatch, number: int) -> Found:
    try:
        return Found(number, batch.to_pylist()[0])
    except ValueError as error:
        return Found(number, None, "", RowError("unreadable", f"the row cannot be decoded: {error}; write it again"))


def _label_names(schema: pa.Schema) -> dict[str, Sequence[str]]:
    """The names behind the numbers of `ClassLabel` columns, which `datasets` keeps beside the table."""
    with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            name: feature["names"]
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and _are_names(feature.get("names"))
        }
    return {}


def _are_names(names: object) -> bool:
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


def _with_names(row: object, labels: Mapping[str, Sequence[str]]) -> object:
    if not isinstance(row, dict):
        return row
    return {
        key: labels[key][value]
        if key in labels and isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(labels[key])
        else value
        for key, value in row.items()
    }
