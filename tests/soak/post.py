"""What people put into an inbox, and how: in any format, at once or bit by bit, whole or damaged."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.soak.language import Row

FORMATS = ("jsonl", "csv", "json", "parquet")
MANNERS = ("renamed", "slowly", "halting")
SETTLE = 1.0
"""The `settle_seconds` that these manners are made for."""

DAMAGES = ("binary", "cut array", "cut line", "empty", "unknown columns", "latin")


def encoded(rows: Sequence[Row], suffix: str) -> bytes:
    """The rows as a file."""
    if suffix == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if suffix == "json":
        return json.dumps(rows, indent=1).encode()
    if suffix == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), sink)
    return sink.getvalue()


def damaged(damage: str, rows: Sequence[Row]) -> tuple[str, bytes, Sequence[Row]]:
    """A broken file made of `rows`: its suffix, its content, and the rows that are good all the same."""
    lines, array = encoded(rows, "jsonl"), encoded(rows, "json")
    return {
        "binary": ("jsonl", bytes(range(256)) * 8, ()),
        "cut array": ("json", array[: len(array) // 2], ()),
        "cut line": ("jsonl", lines[:-20], rows[:-1]),
        "empty": ("jsonl", b"", ()),
        "unknown columns": ("csv", encoded(rows, "csv").replace(b"text,label", b"one,two"), ()),
        "latin": ("jsonl", lines + '{"text": "Übergröße", "label": "north"}\n'.encode("latin-1"), ()),
    }[damage]


def put(path: Path, content: bytes, manner: str) -> None:
    """Write the file as programs do: `halting` ones pause in the middle for longer than the loop waits."""
    path.parent.mkdir(exist_ok=True)
    if manner == "renamed":
        partial = path.with_name(path.name + ".tmp")
        partial.write_bytes(content)
        partial.rename(path)
        return
    pieces, pause = (2, 4 * SETTLE) if manner == "halting" else (5, SETTLE / 4)
    size = len(content) // pieces + 1
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(content), size):
            if start:
                time.sleep(pause)
            file.write(content[start : start + size])
