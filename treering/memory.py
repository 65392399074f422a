"""The memory: which old rows to keep, and which of them to replay.

A row's place is decided by a fixed pseudo-random priority made of the seed and its id; each cell (a task, or a label
of a task) keeps its rows of lowest priority. That is a uniform sample without replacement of all rows the cell ever
saw (a bottom-k sample, the weightless case of Efraimidis and Spirakis 2006), whatever the order or the batches they
came in, and it can shrink at any time without another random draw. Where its room grows with the rows seen ("auto",
"2%"), the rows that come later are kept a little more often: what was let go cannot be asked back.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from treering.data.example import Example
from treering.files import write_file, write_json

if TYPE_CHECKING:
    from torch import Tensor

AUTO_SHARE = 0.02
AUTO_ROWS_PER_LABEL = 2
LABELS_OF_AN_OPEN_TASK = 10
"""A task whose answers are no label set gets the room of a task with this many labels."""


@dataclass(frozen=True)
class Remembered:
    """One kept row: its id, its task, and its label ("" in a task without a label set)."""

    id: str
    task: str
    label: str


@dataclass(frozen=True)
class Teacher:
    """What the model answered once it had learned a row: `ids` int32, `logits` float16, both `[answer tokens, k]`."""

    ids: Tensor
    logits: Tensor


def some(ids: Iterable[str], count: int, seed: str) -> list[str]:
    """At most `count` of `ids`, drawn by the hash of `seed` and each: the same whatever their order."""
    return sorted(ids, key=lambda id: hashlib.blake2b(f"{seed}:{id}".encode(), digest_size=8).digest())[:count]


def stack(teachers: Sequence[Teacher]) -> tuple[Tensor, Tensor]:
    """Ids and logits of all, row after row, `[answer tokens, widest k]`; what a narrower one lacks is -inf."""
    import torch
    from torch.nn.functional import pad

    widest = max(t.ids.shape[1] for t in teachers)
    ids = torch.cat([pad(t.ids, (0, widest - t.ids.shape[1])) for t in teachers])
    logits = torch.cat([pad(t.logits, (0, widest - t.logits.shape[1]), value=float("-inf")) for t in teachers])
    return ids, logits


class Memory:
    """A bounded set of old rows, with stored teacher logits for each.

    Args:
        size: rows kept: a count, a share of all rows seen such as "2%", or "auto" (for each task the larger of 2% of
            its rows and two rows a label).
        policy: "balanced" (equal quotas per task and per label inside it) or "reservoir" (uniform over all rows seen).
        seed: decides which rows of a cell stay.
    """

    def __init__(self, size: int | str = "auto", policy: str = "balanced", seed: int = 0) -> None:
        self.size, self.policy, self.seed = size, policy, seed
        self.rows: dict[str, Remembered] = {}
        self.seen: dict[str, dict[str, int]] = {}
        self.teachers: dict[str, Teacher] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, examples: Iterable[Example], task: str, labelled: bool = True) -> None:
        """Show new rows of `task`; keep what fits. `labelled` says that the answers are a label set."""
        counts = self.seen.setdefault(task, {})
        for example in examples:
            if example.id in self.rows:
                continue
            row = Remembered(example.id, task, example.label if labelled else "")
            counts[row.label] = counts.get(row.label, 0) + 1
            self.rows[row.id] = row
        kept = self._balanced() if self.policy == "balanced" else self._first(self.rows.values(), self._budget())
        self.rows = {row.id: row for row in sorted(kept, key=self._priority)}
        self.teachers = {id: teacher for id, teacher in self.teachers.items() if id in self.rows}

    def part(self, wanted: Callable[[Remembered], bool]) -> Memory:
        """The rows that are `wanted`, with what is stored for them: to draw from, not to add to."""
        found = Memory(self.size, self.policy, self.seed)
        found.rows = {id: row for id, row in self.rows.items() if wanted(row)}
        found.teachers = self.teachers
        return found

    def draw(self, count: int, epoch: int = 0) -> list[str]:
        """`count` ids, each kept row as often as the others (give or take one), in an order that `epoch` decides."""
        drawn: list[str] = []
        ids = list(self.rows)
        shuffle = random.Random(f"{self.seed}:{epoch}").shuffle
        while ids and len(drawn) < count:
            shuffle(ids)
            drawn += ids[: count - len(drawn)]
        return drawn

    def by_task(self) -> dict[str, int]:
        """Kept rows per task."""
        counts: dict[str, int] = dict.fromkeys(self.seen, 0)
        for row in self.rows.values():
            counts[row.task] += 1
        return counts

    def save(self, folder: Path) -> None:
        """Write `memory.json` and `memory.safetensors` (the stored logits, row after row) into `folder`."""
        import torch
        from safetensors.torch import save

        rows = list(self.rows.values())
        write_json(
            folder / "memory.json",
            {
                "size": self.size,
                "policy": self.policy,
                "seed": self.seed,
                "seen": self.seen,
                "rows": [[row.id, row.task, row.label] for row in rows],
            },
        )
        empty = Teacher(torch.empty(0, 0, dtype=torch.int32), torch.empty(0, 0, dtype=torch.float16))
        teachers = [self.teachers.get(row.id, empty) for row in rows]
        ids, logits = stack(teachers or [empty])
        tokens = torch.tensor([len(t.ids) for t in teachers], dtype=torch.int32)
        tensors = {"tokens": tokens, "ids": ids, "logits": logits}
        write_file(folder / "memory.safetensors", save(tensors))

    @classmethod
    def load(cls, folder: Path) -> Memory:
        """Read what `save` wrote."""
        from safetensors.torch import load_file

        stored = json.loads((folder / "memory.json").read_text(encoding="utf-8"))
        memory = cls(stored["size"], stored["policy"], stored["seed"])
        memory.seen = stored["seen"]
        memory.rows = {id: Remembered(id, task, label) for id, task, label in stored["rows"]}
        tensors = load_file(folder / "memory.safetensors")
        start = 0
        for id, tokens in zip(memory.rows, tensors["tokens"].tolist(), strict=True):
            if tokens:
                memory.teachers[id] = Teacher(
                    tensors["ids"][start : start + tokens], tensors["logits"][start : start + tokens]
                )
            start += tokens
        return memory

    def _priority(self, row: Remembered) -> bytes:
        return hashlib.blake2b(f"{self.seed}:{row.id}".encode(), digest_size=8).digest()

    def _first(self, rows: Iterable[Remembered], count: int) -> list[Remembered]:
        return sorted(rows, key=self._priority)[:count]

    def _budget(self) -> int:
        """Rows kept in all."""
        if self.size == "auto":
            return sum(self._auto(labels) for labels in self.seen.values())
        if isinstance(self.size, str):
            return round(float(self.size[:-1]) / 100 * sum(sum(labels.values()) for labels in self.seen.values()))
        return self.size

    def _balanced(self) -> list[Remembered]:
        cells: dict[str, dict[str, list[Remembered]]] = defaultdict(lambda: defaultdict(list))
        for row in self.rows.values():
            cells[row.task][row.label].append(row)
        stock = {task: sum(map(len, labels.values())) for task, labels in cells.items()}
        if self.size == "auto":
            quotas = {task: min(self._auto(self.seen[task]), stock[task]) for task in cells}
        else:
            quotas = fair_shares(self._budget(), stock)
        kept = []
        for task, labels in cells.items():
            shares = fair_shares(quotas[task], {label: len(rows) for label, rows in labels.items()})
            for label, rows in labels.items():
                kept += self._first(rows, shares[label])
        return kept

    @staticmethod
    def _auto(labels: Mapping[str, int]) -> int:
        named = LABELS_OF_AN_OPEN_TASK if "" in labels else len(labels)
        return max(math.ceil(AUTO_SHARE * sum(labels.values())), AUTO_ROWS_PER_LABEL * named)


def fair_shares(total: int, stock: Mapping[str, int]) -> dict[str, int]:
    """Split `total` into equal shares, none above its stock; what one cannot use goes to the others.

    Odd rows go to the first names, whatever the stocks: a share never grows again when more rows come in.
    """
    shares = dict.fromkeys(stock, 0)
    left = total
    while left and (hungry := sorted(name for name in stock if shares[name] < stock[name])):
        each = max(1, left // len(hungry))
        for name in hungry[:left]:
            more = min(each, stock[name] - shares[name])
            shares[name] += more
            left -= more
    return shares
