"""treering keeps teaching a language model without letting it forget.

The public names load on first use, so that `import treering` stays cheap.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

# Two spinning OpenMP threads on a shared machine can fall to a twenty-fifth of their speed;
# OpenMP reads this once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# In KiB. Libraries with mimalloc else reserve a gigabyte each, which counts where a process may have so much only.
os.environ.setdefault("MIMALLOC_ARENA_RESERVE", "65536")

__version__ = "0.1.0"

_PUBLIC = {
    "Config": "treering.config:Config",
    "Example": "treering.data.example:Example",
    "Memory": "treering.memory:Memory",
    "Message": "treering.data.example:Message",
    "Method": "treering.methods:Method",
    "TreeringError": "treering.errors:TreeringError",
    "Version": "treering.registry:Version",
    "Workspace": "treering.workspace:Workspace",
    "metrics": "treering.metrics:",
}

__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604

if TYPE_CHECKING:
    from treering import metrics as metrics
    from treering.config import Config as Config
    from treering.data.example import Example as Example
    from treering.data.example import Message as Message
    from treering.errors import TreeringError as TreeringError
    from treering.memory import Memory as Memory
    from treering.methods import Method as Method
    from treering.registry import Version as Version
    from treering.workspace import Workspace as Workspace


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'treering' has no attribute {name!r}; public names: {', '.join(__all__)}")
    module, _, attribute = _PUBLIC[name].partition(":")
    loaded = importlib.import_module(module)
    return getattr(loaded, attribute) if attribute else loaded
