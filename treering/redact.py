"""Take deleted rows out of a version: their ids, their results, what is stored of them in its memory, and labels that
no other row has.

The weights stay as they are, and so do scores and counts of the report, which are sums over many rows; what the version
learned from such rows stands in the manifest under `redactions`, by their tombstones.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treering import registry
from treering.data.example import Example
from treering.files import timestamp, write_file, write_json
from treering.registry import MANIFEST, Version
from treering.results import BEST, PARENT_RESULTS, RESULTS, read_results, write_results

if TYPE_CHECKING:
    from treering.data.tombstones import Tombstones
    from treering.workspace import Workspace

_BY_TASK = ("rows", "held_out")


class Left:
    """The classes that rows of versions have, once those with a tombstone are gone."""

    def __init__(self, ws: Workspace, stones: Tombstones) -> None:
        self._ws, self._stones = ws, stones
        self._own: dict[str, set[str] | None] = {}

    def of(self, version: Version) -> set[str] | None:
        """Those of all rows that the version and its ancestors learned.

        None: no such row was deleted, or the catalog lacks one that was not, and nobody knows its label.
        """
        line = list(registry.lineage(self._ws, version))
        if not any(one.deleted_rows or any(id in self._stones for id in one.rows) for one in line):
            return None
        found = [self._classes(one) for one in line]
        return None if None in found else set[str]().union(*filter(None, found))

    def _classes(self, version: Version) -> set[str] | None:
        if version.name not in self._own:
            self._own[version.name] = self._read(version)
        return self._own[version.name]

    def _read(self, version: Version) -> set[str] | None:
        from treering.experts import class_of

        found = set[str]()
        for task, ids in version.manifest["rows"].items():
            left = [id for id in ids if id not in self._stones]
            rows = self._ws.catalog.rows(left)
            if len(rows) < len(left):
                return None
            # Whether its answers were labels does not matter: one that is the row's own gives no other away.
            labels = {Example.of(row["messages"]).label for row in rows} | ({""} if rows else set())
            found |= {class_of(task, label) for label in labels}
        return found


def redact(version: Version, stones: Tombstones, left: Left) -> bool:
    """Put in place of `version` one that knows nothing of deleted rows; False if it knew nothing.

    It appears whole: until its folder is complete the old one stays, and `registry.recover` finishes the exchange.
    Raises `VersionError` where the version was changed since it was made: hashes of today would hide that.
    """
    new = registry.replacing(version)
    manifest = dict(version.manifest)
    gone = {key: _gone(manifest[key], stones) for key in _BY_TASK}
    classes = left.of(version)
    parts = [_memory(version.folder, stones, classes), _router(version.folder, classes)]
    parts += [*(_results(version.folder, name, stones) for name in _RESULTS)]
    writes = [write for write in parts if write is not None]
    if not any(gone.values()) and not writes and not any(id in stones for id in manifest.get("aside", ())):
        return False
    version.check_files()
    shutil.copytree(version.folder, new, copy_function=os.link)
    (new / MANIFEST).unlink()
    for write in writes:
        manifest |= write(new)
    for key in _BY_TASK:
        manifest[key] = {task: [id for id in ids if id not in stones] for task, ids in manifest[key].items()}
    manifest["aside"] = [id for id in manifest.get("aside", ()) if id not in stones]
    redaction = {"time": timestamp(), **{key: [stones.of(id) for id in ids] for key, ids in gone.items()}}
    manifest["redactions"] = [*manifest.get("redactions", ()), redaction]
    registry.exchange(version, manifest)
    return True


_RESULTS = (RESULTS, PARENT_RESULTS, BEST)

_Write = Callable[[Path], dict[str, Any]]
"""Writes what is left into a folder; returns what that changes in the manifest."""


def _gone(by_task: dict[str, Sequence[str]], stones: Tombstones) -> list[str]:
    return [id for ids in by_task.values() for id in ids if id in stones]


def _memory(folder: Path, stones: Tombstones, classes: set[str] | None) -> _Write | None:
    if not (folder / "memory.json").exists():
        return None
    from treering.experts import class_of
    from treering.memory import Memory

    memory = Memory.load(folder)
    before = memory.seen
    gone = [id for id in memory.rows if id in stones]
    memory.drop(gone)
    if classes is not None:
        here = classes | {class_of(row.task, row.label) for row in memory.rows.values()}
        memory.seen = {
            task: {label: count for label, count in labels.items() if class_of(task, label) in here}
            for task, labels in memory.seen.items()
        }
    if not gone and memory.seen == before:
        return None

    def write(new: Path) -> dict[str, Any]:
        memory.save(new)
        return {"memory": memory.by_task()}

    return write


def _router(folder: Path, classes: set[str] | None) -> _Write | None:
    """What is left where no row has some of its classes any more; prompts about anything are no rows."""
    if classes is None or not (folder / registry.ROUTER).exists():
        return None
    import torch
    from safetensors.torch import load_file, save

    from treering.experts import class_of
    from treering.router import ANYTHING, SUMS, task_of

    about = json.loads((folder / registry.ROUTER).read_text(encoding="utf-8"))
    owners, answers = about["expert"], about.get("answers", {})
    is_kept = {name: name == ANYTHING or name in classes for name in [*owners, *answers]}
    if all(is_kept.values()):
        return None
    tensors = load_file(folder / SUMS)
    kept = torch.tensor([is_kept[name] for name in owners], dtype=torch.bool)
    gone, counts = tensors["sums"][~kept], tensors["counts"][~kept]
    about["expert"] = {name: owner for name, owner in owners.items() if is_kept[name]}
    products, sums, left = tensors["products"], tensors["sums"][kept], tensors["counts"][kept]
    if about["expert"].keys() - {ANYTHING}:
        # What is left in it of these rows is how far they lay from their means.
        products = products - gone.T @ (gone / counts[:, None])
    else:  # Somebody has to answer: all that there was as one class, without a name.
        about["expert"][class_of("", "")] = next(owner for name, owner in owners.items() if not is_kept[name])
        sums, left = torch.cat([sums, gone.sum(0, keepdim=True)]), torch.cat([left, counts.sum(0, keepdim=True)])
    tensors = {"products": products, "sums": sums, "counts": left}
    tasks = {task_of(name) for name in about["expert"]}
    for key in {"spread", "mistaken"} & about.keys():
        left_of = [task for task in about[key] if task in tasks]
        about[key] = {task: about[key][task] for task in left_of} if key == "spread" else left_of
    if answers:
        about["answers"] = {name: text for name, text in answers.items() if is_kept[name]}

    def write(new: Path) -> dict[str, Any]:
        write_json(new / registry.ROUTER, about)
        write_file(new / SUMS, save({name: tensor.contiguous() for name, tensor in tensors.items()}))
        return {}

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
