"""Functions of the user's own, which settings name as `FILE.py:FUNCTION`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from treering.errors import ConfigError


def is_own(name: str) -> bool:
    """Whether it names a function in a file."""
    file, colon, function = name.partition(":")
    return bool(colon) and file.endswith(".py") and function.isidentifier()


def source(name: str, root: Path, key: str) -> Path:
    """The file of the function `name`, which the setting `key` has; a relative path begins at `root`.

    Raises `ConfigError` where there is none.
    """
    path = root / name.partition(":")[0]
    if not path.is_file():
        raise ConfigError(f"{key} names {name}, but {path} is no file: put it there, or drop it from {key}")
    return path


def function(name: str, root: Path, key: str) -> Callable[..., Any]:
    """The function itself. Raises `ConfigError` where it cannot be had."""
    path = source(name, root, key)
    spec = importlib.util.spec_from_file_location(f"treering_own_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        found: Callable[..., Any] = getattr(module, name.partition(":")[2])
    except Exception as error:
        raise ConfigError(f"{key} names {name}, but it cannot be loaded ({error!r}): correct {path}") from error
    return found
