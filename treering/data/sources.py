"""What `ingest` was given -> files, each with its name, its task, its side and how its rows are laid out."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from treering.data import llama_factory
from treering.data.descriptions import INFO, listed, split_folder
from treering.data.layout import Layout
from treering.data.read import find_files, split_of
from treering.data.records import stem
from treering.data.writer import Split
from treering.errors import UsageError
from treering.files import followed, one_line, printable


@dataclass(frozen=True)
class How:
    """What a user told of the files: a layout, and which data set of a LLaMA-Factory list."""

    layout: Layout = field(default_factory=Layout)
    dataset: str | None = None


@dataclass(frozen=True)
class Place:
    """Files at `path` that came from elsewhere, which `name` says: `path` itself is named so, and what lies below."""

    path: Path
    name: str


@dataclass(frozen=True)
class DataFile:
    """A file to read. `name`: what it is called in the catalog. `task` and `side`: those that its place tells.

    `task` raises `UsageError` where the place tells none.
    """

    path: Path
    name: str
    task: Callable[[], str]
    side: Split
    layout: Layout


def data_files(source: Path | Place, how: How, note: Callable[[str, str], None]) -> list[DataFile]:
    """All files of a file or a folder. `note(file, text)` is told what a user should know. Raises `UsageError`."""
    place = source if isinstance(source, Place) else Place(followed(source), str(followed(source)))
    found = [file for info in _lists(place, how) for file in _described(info, place, how, note)]
    if how.dataset is None and not listed(place.path):
        taken = {followed(file.path) for file in found}
        files = find_files(place.path, lambda file, why: note(str(file), why))
        found += [_by_place(file, place, how.layout) for file in files if followed(file) not in taken]
    return sorted(found, key=lambda file: file.path)


def _lists(place: Place, how: How) -> list[Path]:
    """LLaMA-Factory's lists: the file itself, or those in the folder and below."""
    files = sorted(place.path.rglob(INFO)) if os.path.isdir(place.path) else [place.path]
    found = [file for file in files if listed(file) and not _is_hidden(file, place.path)]
    if how.dataset is not None:
        # Of the folder itself; a name may be in several of those below.
        found = [file for file in found if file in (place.path, place.path / INFO)]
        if not found:
            named = f"--dataset {how.dataset}: {place.name}"
            raise UsageError(f"{named} is no {INFO} of LLaMA-Factory, nor a folder that holds one; name one")
    return found


def _is_hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts[:-1])


def _described(info: Path, place: Place, how: How, note: Callable[[str, str], None]) -> list[DataFile]:
    """The files that such a list names. In a folder that is one task, they are of that task."""
    found: dict[str, DataFile] = {}
    for title, path, layout in llama_factory.entries(info, how.dataset, note, all_elsewhere=info != place.path):
        told = how.layout if how.layout.columns or how.layout.shape else layout
        told = replace(told, container=how.layout.container)
        for file in find_files(path):
            root = Place(info.parent, str(Path(place.name).parent)) if info == place.path else place
            one = _by_place(file, root, told)
            if info.parent == root.path:
                one = replace(one, task=partial(str, title))
            # A file that two entries name is read twice.
            one = one if one.name not in found else replace(one, name=f"{one.name} ({one_line(title)})")
            found[one.name] = one
    return list(found.values())


def _by_place(file: Path, place: Place, layout: Layout) -> DataFile:
    split = split_folder(file)
    side: Split = "train" if split_of(split or file) == "train" else "held_out"
    inside = file.relative_to(place.path).as_posix() if file != place.path else ""
    name = f"{place.name.rstrip('/')}/{inside}" if inside else place.name
    return DataFile(file, printable(name), partial(_task_of, file, place.path, split), side, layout)


def _task_of(file: Path, root: Path, split: Path | None) -> str:
    """The first folder below `root`, or else `root`'s own name, or a lone file's name without its suffix."""
    if file == root:
        return root.parent.name if split_of(file) != "train" or stem(file).lower() == "train" else stem(file)
    inside = file.relative_to(root).parts
    if split == root:
        return root.parent.name
    if len(inside) > 1 and not (split and split.parent == root):
        return inside[0]
    if root.name == "inbox":
        raise UsageError(f"{file} lies in the inbox itself; put it into a folder named for its task: inbox/<task>/")
    return root.name
