"""Which methods a benchmark runs: what each name stands for, and what `--methods` says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from treering.config import Config
from treering.errors import UsageError
from treering.settings import read_yaml

UNTOUCHED, JOINT, ORACLE = "untouched", "joint", "oracle"

TUNED = "tuned"
"""As a `learning_rate`: the best of a small grid on training rows of the first updates (`tuning.py`)."""

METHODS: dict[str, tuple[str, ...]] = {
    UNTOUCHED: (),
    "naive": ("protect=[]",),
    "naive-tuned": ("protect=[]", f"learning_rate={TUNED}"),
    "full": ("finetuning_type=full", "protect=[]"),
    "full-tuned": ("finetuning_type=full", "protect=[]", f"learning_rate={TUNED}"),
    "replay": ("protect=[replay]", "memory.policy=reservoir"),
    "treering": (),
    ORACLE: ("protect=[]",),
    JOINT: ("protect=[]",),
}
"""Settings of each method over the common ones; all of them together are the published table.

`untouched` is the base model, `naive` sequential LoRA, `full` sequential full fine-tuning, `replay` LoRA with uniform
random replay, `treering` the default, `oracle` an adapter a task where the task is known when it is asked, `joint` all
data in one update.
"""


@dataclass(frozen=True)
class Entry:
    """One line of the table: `kind` is the name in `METHODS` that it is made from, `overrides` its own settings."""

    name: str
    kind: str
    overrides: tuple[str, ...]

    @property
    def tuned(self) -> bool:
        """Whether its learning rate is to be found first."""
        rates = [text for text in self.overrides if text.startswith("learning_rate=")]
        return bool(rates) and rates[-1] == f"learning_rate={TUNED}"

    def at(self, rate: float) -> Entry:
        """The same at a rate that was found."""
        return replace(self, overrides=(*self.overrides, f"learning_rate={rate!r}"))

    def settings(self, common: Mapping[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
        """The workspace settings: the method's own go before `overrides`, and these before `common`.

        A rate that nobody names is the default of the `finetuning_type`, so that nothing but a `tuned` rate is chosen
        by what came out. Raises `ConfigError`.
        """
        given = [*overrides, *self.overrides]
        if self.tuned:
            given = [text for text in given if not text.startswith("learning_rate=")]
        config = Config.build(dict(common), given, source=f"method {self.name}")
        found = config.model_dump(mode="json", exclude_unset=True)
        return {"learning_rate": _default_rate(config), **found}


def _default_rate(config: Config) -> float:
    from transformers import AutoConfig

    from treering.model import resolve
    from treering.schedule import default_rate

    base = resolve(config.model_name_or_path, config.trust_remote_code)
    about = AutoConfig.from_pretrained(base, trust_remote_code=config.trust_remote_code)
    return default_rate(config.finetuning_type, about)


def parse(text: str) -> list[Entry]:
    """What `--methods` names: `NAME`, `NAME:key=value,key=value`, or a YAML file of them, separated by commas.

    Such a file maps names to settings over those of `method` (`treering` by default). Raises `UsageError`.
    """
    found: list[Entry] = []
    for item in _items(text):
        name, colon, first = item.partition(":")
        if "=" in name:
            if not found:
                raise UsageError(f"--methods begins with the setting {item}; name the method before it, as NAME:{item}")
            last = found[-1]
            found[-1] = replace(last, name=f"{last.name},{item}", overrides=(*last.overrides, item))
        elif item.endswith((".yaml", ".yml")):
            found += _of_file(Path(item))
        else:
            found.append(_entry(item, name, (first,) if colon else ()))
    names = [entry.name for entry in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not found:
        raise UsageError(f"--methods names {', '.join(twice)} twice" if twice else "--methods names no method")
    return found


def _entry(name: str, kind: str, overrides: tuple[str, ...]) -> Entry:
    if kind not in METHODS:
        raise UsageError(f"unknown methods: {kind}; known: {', '.join(METHODS)}, or a .yaml file of your own")
    return Entry(name, kind, (*METHODS[kind], *overrides))


def _items(text: str) -> list[str]:
    """What stands between the commas that are in no brackets."""
    return [item.strip() for item in re.split(r",(?![^\[{]*[\]}])", text) if item.strip()]


def _of_file(path: Path) -> Iterator[Entry]:
    for name, settings in read_yaml(path).items():
        if not isinstance(settings, Mapping):
            raise UsageError(f"{path}: {name} has no settings; write `key: value` lines under it")
        own = tuple(_texts({key: value for key, value in settings.items() if key != "method"}))
        yield _entry(str(name), str(settings.get("method", "treering")), own)


def _texts(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _texts(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={value if isinstance(value, str) else json.dumps(value)}"
