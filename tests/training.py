"""What tests of the loop share: one update's worth of training on the tiny model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from treering.config import Config
from treering.data.example import Example
from treering.memory import Memory
from treering.methods import Methods
from treering.model import encode, load_base, load_tokenizer
from treering.schedule import Step, plan_steps
from treering.stop import Stop
from treering.testing import toy_rows
from treering.train import train


def settings(folder: Path, **values: Any) -> Config:
    return Config.build({"model_name_or_path": str(folder), "bf16": False, "protect": [], **values})


def chat(*turns: tuple[str, str]) -> Example:
    return Example.of([{"role": role, "content": content} for role, content in turns])


def examples(count: int = 24, system: str | None = None) -> list[Example]:
    head = [("system", system)] if system else []
    return [chat(*head, ("user", row["text"]), ("assistant", row["label"])) for row in toy_rows("pens", count)]


class Run:
    """One update's worth of training, up to but not including `train`."""

    def __init__(
        self,
        folder: Path,
        config: Config,
        rows: Sequence[Example] | None = None,
        state: dict[str, Tensor] | None = None,
    ) -> None:
        self.config = config
        self.tokenizer = load_tokenizer(folder)
        self.methods = Methods(config)
        torch.manual_seed(config.seed)
        self.model = self.methods.prepare(load_base(folder, config), state or {})
        self.rows = {row.id: encode(self.tokenizer, row) for row in (examples() if rows is None else rows)}
        lengths = {id: len(row.ids) for id, row in self.rows.items()}
        self.steps = plan_steps(list(self.rows), Memory(), self.methods, lengths, config)

    @property
    def pad_id(self) -> int:
        assert isinstance(self.tokenizer.pad_token_id, int)
        return self.tokenizer.pad_token_id

    def train(self, **options: Any) -> list[dict[str, float]]:
        steps: list[Step] = options.pop("steps", self.steps)
        return train(self.model, self.rows, steps, self.methods, self.config, pad_id=self.pad_id, quiet=True, **options)

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class StopAt(Stop):
    """Asks to stop once it is looked at for the `looks`-th time."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.left = looks

    def check(self) -> None:
        self.left -= 1
        self.asked = self.left <= 0
        super().check()


class KilledError(BaseException):
    """Ends training as SIGKILL would: nothing is saved on the way out."""


class KillAt(StopAt):
    """Ends training so at the `looks`-th look."""

    def check(self) -> None:
        self.left -= 1
        if self.left <= 0:
            raise KilledError


class Counted(Stop):
    """Counts the looks."""

    def __init__(self) -> None:
        super().__init__()
        self.looks = 0

    def check(self) -> None:
        self.looks += 1
