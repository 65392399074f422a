"""What a training is made of, as files: the update writes them, the processes that train read them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treering.config import Config
from treering.files import write_file, write_json
from treering.memory import Teacher, stack
from treering.model import Tokens
from treering.registry import Version

if TYPE_CHECKING:
    from treering.schedule import Step

APART = {"automate", "report_to", "serve"}
"""Settings that are not written: no training needs them, and they may hold keys."""


@dataclass(frozen=True)
class Handover:
    """What `train.train` is given, and where the model comes from; `checkpoints` is where it is kept as it learns.

    `threads` is how many each process has; `teachers` and `parents` are as in `train.train`.
    """

    config: Config
    base: Path
    parent: Version | None
    rows: Mapping[str, Tokens]
    steps: Sequence[Step]
    pad_id: int
    threads: int
    checkpoints: Path
    teachers: Mapping[str, Teacher] | None = None
    parents: Mapping[str, Teacher] | None = None

    def save(self, folder: Path) -> None:
        """Write it into `folder`. Steps name rows by their place there: ids are long, and come often."""
        places = {id: place for place, id in enumerate(self.rows)}
        rows = "".join(json.dumps(_told(row)) + "\n" for row in self.rows.values())
        write_file(folder / "rows.jsonl", rows.encode())
        for name, teachers in (("teachers", self.teachers), ("parents", self.parents)):
            if teachers:
                _save_teachers(folder / f"{name}.safetensors", teachers)
        about = {
            "config": self.config.model_dump(mode="json", exclude=APART),
            "base": str(self.base),
            "parent": [self.parent.name, str(self.parent.folder)] if self.parent else None,
            "steps": [[[places[id] for id in batch] for batch in step] for step in self.steps],
            "pad_id": self.pad_id,
            "threads": self.threads,
            "checkpoints": str(self.checkpoints),
            "teachers": [*(self.teachers or ())],
            "parents": [*(self.parents or ())],
        }
        write_json(folder / "handover.json", about)

    @classmethod
    def load(cls, folder: Path) -> Handover:
        """Read what `save` wrote."""
        about: dict[str, Any] = json.loads((folder / "handover.json").read_text(encoding="utf-8"))
        lines = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [_row(json.loads(line)) for line in lines]
        return cls(
            config=Config.build(about["config"]),
            base=Path(about["base"]),
            parent=Version(about["parent"][0], Path(about["parent"][1])) if about["parent"] else None,
            rows={row.id: row for row in rows},
            steps=[[[rows[place].id for place in batch] for batch in step] for step in about["steps"]],
            pad_id=about["pad_id"],
            threads=about["threads"],
            checkpoints=Path(about["checkpoints"]),
            teachers=_load_teachers(folder / "teachers.safetensors", about["teachers"]),
            parents=_load_teachers(folder / "parents.safetensors", about["parents"]),
        )


def _told(row: Tokens) -> list[Any]:
    return [row.id, row.ids, row.answers, row.prompts, row.rejected and _told(row.rejected), row.margin]


def _row(told: Sequence[Any]) -> Tokens:
    id, ids, answers, prompts, rejected, margin = told
    return Tokens(id, ids, answers, prompts, rejected and _row(rejected), margin)


def _save_teachers(path: Path, teachers: Mapping[str, Teacher]) -> None:
    import torch
    from safetensors.torch import save

    ids, logits = stack(list(teachers.values()))
    tokens = torch.tensor([len(teacher.ids) for teacher in teachers.values()])
    write_file(path, save({"tokens": tokens, "ids": ids, "logits": logits}))


def _load_teachers(path: Path, names: Sequence[str]) -> dict[str, Teacher] | None:
    from safetensors.torch import load_file

    if not names:
        return None
    tensors = load_file(path)
    parts = [tensors[key].split(tensors["tokens"].tolist()) for key in ("ids", "logits")]
    return {name: Teacher(ids, logits) for name, ids, logits in zip(names, *parts, strict=True)}
