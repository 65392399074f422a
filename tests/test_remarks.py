"""Aliases, tags and notes: what is read is what was said last, and damage is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from treering import overview, remarks
from treering.errors import UsageError, VersionError


def test_the_last_word_counts(tmp_path: Path) -> None:
    remarks.set_alias(tmp_path, "champion", "v1")
    remarks.set_alias(tmp_path, "champion", "v2")
    remarks.set_alias(tmp_path, "old", "v1")
    remarks.set_alias(tmp_path, "old", None)
    for tag in ("a", "b", "a"):
        remarks.set_tag(tmp_path, "v2", tag)
    remarks.set_tag(tmp_path, "v2", "b", False)
    remarks.add_note(tmp_path, "v2", "one")
    remarks.add_note(tmp_path, "v2", "two")
    found = remarks.read(tmp_path)
    assert found.aliases == {"champion": "v2"}
    assert found.of("v1") == {"aliases": [], "tags": [], "notes": []}
    said = found.of("v2")
    assert (said["aliases"], said["tags"], [note["text"] for note in said["notes"]]) == (
        ["champion"],
        ["a"],
        ["one", "two"],
    )


def test_a_line_that_a_crash_left_is_none(tmp_path: Path) -> None:
    remarks.set_alias(tmp_path, "champion", "v1")
    with (tmp_path / remarks.FILE).open("ab") as file:
        file.write(b'{"version": "v2", "alias": "champ')
    assert remarks.read(tmp_path).aliases == {"champion": "v1"}
    remarks.set_alias(tmp_path, "other", "v1")
    assert remarks.read(tmp_path).aliases == {"champion": "v1", "other": "v1"}


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "{}", '{"version": "../x", "tag": "a"}', '{"version": "v1", "alias": "../x"}', '{"version": 1}'],
)
def test_damage_is_told(tmp_path: Path, line: str) -> None:
    remarks.set_alias(tmp_path, "champion", "v1")
    with (tmp_path / remarks.FILE).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(VersionError, match="line 2 is damaged"):
        remarks.read(tmp_path)


def test_a_note_is_one_line(tmp_path: Path) -> None:
    remarks.add_note(tmp_path, "v1", " a\nb\x1b[2J \udcff ")
    assert remarks.read(tmp_path).of("v1")["notes"][0]["text"] == r"a\x0ab\x1b[2J \udcff"


@pytest.mark.parametrize("name", ["", "current", "base", "off", "v1", "v01", "1a", "a b", "a" * 65, "é", "a\n"])
def test_names_that_none_can_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError):
        remarks.set_alias(tmp_path, name, "v1")
    assert not (tmp_path / remarks.FILE).exists()


def test_a_tree_has_one_stem() -> None:
    def row(name: str, parent: str | None, promote: bool = True) -> dict[str, Any]:
        return {"name": name, "parent": parent, "promote": promote}

    rows = [
        row("v1", None),
        row("v2", "v1", False),
        row("v3", "v1"),
        row("v4", "v3"),
        row("v5", "v3"),
        row("v6", "v4", False),
        row("v7", "v9"),
        row("v8", "v5", False),
    ]

    def shown(current: str | None) -> str:
        return " ".join("-" * depth + found["name"] for depth, found in overview.family(rows, current))

    assert shown("v5") == "-v7 v1 -v2 v3 -v4 --v6 v5 -v8"
    assert shown("v4") == "-v7 v1 -v2 v3 -v5 --v8 v4 -v6"
    assert shown("v1") == "-v7 v1 -v2 v3 -v4 --v6 v5 -v8"
    assert shown("v2") == "-v7 v1 -v3 --v4 ---v6 -v5 --v8 v2"
    assert overview.family([], None) == []
