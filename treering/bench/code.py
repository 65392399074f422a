"""Which code a run depends on: modules found by their imports, as one digest. Comments and docstrings do not count."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from treering.config import Config
from treering.methods import FINETUNING_TYPES, PROTECT
from treering.optimizers import OPTIMIZERS

ROOT = Path(__file__).parents[1]

START = ("treering.candidate", "treering.evaluate")
"""What trains and what scores."""

SETTINGS = {"treering.config", "treering.sections"}
"""Their effect is in the settings, which a run is keyed by as well."""

RUN_TIME = {"treering.errors", "treering.progress", "treering.trackers", "treering.stop", "treering.room"}
"""What is printed and watched while training goes on, and changes nothing in it."""


def code_digest(config: Config) -> str:
    """Of all modules that a training with these settings runs: a method that it does not use is none of them."""
    lazy = [FINETUNING_TYPES[config.finetuning_type], *(PROTECT[name] for name in config.protect)]
    lazy.append(OPTIMIZERS[config.optim])
    return _digest(tuple(sorted({*START, *(path.partition(":")[0] for path in lazy)})))


def modules(start: Iterable[str]) -> set[str]:
    """`start` and the modules of this package that they import, at once or while they run, and so on."""
    found: set[str] = set()
    todo = [name for name in start if _file(name) is not None]
    while todo:
        name = todo.pop()
        if name not in found and name not in SETTINGS | RUN_TIME:
            found.add(name)
            todo += [other for other in _imports(_tree(name)) if _file(other) is not None]
    return found


@cache
def _digest(start: tuple[str, ...]) -> str:
    texts = [f"{name}\n{ast.dump(_bare(_tree(name)))}" for name in sorted(modules(start))]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _tree(name: str) -> ast.Module:
    file = _file(name)
    assert file is not None
    return ast.parse(file.read_text(encoding="utf-8"))


def _file(name: str) -> Path | None:
    """The file of a module of this package, or None."""
    if name.partition(".")[0] != "treering":
        return None
    path = ROOT.joinpath(*name.split(".")[1:])
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _imports(tree: ast.AST) -> Iterator[str]:
    """Names of modules; what is imported for type checkers alone is left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            # `from treering import rates` names a module, `from treering.rates import Choice` what is in one.
            parts = [f"{node.module}.{alias.name}" for alias in node.names]
            inner = [part for part in parts if _file(part) is not None]
            yield from inner
            if len(inner) < len(parts) and node.module != "treering":
                yield node.module
        else:
            yield from _imports(node)


def _bare(tree: ast.Module) -> ast.Module:
    """Without docstrings, those under attributes included."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [one for one in body if not (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant))]
            node.body = kept or [ast.Pass()]  # type: ignore[attr-defined]
    return tree
