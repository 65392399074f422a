"""What an update is made of, fixed before it starts, so that it can be repeated, resumed or refused a second time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treering import general, launch, registry
from treering.config import Config
from treering.files import write_json
from treering.registry import PLAN, TRIED, Version

if TYPE_CHECKING:
    from treering.workspace import Workspace


@dataclass(frozen=True)
class Plan:
    """`rows` and `fresh` are the new training and held-out ids by task; `machine` is what the bits depend on.

    `general` is the hash of the general text that is replayed, if there is any.
    """

    parent: str | None
    base: str
    config: dict[str, Any]
    rows: dict[str, list[str]]
    fresh: dict[str, list[str]]
    machine: dict[str, Any]
    general: str | None = None

    @property
    def digest(self) -> str:
        """The same for the same rows, parent, base model and settings."""
        content = [
            self.parent,
            self.base,
            self.config,
            self.rows,
            self.fresh,
            *([self.general] if self.general else []),
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def row_ids(self) -> list[str]:
        """The new training ids, task after task."""
        return [id for ids in self.rows.values() for id in ids]

    @property
    def fresh_ids(self) -> set[str]:
        """The held-out ids that came with the new rows. Those of other tasks only measure old knowledge better."""
        return {id for task in self.rows for id in self.fresh.get(task, ())}

    def as_dict(self) -> dict[str, Any]:
        """What people are shown of it: counts instead of ids."""
        return {
            "parent": self.parent,
            "rows": {task: len(ids) for task, ids in self.rows.items()},
            "held_out": {task: len(ids) for task, ids in self.fresh.items()},
            "machine": self.machine,
            "config": self.config,
        }


def make_plan(
    ws: Workspace,
    parent: Version | None,
    config: Config,
    base: str,
    file: str | None = None,
    without: Set[str] = frozenset(),
) -> Plan:
    """All rows that neither `parent` nor its ancestors learned, and the held-out rows none of them was measured on.

    With `file` only the rows that came from it; of the held-out rows, its own and those of the user's held-out files.
    Rows whose ids are in `without` are left out.
    """
    import torch

    from treering.model import precision_name

    rows = ws.catalog.waiting(registry.known(ws, parent) | without, file)
    measured = parent.manifest["held_out"] if parent else {}
    seen = registry.measured(parent) | without
    fresh = {}
    for task, ids in ws.catalog.held_out(file).items():
        slice_ = [id for id in ids if id not in seen]
        if slice_ and (task in rows or task in measured):
            fresh[task] = slice_
    machine = {
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "precision": precision_name(config),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        **launch.machine(config, ws.root),
    }
    text = general.fingerprint(config, ws.root)
    return Plan(parent.name if parent else None, base, config.of_versions(), rows, fresh, machine, text)


def taken_up(ws: Workspace, plan: Plan) -> Plan:
    """The plan to follow: that of an interrupted update that can go on, or else `plan`.

    One with the same parent, base and settings whose rows all still wait can, with its own rows; what came since waits
    for the next update.
    """
    waiting = set(plan.row_ids)
    for folder in sorted(set(ws.versions.glob(".staging-*")) - set(ws.versions.glob(f"{TRIED}*"))):
        found = _read(folder / PLAN)
        if (
            found is not None
            and (found.parent, found.base, found.config) == (plan.parent, plan.base, plan.config)
            and (found.machine, found.general) == (plan.machine, plan.general)
            and waiting.issuperset(found.row_ids)
        ):
            return found
    return plan


def stage(ws: Workspace, plan: Plan) -> Path:
    """The folder to work in: what an interrupted update with this plan left, or a new one."""
    folder = registry.staging_folder(ws, plan.digest)
    if _read(folder / PLAN) != plan:
        registry.discard(folder)
        folder.mkdir()
        write_json(folder / PLAN, asdict(plan))
    return folder


def give_up(staging: Path) -> None:
    """Remove an update that could not begin; one with checkpoints goes on once what is wrong is mended."""
    if not any(staging.glob("checkpoints/*")):
        registry.discard(staging)


def clear(ws: Workspace, keep: Path | None = None) -> None:
    """Remove what interrupted updates left, all but the folder `keep`."""
    for folder in ws.versions.glob(".staging-*"):
        if folder != keep:
            registry.discard(folder)


def _read(path: Path) -> Plan | None:
    try:
        return Plan(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
