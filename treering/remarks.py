"""What people say of versions later: aliases, tags and notes. Versions never change, so it stands beside them.

`remarks.jsonl` has a line for each remark, the last of its kind counts. An alias may stand wherever a version is named.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from treering.errors import UsageError, VersionError
from treering.files import append_line, one_line, timestamp, whole_lines

FILE = "remarks.jsonl"

RESERVED = ("current", "base", "off")
"""Names that mean something else where a version is named."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}")
_OF_VERSION = re.compile(r"v[0-9]+")

LONGEST_NOTE = 10_000


@dataclass(frozen=True)
class Remarks:
    """Those of a workspace: the version of each alias, the tags of each version, and its notes, `time` and `text`."""

    aliases: dict[str, str] = field(default_factory=dict)
    tags: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def of(self, version: str) -> dict[str, Any]:
        """What is said of one: `aliases`, `tags`, `notes`."""
        return {
            "aliases": sorted(alias for alias, name in self.aliases.items() if name == version),
            "tags": self.tags.get(version, []),
            "notes": self.notes.get(version, []),
        }


def read(root: Path) -> Remarks:
    """The remarks of the workspace in `root`. Raises `VersionError` if the file is damaged."""
    found = Remarks()
    for number, line in whole_lines(root / FILE):
        try:
            _take(found, json.loads(line))
        except (UsageError, ValueError, KeyError, TypeError, RecursionError):
            raise VersionError(
                f"{root / FILE}, line {number} is damaged; restore the file from a backup, or take the line out"
            ) from None
    return found


def _take(found: Remarks, line: dict[str, Any]) -> None:
    version = line["version"]
    if version is not None and not _OF_VERSION.fullmatch(version):
        raise ValueError(version)
    if "alias" in line:
        found.aliases.pop(checked(line["alias"]), None)
        if version is not None:
            found.aliases[line["alias"]] = version
    elif "tag" in line:
        tags = found.tags.setdefault(version, [])
        tags[:] = [tag for tag in tags if tag != line["tag"]] + [checked(line["tag"])] * bool(line["is_set"])
    else:
        found.notes.setdefault(version, []).append({"time": str(line["time"]), "text": str(line["note"])})


def set_alias(root: Path, alias: str, version: str | None) -> None:
    """Have `alias` name `version` from now on, or nothing. Raises `UsageError` for a name that it cannot have."""
    if alias in RESERVED or _OF_VERSION.fullmatch(alias):
        raise UsageError(f"{alias!r} means something else where a version is named; take another name")
    if version is None and alias not in read(root).aliases:
        raise UsageError(f"there is no alias {alias!r}; {_listed(read(root))}")
    append_line(root / FILE, {"time": timestamp(), "version": version, "alias": checked(alias)})


def set_tag(root: Path, version: str, tag: str, is_set: bool = True) -> None:
    """Have `version` bear `tag`, or bear it no longer. Raises `UsageError` where it does not, or the tag is no name."""
    if not is_set and tag not in read(root).tags.get(version, ()):
        raise UsageError(f"{version} has no tag {tag!r}; `treering show {version}` has all it has")
    append_line(root / FILE, {"time": timestamp(), "version": version, "tag": checked(tag), "is_set": is_set})


def add_note(root: Path, version: str, text: str) -> None:
    """Add a note on `version`. Raises `UsageError` for one that is empty or without end."""
    text = one_line(text.strip())
    if not 0 < len(text) <= LONGEST_NOTE:
        raise UsageError(f"the note has {len(text)} characters; write 1 to {LONGEST_NOTE}")
    append_line(root / FILE, {"time": timestamp(), "version": version, "note": text})


def checked(name: str) -> str:
    """`name`, if an alias or a tag can have it. Raises `UsageError`."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no name: up to 64 letters, digits, dots, dashes and underscores, a letter first")
    return name


def _listed(found: Remarks) -> str:
    return f"there are: {', '.join(sorted(found.aliases))}" if found.aliases else "there is none yet"
