"""How much the values of an Arrow array are once they are written out one by one, as Python has them.

In a file many of them may share a text: a kilobyte can stand for gigabytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

_PLACE = 8
"""Bytes of a place in a list, or of a number."""


def written_out(array: pa.Array) -> int:
    """The bytes of all values, what they share counted for each; of rare types no less than that."""
    import pyarrow as pa

    kind, places = array.type, _PLACE * len(array)
    if pa.types.is_struct(kind):
        return places + sum(written_out(array.field(at)) for at in range(kind.num_fields))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return places + written_out(array.flatten())
    if pa.types.is_map(kind):
        pairs = pa.StructArray.from_arrays([array.keys, array.items], ["key", "value"])
        return places + written_out(pa.ListArray.from_arrays(array.offsets, pairs).flatten())
    if pa.types.is_dictionary(kind) and _is_text(kind.value_type):
        return places + int(_lengths(array.dictionary)[array.indices.drop_null().to_numpy()].sum())
    if _is_text(kind):
        return places + int(_lengths(array).sum())
    if isinstance(array, pa.ExtensionArray):
        return written_out(array.storage)
    return places + _most(array, len(array))


def _most(array: pa.Array, count: int) -> int:
    """The bytes that `count` of its values have at most."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = array.type
    if pa.types.is_union(kind) or pa.types.is_struct(kind):
        return count * _PLACE + sum(_most(array.field(at), count) for at in range(kind.num_fields))
    if pa.types.is_dictionary(kind):
        return _most(array.dictionary, count)
    if pa.types.is_run_end_encoded(kind):
        return _most(array.values, count)
    if isinstance(array, pa.ExtensionArray):
        return _most(array.storage, count)
    if pa.types.is_map(kind):
        longest = int(np.diff(array.offsets.to_numpy()).max(initial=0))
        return count * _PLACE + sum(_most(part, count * longest) for part in (array.keys, array.items))
    if pa.types.is_nested(kind):  # Lists and views of them.
        longest = pc.max(pc.list_value_length(array)).as_py() or 0
        return count * _PLACE + _most(array.values, count * longest)
    largest = int(_lengths(array).max(initial=0)) if _is_text(kind) else _PLACE
    return count * (_PLACE + largest)


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    views = pa.types.is_string_view(kind) or pa.types.is_binary_view(kind)
    return views or any(
        known(kind)
        for known in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    )


def _lengths(texts: pa.Array) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The bytes of each text."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_string_view(texts.type) or pa.types.is_binary_view(texts.type):
        # A view is 16 bytes, of which the first four are the length.
        views = np.frombuffer(texts.buffers()[1], np.int32).reshape(-1, 4)[texts.offset : texts.offset + len(texts)]
        lengths: np.ndarray[tuple[int], np.dtype[np.int64]] = views[:, 0].astype(np.int64)
        return lengths
    found = pc.fill_null(pc.binary_length(texts), 0).to_numpy(zero_copy_only=False)
    return np.asarray(found, np.int64)
