"""What rows are like, task by task: how many, how long, which labels, and how new ones differ from old."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from treering import registry
from treering.automate.drift import divergence, drift
from treering.data.example import Example
from treering.data.labels import Labels
from treering.data.language import languages
from treering.errors import UsageError, near

if TYPE_CHECKING:
    from treering.looks import Looks
    from treering.workspace import Workspace

SAMPLE = 20_000
"""Rows of a task whose texts are read, the first by id: ids are hashes, so these are a random draw."""

IN_LANGUAGES = 300
"""Rows of a task whose language is told, the first of those."""

SHOWN = 20
"""Labels that are told, the most frequent; and tasks where one is asked for that is not there."""


@dataclass
class Of:
    """One task's rows. `characters`: of question and answer, the median, the 95th percentile and the largest.

    `languages` counts those of `IN_LANGUAGES` rows at most, by ISO 639-1 code (`data/language.py`); None: lingua is not
    installed, or no row is there.

    `labels` are the most frequent with their counts, empty where answers are open; `slips` pairs a rare label with the
    frequent one it looks like; `imbalance` is the count of the most frequent label over that of the rarest, if that is
    much. `drift` compares what waits with what was learned, in bits (Jensen-Shannon): of words, of
    lengths (by powers of two) and of labels. Where a model was to look, `embedding` is there too (`Looks.distance`),
    and `doubts` are waiting rows whose label may be wrong.
    """

    rows: dict[str, int] = field(default_factory=dict)
    characters: dict[str, int] = field(default_factory=dict)
    languages: dict[str, int] | None = None
    labels: dict[str, int] = field(default_factory=dict)
    label_count: int = 0
    slips: dict[str, str] = field(default_factory=dict)
    imbalance: float | None = None
    drift: dict[str, float] | None = None
    doubts: list[dict[str, Any]] | None = None


def stats(ws: Workspace, task: str | None = None, looks: Looks | None = None) -> dict[str, dict[str, Any]]:
    """By task, or of one; with `looks` models read the rows as well. Raises `UsageError` if there is no such task."""
    tasks = ws.catalog.tasks()
    if task is not None and task not in tasks:
        known = ", ".join(list(tasks)[:SHOWN]) + (", ..." if len(tasks) > SHOWN else "")
        raise UsageError(
            f"there is no task {task!r}{near(task, tasks)}; there are: {known or 'none yet, for no row is stored'}"
        )
    learned = registry.known(ws, registry.current(ws))
    waiting = ws.catalog.waiting(learned)
    found = {}
    for name, counts in tasks.items():
        if task is None or name == task:
            found[name] = asdict(_of(ws, name, counts, waiting.get(name, []), learned, looks))
    return found


def _of(
    ws: Workspace,
    task: str,
    counts: Mapping[str, int],
    waiting: Sequence[str],
    learned: set[str],
    looks: Looks | None,
) -> Of:
    ids = ws.catalog.train_ids(task)
    examples = ws.catalog.examples(sorted(ids)[:SAMPLE])
    new = set(waiting)
    found = Of({**counts, "waiting": len(waiting)}, _characters(examples.values()))
    found.languages = languages(map(_said, islice(examples.values(), IN_LANGUAGES))) if examples else None
    labels = Labels.of(examples.values())
    found.labels, found.label_count = dict(Counter(labels.counts).most_common(SHOWN)), len(labels.counts)
    found.slips, found.imbalance = labels.slips(), labels.imbalance()
    known = sorted(learned.intersection(ids))
    if waiting and known:
        halves = [[e for id, e in examples.items() if (id in new) == side] for side in (True, False)]
        sides = [Counter(example.label for example in half) for half in halves]
        bits = {"words": drift(ws.catalog, waiting, known)}
        new_ones, old_ones = (Counter(f"{_length(example).bit_length()}" for example in half) for half in halves)
        bits["lengths"] = divergence(new_ones, old_ones)
        found.drift = bits | ({"labels": divergence(*sides)} if found.labels else {})
        distance = looks.distance(waiting, known) if looks else None
        found.drift |= {} if distance is None else {"embedding": distance}
    if waiting and looks:
        found.doubts = looks.doubts(task, waiting)
    return found


def _characters(examples: Iterable[Example]) -> dict[str, int]:
    lengths = sorted(map(_length, examples))
    if not lengths:
        return {}
    # The least length that so large a share of the rows do not exceed.
    at = {name: lengths[math.ceil(share * len(lengths)) - 1] for name, share in (("median", 0.5), ("p95", 0.95))}
    return {**at, "most": lengths[-1]}


def _length(example: Example) -> int:
    return sum(len(turn.content) for turn in example.messages)


def _said(example: Example) -> str:
    """Question and answer, without the instruction that all of a task may share."""
    return "\n".join(turn.content for turn in example.messages if turn.role != "system")
