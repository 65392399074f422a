"""What a file without a name is, by its first bytes."""

from __future__ import annotations

from pathlib import Path

from treering.data.containers.packed import unpacked
from treering.data.values import RowError

_PACKED = {b"\x1f\x8b": (".gz", "gzip"), b"\x28\xb5\x2f\xfd": (".zst", "zstd")}
_TABLES = {b"PAR1": ".parquet", b"ARROW1": ".arrow", b"\xff\xff\xff\xff": ".arrow"}
_HEAD = 1 << 16


def suffix_of(file: Path) -> str:
    """The ending that its name should have: for text that is no JSON, one of a table."""
    with file.open("rb") as stream:
        head = stream.read(_HEAD)
    for magic, (ending, packing) in _PACKED.items():
        if head.startswith(magic):
            return _of_text(_unpacked(file, packing)) + ending
    table = next((ending for magic, ending in _TABLES.items() if head.startswith(magic)), None)
    return table or _of_text(head)


def _unpacked(file: Path, packing: str) -> bytes:
    try:
        with unpacked(file, packing) as stream:
            return stream.read(_HEAD)
    except RowError:
        return b""  # Reading it will say what is wrong.


def _of_text(head: bytes) -> str:
    encoding = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    lines = [line.strip() for line in head.decode(encoding, "replace").splitlines() if line.strip()] or [""]
    if lines[0].startswith("["):
        return ".json"
    if lines[0].startswith("{"):
        # One object laid out over lines opens on its first and ends on another.
        return ".jsonl" if lines[0].endswith("}") or len(lines) == 1 or lines[1].startswith("{") else ".json"
    return ".tsv" if "\t" in lines[0] else ".csv"
