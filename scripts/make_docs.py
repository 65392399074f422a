"""Write docs/configuration.md from the settings themselves. `--check`: say whether it is up to date; write nothing."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from treering.config import LAUNCHERS, TRACKERS, Config
from treering.methods import FINETUNING_TYPES, PROTECT
from treering.optimizers import OPTIMIZERS
from treering.sections import Section, is_section

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
HEAD = """# Settings

A workspace's settings are in its `treering.yaml`, one `key: value` a line; what is not there has its default. Those of
a group are indented under the group's name. On the command line a group's name stands before a dot, and what is set
there holds for that update alone:

```yaml
lora_rank: 16
gate:
  margin: 0.02
```

```
treering update lora_rank=16 gate.margin=0.02
```

Wrong settings are reported all at once, and nothing is changed. Keys that LLaMA-Factory also has carry its names.
`configs/` holds a complete file for each of several uses: `cp configs/laptop.yaml WORKSPACE/treering.yaml`.

This page is written by `scripts/make_docs.py` from `treering/config.py` and `treering/sections.py`.
"""
NAMES = {
    "finetuning_type": FINETUNING_TYPES,
    "protect": PROTECT,
    "optim": OPTIMIZERS,
    "report_to": TRACKERS,
    "launcher": LAUNCHERS,
}
TYPES = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "nothing"}
BOUNDS = {"ge": "at least {}", "gt": "above {}", "le": "at most {}", "lt": "below {}"}


def page() -> str:
    """The whole page."""
    return HEAD + "".join(_section(name, section) for name, section in _sections())


def _sections() -> Iterator[tuple[str, type[Section]]]:
    yield "", Config
    for name, field in Config.model_fields.items():
        if is_section(field.annotation):
            yield name, field.annotation


def _section(name: str, section: type[Section]) -> str:
    lines = [f"\n## {f'`{name}`' if name else 'The model, the method and the training'}\n"]
    if name:
        lines.append(f"{section.__doc__}\n")
    lines += ["| setting | type | default | meaning |", "| --- | --- | --- | --- |"]
    for key, field in section.model_fields.items():
        if not is_section(field.annotation):
            meaning = " ".join((field.description or "").split())
            full = f"{name}.{key}" if name else key
            default = _value(field.get_default(call_default_factory=True))
            lines.append(f"| `{full}` | {_type(key, field)} | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def _type(key: str, field: FieldInfo) -> str:
    """The kinds of value in words, with their bounds."""
    if key in NAMES:
        known = ", ".join(f"`{name}`" for name in NAMES[key])
        return f"a list of {known}" if get_origin(field.annotation) is tuple else f"one of {known}"
    bounds = _bounds(field.metadata)
    kinds = [*dict.fromkeys(_kinds(field.annotation))]
    return f"{' or '.join(kinds)}{f', {bounds}' if bounds else ''}"


def _kinds(annotation: Any) -> Iterator[str]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        bounds = _bounds([part for info in arguments[1:] for part in getattr(info, "metadata", ())])
        yield " or ".join(_kinds(arguments[0])) + (f" {bounds}" if bounds else "")
    elif origin in (Union, types.UnionType):
        for argument in arguments:
            yield from _kinds(argument)
    elif origin is Literal:
        yield from (f"`{value}`" for value in arguments)
    elif origin is tuple:
        yield "a list of texts"
    elif origin is dict:
        yield f"{' or '.join(_kinds(arguments[1]))} by name"
    elif is_section(annotation):
        yield f"settings ({', '.join(f'`{key}`' for key in annotation.model_fields)})"
    else:
        yield TYPES[annotation]


def _bounds(metadata: list[Any]) -> str:
    found = [(word, getattr(part, name)) for part in metadata for name, word in BOUNDS.items() if hasattr(part, name)]
    return ", ".join(word.format(value) for word, value in found)


def _value(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`[{', '.join(value)}]`" if isinstance(value, tuple) else f"`{value}`"


def main(arguments: list[str]) -> int:
    """Write the page, or check it; returns the exit code."""
    if "--check" not in arguments:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page():
        print(f"{PAGE} is not up to date; run scripts/make_docs.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
