"""What values of Arrow arrays take once they are written out: never less, and for common types hardly more."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from treering.data.containers.sizes import written_out

LONG = "x" * 1000
SHARED = pa.DictionaryArray.from_arrays(pa.array([0, None] * 20, pa.int32()), pa.array([LONG]))
TURN = {"role": "user", "content": LONG}

EXACT = {
    "texts": pa.array([LONG, None, "é"] * 10),
    "large texts": pa.array([LONG, None] * 20, pa.large_string()),
    "views of texts": pa.array([LONG, None, "short"] * 10).cast(pa.string_view()),
    "one text": SHARED,
    "one text in structs": pa.StructArray.from_arrays([SHARED, pa.array([1] * 40)], ["a", "b"]),
    "one text in lists": pa.ListArray.from_arrays(pa.array([0, 3, 3, 40], pa.int32()), SHARED),
    "one text in pairs": pa.FixedSizeListArray.from_arrays(SHARED, 2),
    "turns": pa.array([[TURN] * 3, [], None, [TURN]] * 10),
    "maps": pa.array([[("a", LONG)], [], None] * 10, pa.map_(pa.string(), pa.string())),
    "nothing": pa.nulls(30),
    "no texts": pa.array([], pa.string_view()),
}
AT_LEAST = {
    "a dictionary of lists": pa.DictionaryArray.from_arrays(pa.array([0] * 40, pa.int32()), pa.array([[LONG] * 9])),
    "a dictionary of a dictionary": pa.DictionaryArray.from_arrays(pa.array([0] * 40, pa.int32()), SHARED[:1]),
    "views of a list": pa.ListViewArray.from_arrays([0] * 40, [30] * 40, pa.array([LONG] * 30)),
    "runs": pa.RunEndEncodedArray.from_arrays(pa.array([40], pa.int32()), pa.array([LONG])),
    "unions": pa.UnionArray.from_dense(
        pa.array([0] * 40, pa.int8()), pa.array([0] * 40, pa.int32()), [pa.array([LONG])]
    ),
}


def texts(value: Any) -> int:
    """The bytes of all texts in it."""
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, dict):
        return texts(list(value.values()))
    return sum(map(texts, value)) if isinstance(value, list | tuple) else 0


@pytest.mark.parametrize("name", [*EXACT, *AT_LEAST])
@pytest.mark.parametrize("part", [slice(None), slice(1, 7), slice(20, None)])
def test_no_less_than_there_is(name: str, part: slice) -> None:
    array = (EXACT | AT_LEAST)[name][part]
    there, found = texts(array.to_pylist()), written_out(array)
    assert there <= found
    if name in EXACT:
        assert found <= 1.1 * there + 300 * len(array)


@pytest.mark.parametrize("values", [name for name in EXACT if name != "no texts"])
def test_what_is_behind_a_view(values: str) -> None:
    """Whatever type the shared elements have."""
    inner = EXACT[values]
    views = pa.ListViewArray.from_arrays([0, 1], [len(inner), len(inner) - 1], inner)
    assert texts(views.to_pylist()) <= written_out(views)
