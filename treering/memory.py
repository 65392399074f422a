"""The memory: which old rows to keep, and which of them to replay.

A row's place is decided by a fixed pseudo-random priority made of the seed and its id; each cell (a task, or a label
of a task) keeps its rows of lowest priority. That is a uniform sample without replacement of all rows the cell ever
saw (a bottom-k sample, the weightless case of Efraimidis and Spirakis 2006), whatever the order or the batches they
came in, and it can shrink at any time without another random draw. Where its room grows with the rows seen ("auto",
"2%"), the rows that come later are kept a little more often: what was let go cannot be asked back.

Other policies keep the rooms of "balanced" and put the rows of each cell in an order of their own (`keep.py`). It is
made once an update, of all rows old and new, and kept with them: so it does not depend on how they came either, and a
memory that shrinks lets the last ones go.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from treering.data.example import Example
from treering.files import write_file, write_json
from treering.keep import FROM_FEATURES, FROM_LOSSES, ORDERED, Known, hardest, herded, most_forgotten, newest

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


def evenly(ids: Iterable[str], count: int, seed: str) -> list[str]:
    """`count` of `ids`, each as often as the others (give or take one), in an order that `seed` decides."""
    drawn: list[str] = []
    pool = list(ids)
    shuffle = random.Random(seed).shuffle
    while pool and len(drawn) < count:
        shuffle(pool)
        drawn += pool[: count - len(drawn)]
    return drawn


def by_weight(weights: Mapping[str, float], count: int, seed: str) -> list[str]:
    """`count` of the ids in `weights`, each as often as its share of them (give or take one), so that none waits long.

    Systematic sampling (Madow 1949): points at equal distance, from a random first one, along the weights end to end.
    """
    draw = random.Random(seed)
    ids = list(weights)
    draw.shuffle(ids)
    step = math.fsum(weights.values()) / max(1, count)
    drawn: list[str] = []
    end, point = 0.0, draw.random()
    for id in ids:
        end += weights[id] / step
        while point < end and len(drawn) < count:
            drawn.append(id)
            point += 1
    drawn += ids[-1:] * (count - len(drawn))  # What rounding has left.
    draw.shuffle(drawn)
    return drawn


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
        policy: "balanced" (equal quotas per task and per label inside it), "reservoir" (uniform over all rows seen), or
            one of `keep.ORDERED`: the quotas of "balanced", and an order inside them that `order` makes.
        seed: decides which rows of a cell stay, where the policy does not.

    `weights` say how often rows are drawn beside others; with none they are all drawn alike.
    """

    def __init__(self, size: int | str = "auto", policy: str = "balanced", seed: int = 0) -> None:
        self.size, self.policy, self.seed = size, policy, seed
        self.rows: dict[str, Remembered] = {}
        self.seen: dict[str, dict[str, int]] = {}
        self.teachers: dict[str, Teacher] = {}
        self.known: dict[str, Known] = {}
        self.weights: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, examples: Iterable[Example], task: str, labelled: bool = True) -> None:
        """Show new rows of `task`; keep what fits. `labelled` says that the answers are a label set.

        Raises `ValueError` where the policy wants more than the rows; then `show` and `order` are for it.
        """
        self.show(examples, task, labelled)
        if self._ordered:
            self.order()
        else:
            self.cut()

    def show(self, examples: Iterable[Example], task: str, labelled: bool = True) -> None:
        """Take new rows of `task` in, and let none go: that waits for `order`, which is to know them all."""
        counts = self.seen.setdefault(task, {})
        for example in examples:
            if example.id in self.rows:
                continue
            row = Remembered(example.id, task, example.label if labelled else "")
            counts[row.label] = counts.get(row.label, 0) + 1
            self.rows[row.id] = row

    def drop(self, ids: Iterable[str]) -> None:
        """Let go of those rows that are no longer true, as if they had never been seen."""
        for id in self.rows.keys() & set(ids):
            row = self.rows.pop(id)
            labels = self.seen[row.task]
            labels[row.label] -= 1
            if not labels[row.label]:
                del labels[row.label]
        self.teachers = {id: teacher for id, teacher in self.teachers.items() if id in self.rows}
        self.known = {id: known for id, known in self.known.items() if id in self.rows}

    def order(self, losses: Mapping[str, float] | None = None, features: Mapping[str, Tensor] | None = None) -> None:
        """Put the rows of each cell in the order in which they are to stay, and keep what fits.

        `losses` (nats) and `features` (`[hidden]`) are those of all rows, for the policies that want them
        (`keep.FROM_LOSSES`, `keep.FROM_FEATURES`), or `ValueError`. Those shown since the last time are a new update's.
        """
        given = losses if self.policy in FROM_LOSSES else features if self.policy in FROM_FEATURES else self.rows
        if not self.rows.keys() <= (given or {}).keys():
            what = "losses" if self.policy in FROM_LOSSES else "features"
            raise ValueError(f"the policy {self.policy} orders rows by their {what}: call show, then order with {what}")
        number = 1 + max((known.update for known in self.known.values()), default=0)
        for id in self.rows:
            known, loss = self.known.get(id, Known(0, number)), (losses or {}).get(id)
            learned = loss if known.learned is None else known.learned
            self.known[id] = Known(known.rank, known.update, learned, loss)
        for labels in self._cells().values():
            for rows in labels.values():
                rows.sort(key=self._chance)
                for rank, at in enumerate(self._order(rows, number, features or {})):
                    known = self.known[rows[at].id]
                    self.known[rows[at].id] = Known(rank, known.update, known.learned, known.loss)
        self.cut()

    def cut(self) -> None:
        """Let go of the rows that have no room."""
        kept = self._first(self.rows.values(), self._budget()) if self.policy == "reservoir" else self._balanced()
        self.rows = {row.id: row for row in sorted(kept, key=self._priority)}
        self.teachers = {id: teacher for id, teacher in self.teachers.items() if id in self.rows}
        self.known = {id: known for id, known in self.known.items() if id in self.rows}

    def part(self, wanted: Callable[[Remembered], bool]) -> Memory:
        """The rows that are `wanted`, with what is stored for them: to draw from, not to add to."""
        found = Memory(self.size, self.policy, self.seed)
        found.rows = {id: row for id, row in self.rows.items() if wanted(row)}
        found.teachers = self.teachers
        return found

    def draw(self, count: int, epoch: int = 0) -> list[str]:
        """`count` ids in an order that `epoch` decides, each kept row as often as the others (give or take one).

        With `weights`, each as often as those say (give or take one).
        """
        seed = f"{self.seed}:{epoch}"
        if self.weights:
            return by_weight({id: self.weights[id] for id in self.rows}, count, seed)
        return evenly(self.rows, count, seed)

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
                **({"known": [astuple(self.known[row.id]) for row in rows]} if self._ordered else {}),
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
        # Of rows that another policy kept nothing is known but that they are older than what comes.
        known = stored.get("known") or [[place, 0] for place in range(len(memory.rows))]
        memory.known = {id: Known(*facts) for id, facts in zip(memory.rows, known, strict=True)}
        tensors = load_file(folder / "memory.safetensors")
        start = 0
        for id, tokens in zip(memory.rows, tensors["tokens"].tolist(), strict=True):
            if tokens:
                memory.teachers[id] = Teacher(
                    tensors["ids"][start : start + tokens], tensors["logits"][start : start + tokens]
                )
            start += tokens
        return memory

    @property
    def _ordered(self) -> bool:
        return self.policy in ORDERED

    def _order(self, rows: Sequence[Remembered], number: int, features: Mapping[str, Tensor]) -> Sequence[int]:
        """Places of the `rows` of a cell, first those that stay longest; those of the update `number` are new."""
        known = [self.known[row.id] for row in rows]
        losses = [(one.learned or 0.0, one.loss or 0.0) for one in known]  # Both known where they are wanted.
        if self.policy == "hard":
            return hardest([now for _, now in losses])
        if self.policy == "forgotten":
            return most_forgotten([now - then for then, now in losses])
        if self.policy == "ageing":
            return newest([one.update for one in known])
        if self.policy == "diverse":
            import torch

            # Old ones stand for all that the cell has seen before.
            fresh = sum(one.update == number for one in known)
            before = self.seen[rows[0].task][rows[0].label] - fresh
            each = before / max(1, len(rows) - fresh)
            stands_for = [1.0 if one.update == number else each for one in known]
            room = self._auto(self.seen[rows[0].task]) if self.size == "auto" else self._budget()
            return herded(torch.stack([features[row.id] for row in rows]), stands_for, room)
        return range(len(rows))

    def _priority(self, row: Remembered) -> tuple[int, bytes]:
        """Rows of the lowest stay: by the order of the policy, if it has one, then by chance."""
        known = self.known.get(row.id) if self._ordered else None
        return (known.rank if known else len(self.rows) if self._ordered else 0, self._chance(row))

    def _chance(self, row: Remembered) -> bytes:
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

    def _cells(self) -> dict[str, dict[str, list[Remembered]]]:
        """The rows by task and label."""
        cells: dict[str, dict[str, list[Remembered]]] = defaultdict(lambda: defaultdict(list))
        for row in self.rows.values():
            cells[row.task][row.label].append(row)
        return cells

    def _balanced(self) -> list[Remembered]:
        cells = self._cells()
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
