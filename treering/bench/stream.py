"""A stream of tasks: folders with train and test files, and in which update which rows come."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from treering.data.example import Example
from treering.data.read import Bad, Row, find_files, read, split_of
from treering.errors import UsageError
from treering.progress import say

Update = dict[str, list[Example]]
"""Training rows by task."""

_NUMBERED = re.compile(r".*\D(\d+)")


@dataclass(frozen=True)
class Draw:
    """The rows of one run: what each update teaches, and what every task is judged on."""

    updates: list[Update]
    test: Update

    @property
    def tasks(self) -> list[str]:
        """The tasks in the order in which they are first taught."""
        return list(dict.fromkeys(task for update in self.updates for task in update))

    @property
    def taught(self) -> Update:
        """All training rows of each task, tasks by name."""
        return {task: [row for update in self.updates for row in update.get(task, ())] for task in sorted(self.tasks)}


@dataclass(frozen=True)
class Stream:
    """The folder `data` has one folder a task. A task is one update, and they come in name order.

    Where training files end in a number (`train-07.jsonl`), that is the update they come in: so tasks have an order of
    their own, come in several updates or share one. `per_label` or `rows` limits the training rows of a task in an
    update, `eval_rows` its test rows.
    """

    data: Path
    per_label: int | None = None
    rows: int | None = None
    eval_rows: int | None = None

    def draw(self, seed: int, order: int = 0) -> Draw:
        """The rows that `seed` chooses, in the order of that number: 0 as named, others shuffled.

        Test rows are the same for every seed. Raises `UsageError` for a folder that is no stream.
        """
        if not self.data.is_dir():
            raise UsageError(f"--data {self.data} is no folder; name one that holds a folder a task")
        test: Update = {}
        updates: dict[tuple[int, str], Update] = {}
        for folder in sorted(path for path in self.data.iterdir() if path.is_dir()):
            task = folder.name
            test[task] = _shuffled(examples(folder, "held_out"), f"test:{task}")[: self.eval_rows]
            parts = numbered(folder)
            if not test[task] or not any(parts.values()):
                raise UsageError(f"{folder} needs a train and a test file with rows")
            for number, rows in parts.items():
                key = (0, task) if number is None else (number, "")
                chosen = self._limited(_shuffled(rows, f"{seed}:{task}:{number}"))
                updates.setdefault(key, {})[task] = chosen
        if not test:
            raise UsageError(f"--data {self.data} holds no folder; it needs one a task, with train and test files")
        named = [updates[key] for key in sorted(updates)]
        return Draw([named[at] for at in _order(len(named), order)], test)

    def _limited(self, rows: list[Example]) -> list[Example]:
        if self.per_label is None:
            return rows[: self.rows]
        counts: dict[str, int] = {}
        kept = []
        for row in rows:
            counts[row.label] = counts.get(row.label, 0) + 1
            if counts[row.label] <= self.per_label:
                kept.append(row)
        return kept


def numbered(folder: Path) -> dict[int | None, list[Example]]:
    """Training rows of a task by the number that their file's name ends in, None for files that have none."""
    files: dict[int | None, list[Path]] = {}
    for file in find_files(folder):
        if split_of(file) == "train":
            found = _NUMBERED.fullmatch(file.stem)
            files.setdefault(int(found[1]) if found else None, []).append(file)
    if None in files and len(files) > 1:
        raise UsageError(f"{folder} has training files with a number at the end and without; number all or none")
    return {number: _rows(paths) for number, paths in files.items()}


def examples(folder: Path, split: str) -> list[Example]:
    """Each row once of the files in `folder` whose names tell `split`; what cannot be read is said."""
    return _rows([file for file in find_files(folder) if split_of(file) == split])


def _rows(files: Sequence[Path]) -> list[Example]:
    found = [row for file in files for row in read(file)]
    left = [row for row in found if isinstance(row, Bad)]
    if left:
        say(f"{len(left)} rows left out, the first at {left[0].file}, line {left[0].line}: {left[0].reason}")
    return list({row.example.id: row.example for row in found if isinstance(row, Row)}.values())


def _order(count: int, number: int) -> tuple[int, ...]:
    """The places of `count` updates in the order of that number; no two numbers have the same one."""
    if number >= math.factorial(count):
        raise UsageError(f"--orders is above {math.factorial(count)}, and {count} updates have no more orders")
    found = [tuple(range(count))]
    tries = 0
    while len(found) <= number:
        tries += 1
        order = list(range(count))
        random.Random(f"order:{tries}").shuffle(order)
        if tuple(order) not in found:
            found.append(tuple(order))
    return found[number]


def _shuffled(rows: Sequence[Example], seed: str) -> list[Example]:
    order = sorted(rows, key=lambda row: row.id)
    random.Random(seed).shuffle(order)
    return order
