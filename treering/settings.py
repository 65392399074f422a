"""Settings as people write them: YAML files, and `key=value`.

YAML 1.2, in which only `true` and `false` are truth values: in PyYAML's own 1.1 `off` is false, `no` (Norwegian) as
well, and 1e-3 a text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from treering.errors import ConfigError

_NUMBER = r"(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"


class _Loader(yaml.SafeLoader):
    """The core schema of YAML 1.2."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - As the class above has it.


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]{1,400}|0x[0-9a-fA-F]{1,400}", "-+0123456789"),
    ("float", rf"[-+]?(?:{_NUMBER}|\.inf|\.Inf|\.INF)|\.nan|\.NaN|\.NAN", "-+.0123456789"),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})\\Z"), list(_first))


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    return int(text, 16 if "x" in text else 10)


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file whose top level is a mapping. Raises `ConfigError`."""
    try:
        values = _loaded(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}; write one `key: value` a line")
    return values


def parse(text: str) -> Any:
    """The value of a `key=value`."""
    try:
        value = _loaded(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, dict | list) and not text.lstrip().startswith(("{", "[")):
        return text  # A sentence with a colon.
    return value


def _loaded(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)
