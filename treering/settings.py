"""Settings as people write them: YAML files, and `key=value`.

YAML 1.2, in which only `true` and `false` are truth values: in PyYAML's own 1.1 `off` is false, `no` (Norwegian) as
well, and 1e-3 a text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from treering.errors import ConfigError

_NUMBER = r"(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"


_BROKEN = (yaml.YAMLError, ValueError, KeyError, RecursionError)
"""What PyYAML raises for what is none, or nested without end."""


class _Loader(yaml.SafeLoader):
    """The core schema of YAML 1.2."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - As the class above has it.
    yaml_constructors = {  # noqa: RUF012
        tag: how
        for tag, how in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
    }

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """Two escapes that are a character between them are one, as in JSON, whose texts are YAML too.

        Raises `yaml.YAMLError` for half a character.
        """
        text = super().construct_scalar(node)
        try:
            return text.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            raise yaml.constructor.ConstructorError(
                None, None, f"{text!a} has half of a character (a surrogate without its other half)", node.start_mark
            ) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Raises `yaml.YAMLError` for a key that stands twice, of which PyYAML takes the last."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key, count in Counter(keys).items() if count > 1 and key != "<<"]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]{1,400}|0o[0-7]{1,400}|0x[0-9a-fA-F]{1,400}", "-+0123456789"),
    ("float", rf"[-+]?(?:{_NUMBER}|\.inf|\.Inf|\.INF)|\.nan|\.NaN|\.NAN", "-+.0123456789"),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})\\Z"), list(_first))


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would not take for a text."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [
            *yaml.SafeDumper.yaml_implicit_resolvers.get(first, []),
            *_Loader.yaml_implicit_resolvers.get(first, []),
        ]
        for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
    }


def as_yaml(values: Mapping[str, Any]) -> str:
    """Settings as a YAML file has them."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True) if values else ""


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file whose top level is a mapping. Raises `ConfigError`."""
    try:
        values = _loaded(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except (OSError, *_BROKEN) as error:
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
    except _BROKEN:
        return text
    if isinstance(value, dict | list) and not text.lstrip().startswith(("{", "[")):
        return text  # A sentence with a colon.
    if isinstance(value, str) and not text.lstrip().startswith(("'", '"')):
        return text  # A sentence with a number sign.
    return text if value is None and text.strip().lower() not in ("", "~", "null") else value


def _loaded(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)
