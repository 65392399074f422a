"""LLaMA-Factory's `dataset_info.json`: which files, and how their rows are laid out, in its words."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from treering.data.descriptions import INFO, listed
from treering.data.layout import Layout, Tags
from treering.data.shapes import PLAIN
from treering.errors import UsageError
from treering.files import followed

_SHAPES = {"alpaca": "alpaca", "sharegpt": "sharegpt", "openai": "sharegpt"}
_COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "history": "history",
    "messages": "conversations",
    "system": "system",
    "tools": "tools",
}
_RANKED = {"chosen": "chosen", "rejected": "rejected"}
_MEDIA = ("images", "videos", "audios")
_ROLES = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}


def entries(
    file: Path, name: str | None, note: Callable[[str, str], None], all_elsewhere: bool = False
) -> list[tuple[str, Path, Layout]]:
    """The data sets of the list: name, file or folder, layout; `name`: that one alone.

    Those that are not here (on a hub, made by a script, gone) are noted and left out. Raises `UsageError` where `name`
    is one of them or none, or, but for `all_elsewhere`, none is here.
    """
    found = listed(file)
    if name is not None and name not in found:
        raise UsageError(f"--dataset {name!r} is not in {file}; it lists {', '.join(list(found)[:50])}")
    there = []
    for title, entry in found.items() if name is None else [(name, found[name])]:
        path, why = _file(file.parent, entry)
        if path is None:
            if name is not None:
                raise UsageError(f"--dataset {name}: {why}")
            note(str(file), f"{title} was left out: {why}")
            continue
        if entry.get("num_samples"):
            note(str(file), f"{title}: num_samples is not known here, all rows were read")
        there.append((title, path, layout(entry, title)))
    if not there and not all_elsewhere:
        raise UsageError(f"{file} lists {len(found)} data sets, of which none is a file here")
    return there


def _file(folder: Path, entry: Mapping[str, Any]) -> tuple[Path | None, str]:
    """Where its rows are, or why they are not here."""
    named = entry.get("file_name")
    if named is None:
        place = next((f"{key} {value}" for key, value in entry.items() if "url" in key or "cloud" in key), "a hub")
        return None, f"its rows are elsewhere ({place}); download them and ingest the files, or name an hf:// URL"
    path = folder / str(named)
    if not followed(path).is_relative_to(followed(folder)):
        return None, f"file_name {named!r} leads out of {folder}; put the file there"
    if not os.path.isfile(path) and not os.path.isdir(path):
        return None, f"file_name {named!r} is not in {folder}; put it there"
    return path, ""


def layout(entry: Mapping[str, Any], title: str) -> Layout:
    """How an entry says that rows are laid out. Raises `UsageError`."""
    formatting = entry.get("formatting") or "alpaca"
    if not isinstance(formatting, str) or formatting not in _SHAPES:
        raise UsageError(f"{INFO}: {title} has formatting {formatting!r}; known are {', '.join(_SHAPES)}")
    told = _texts(entry.get("columns") or {}, f"{INFO}: columns of {title}")
    shape = _SHAPES[formatting]
    keys = _COLUMNS | (_RANKED if entry.get("ranking") else {})
    columns = {keys[key]: column for key, column in told.items() if key in keys}
    if told.keys() == {"prompt"} and shape == "alpaca":  # All other columns are none: rows to go on training on.
        shape, columns = PLAIN, {"text": told["prompt"]}
    tags = _texts(entry.get("tags") or {}, f"{INFO}: tags of {title}")
    if told and shape == "sharegpt":
        columns = {"conversations": "conversations", **columns}
    return Layout(
        shape=shape if columns or formatting == "alpaca" else None,
        columns=columns,
        tags=_tags(tags) if tags else None,
        wanted=told.get("kto_tag"),
        media=[told[key] for key in _MEDIA if key in told],
    )


def _tags(told: Mapping[str, str]) -> Tags:
    roles = {told[tag]: role for tag, role in _ROLES.items() if tag in told}
    return Tags(told.get("role_tag", "from"), told.get("content_tag", "value"), roles)


def _texts(found: object, what: str) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str | None) for value in found.values()):
        raise UsageError(f"{what} are {found!r}; they must be names by name")
    return {key: value for key, value in found.items() if value is not None}
