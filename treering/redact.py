"""Take deleted rows out of a version: their ids, their results, what is stored of them in its memory.

The weights stay as they are, and so do scores and counts of the report, which are sums over many rows; what the version
learned from such rows stands in the manifest under `redactions`, by their tombstones.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treering import registry
from treering.files import fsync_folder, fsync_tree, timestamp
from treering.registry import MANIFEST, REPLACED, Version
from treering.results import PARENT_RESULTS, RESULTS, read_results, write_results

if TYPE_CHECKING:
    from treering.data.tombstones import Tombstones
    from treering.workspace import Workspace

_NEW = ".redacted-"
_BY_TASK = ("rows", "held_out")


def redact(ws: Workspace, version: Version, stones: Tombstones) -> bool:
    """Put in place of `version` one that knows nothing of deleted rows; False if it knew nothing.

    It appears whole: until its folder is complete the old one stays, and `registry.recover` finishes the exchange.
    Raises `VersionError` where the version was changed since it was made: hashes of today would hide that.
    """
    new = ws.versions / f"{_NEW}{version.name}"
    shutil.rmtree(new, ignore_errors=True)
    manifest = {key: value for key, value in version.manifest.items() if key not in ("files", "digest")}
    gone = {key: _gone(manifest[key], stones) for key in _BY_TASK}
    parts = [_memory(version.folder, stones), *(_results(version.folder, name, stones) for name in _RESULTS)]
    writes = [write for write in parts if write is not None]
    if not any(gone.values()) and not writes and not any(id in stones for id in manifest.get("aside", ())):
        return False
    version.check()
    shutil.copytree(version.folder, new, copy_function=os.link)
    (new / MANIFEST).unlink()
    for write in writes:
        manifest |= write(new)
    for key in _BY_TASK:
        manifest[key] = {task: [id for id in ids if id not in stones] for task, ids in manifest[key].items()}
    manifest["aside"] = [id for id in manifest.get("aside", ()) if id not in stones]
    redaction = {"time": timestamp(), **{key: [stones.of(id) for id in ids] for key, ids in gone.items()}}
    manifest["redactions"] = [*manifest.get("redactions", ()), redaction]
    fsync_tree(new)
    registry.seal(new, manifest)
    _exchange(version, new)
    return True


_RESULTS = (RESULTS, PARENT_RESULTS)

_Write = Callable[[Path], dict[str, Any]]
"""Writes what is left into a folder; returns what that changes in the manifest."""


def _gone(by_task: dict[str, Sequence[str]], stones: Tombstones) -> list[str]:
    return [id for ids in by_task.values() for id in ids if id in stones]


def _memory(folder: Path, stones: Tombstones) -> _Write | None:
    if not (folder / "memory.json").exists():
        return None
    from treering.memory import Memory

    memory = Memory.load(folder)
    gone = [id for id in memory.rows if id in stones]
    if not gone:
        return None
    memory.drop(gone)

    def write(new: Path) -> dict[str, Any]:
        memory.save(new)
        return {"memory": memory.by_task()}

    return write


def _results(folder: Path, name: str, stones: Tombstones) -> _Write | None:
    if not (folder / name).exists():
        return None
    results = read_results(folder / name)
    left = [result for result in results if result.id not in stones]
    if len(left) == len(results):
        return None

    def write(new: Path) -> dict[str, Any]:
        write_results(new / name, left)
        return {}

    return write


def _exchange(version: Version, new: Path) -> None:
    old = new.with_name(REPLACED + version.name)
    version.folder.rename(old)
    new.rename(version.folder)
    fsync_folder(new.parent)
    shutil.rmtree(old)
