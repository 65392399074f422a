"""Files that describe data and hold none: what `datasets` writes beside its tables, and LLaMA-Factory's list."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STATE = "state.json"
SPLITS = "dataset_dict.json"
INFO = "dataset_info.json"

_LONGEST = 1 << 24
_ENTRY_KEYS = {"file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name"}


def is_description(file: Path) -> bool:
    """Whether it is a file of that kind."""
    if file.name not in (STATE, SPLITS, INFO):
        return False
    found = _object(file)
    if file.name == STATE:
        return "_data_files" in found
    if file.name == SPLITS:
        return isinstance(found.get("splits"), list)
    return is_list(found) or bool(found.keys() & {"features", "builder_name", "citation", "splits"})


def is_spare(file: Path) -> bool:
    """Whether it is a table in a folder of `datasets` that does not name it: what it computed once, and kept.

    Where a table that is named is not there, nothing is known of the others.
    """
    if file.suffix != ".arrow":
        return False
    listed = _object(file.parent / STATE).get("_data_files")
    if not isinstance(listed, list):
        return False
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in listed]
    there = all(isinstance(name, str) and os.path.isfile(file.parent / name) for name in names)
    return there and file.name not in names


def split_folder(file: Path) -> Path | None:
    """The folder of a split of a `DatasetDict`, if the file lies in one."""
    return file.parent if (file.parent.parent / SPLITS).is_file() and (file.parent / STATE).is_file() else None


def listed(file: Path) -> dict[str, dict[str, Any]]:
    """The data sets that LLaMA-Factory's `dataset_info.json` lists; empty where it is none."""
    found = _object(file) if file.name == INFO else {}
    return found if is_list(found) else {}


def is_list(found: Mapping[str, Any]) -> bool:
    """Whether what a `dataset_info.json` holds is LLaMA-Factory's list."""
    return bool(found) and all(isinstance(entry, dict) and entry.keys() & _ENTRY_KEYS for entry in found.values())


def _object(file: Path) -> dict[str, Any]:
    """What a JSON file holds, if that is an object; else nothing."""
    try:
        if not file.is_file() or file.stat().st_size > _LONGEST:
            return {}  # Who opens a pipe waits for ever.
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
