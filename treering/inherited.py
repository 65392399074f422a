"""What an update takes from its parent: whether it fits, the rows of its lineage, its memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from treering import registry
from treering.config import names
from treering.errors import ConfigError
from treering.memory import Memory
from treering.registry import Version

if TYPE_CHECKING:
    from treering.config import Config
    from treering.workspace import Workspace


def check(parent: Version | None, config: Config) -> None:
    """Raise `ConfigError` where an adapter would have to grow on a whole model or on other layers, or the reverse."""
    if parent is None:
        return
    adapter = parent.kind == "lora"
    if parent.kind != (config.finetuning_type if config.finetuning_type in ("lora", "adapter") else "full"):
        kind = parent.manifest["config"]["finetuning_type"] if parent.kind == "full" else parent.kind
        what = {"lora": "an adapter", "adapter": "a bottleneck adapter", "full": "a whole model"}[parent.kind]
        raise ConfigError(
            f"finetuning_type is {config.finetuning_type}, but {parent.name} is {what}: "
            f"set finetuning_type: {kind}, or start a new workspace"
        )
    if bool(parent.experts) != (config.adapter_composition == "experts"):
        has, way_out = ("experts", "experts") if parent.experts else ("one adapter", "continue")
        raise ConfigError(
            f"adapter_composition is {config.adapter_composition}, but {parent.name} has {has}: "
            f"set adapter_composition: {way_out}, or start a new workspace"
        )
    for key in ("lora_target", "additional_target") if adapter else ():
        wanted, found = getattr(config, key), parent.manifest["config"].get(key)
        if set(names(wanted or "")) != set(names(found or "")):
            way_out = f"set {key}: {found}" if found else "leave it out"
            raise ConfigError(
                f"{key} is {wanted}, but {parent.name} was made with {found}: {way_out}, or start a new workspace"
            )


def earlier(ws: Workspace, parent: Version | None) -> dict[str, list[str]]:
    """The rows by task that `parent` and its ancestors learned, where it does not recall them."""
    if parent is None or parent.recalls:
        return {}
    found: dict[str, list[str]] = {}
    for ancestor in reversed(list(registry.lineage(ws, parent))):
        for task, ids in ancestor.manifest["rows"].items():
            found.setdefault(task, []).extend(ids)
    return found


def knows_all(ws: Workspace, parent: Version | None) -> bool:
    """Whether the rows that `parent` and its ancestors learned are all that they learned: none was adopted."""
    return parent is None or not any(ancestor.adopted for ancestor in registry.lineage(ws, parent))


def memory(parent: Version | None, config: Config) -> Memory:
    """The parent's memory under today's settings, or an empty one."""
    found = Memory(config.memory.size, config.memory.policy, config.seed)
    if parent is not None and (parent.folder / "memory.json").exists():
        found = Memory.load(parent.folder)
        found.size, found.policy = config.memory.size, config.memory.policy
    return found
