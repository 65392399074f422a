"""Libraries that only some settings need: imported when they do."""

from __future__ import annotations

import importlib
from types import ModuleType

from treering.errors import ConfigError


def needed(module: str, extra: str, setting: str) -> ModuleType:
    """`module`, which `setting` needs and `pip install 'treering[extra]'` brings. Raises `ConfigError` without it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{setting}, but {module} is not installed ({error}); run `pip install 'treering[{extra}]'`, "
            "or take the setting out"
        ) from None
