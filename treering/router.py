"""What a prompt is like that was learned: a linear discriminant on what the base model makes of it, in closed form.

It says which expert answers a prompt, and which labels rows like it had.

Every class (a task's label, or a task without labels) is a mean; all share the covariance within classes (Fisher 1936;
Rao 1948). Both follow from sums, so rows may come in any order and any number of updates: the router of all of them is
the router of all rows at once, and nothing is forgotten (streaming discriminant analysis, Hayes and Kanan 2020,
arXiv:1909.01520). What is far from every class gets no expert, and is like no label; nor does what is likest to prompts
about anything (`treering.anything`), which are a class too.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from treering.files import write_file, write_json
from treering.registry import ROUTER

OWN = ""
"""Who answers where there are no experts: all that was learned, as one."""

FILE, SUMS = ROUTER, "router.safetensors"

SHRINKAGE = 0.2
"""Share of the covariance that is taken as the same in all directions (Ledoit and Wolf 2004)."""

FOLDS = 5
"""Parts of new rows; each is measured by a router that knows the others."""

_OTHERS = ""
"""Whose classes those others are meanwhile."""

ANYTHING, NOBODY = "", "nobody"
"""The class of prompts about anything, and its expert."""

MISTAKEN = 0.1
"""Share of a task's rows that are likest to prompts about anything, from which on that class counts for nothing."""

FAR = 3.0
"""Standard deviations above the mean distance of known rows from which on a prompt gets no expert."""

NOVEL = 0.8
"""Rows that are unlike what is known: of each other, so large a share is told apart from it."""


ENOUGH = 10
"""Rows whose distances say what is far."""

SHARPNESSES = torch.logspace(-8, 0, 25, base=2, dtype=torch.float64)
"""Those tried: by what half the squared distances are multiplied before they are logarithms of chances."""


AT_ONCE = 1024
"""Rows whose distances to all classes are held at a time."""

REMEMBERED = 200
"""Rows that what was measured before counts as at most, unless more are new: few new rows do not outweigh it."""


def task_of(name: str) -> str:
    """The task of the class of that name."""
    return name.partition("\n")[0]


@dataclass(frozen=True)
class Spread:
    """How far rows of a task lie from the nearest class that other rows made, the logarithm of the squared distance."""

    rows: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def with_new(self, logs: Tensor) -> Spread:
        """Of `logs` and of what was before, of which not all counts: distances shrink as rows come in."""
        new, old = len(logs), min(self.rows, max(len(logs), REMEMBERED))
        if not new:
            return self
        mean = float(logs.mean())
        total = new + old
        variance = (float(logs.var(correction=0)) * new + self.variance * old) / total
        between = (mean - self.mean) ** 2 * new * old / total**2
        return Spread(self.rows + new, (mean * new + self.mean * old) / total, variance + between)

    @property
    def far(self) -> float:
        """From where on a row is far; nowhere, where too few rows are known to tell."""
        return self.mean + FAR * math.sqrt(max(self.variance, 1e-12)) if self.rows >= ENOUGH else math.inf


@dataclass(frozen=True)
class Known:
    """With `sharpness`, of `SHARPNESSES` the geometric mean of the best for `labelled` rows, distances tell labels."""

    labelled: int = 0
    sharpness: float = 1 / 16

    def sharper(self, losses: Tensor, labelled: int) -> Known:
        """With the best sharpness of so many new rows, whose `losses` are summed up for each of `SHARPNESSES`."""
        new, old = labelled, min(self.labelled, max(labelled, REMEMBERED))
        if not new:
            return self
        best = math.log(float(SHARPNESSES[losses.argmin()]))
        sharpness = math.exp((best * new + math.log(self.sharpness) * old) / (new + old))
        return Known(self.labelled + new, sharpness)


@dataclass(frozen=True)
class Shown:
    """What is shown of rows: `vectors` `[rows, size]`, their `classes`, and the text of each class that is a label.

    Beside them prompts about `anything` `[prompts, size]`, in the `forms` of these rows.
    """

    vectors: Tensor
    classes: Sequence[str]
    answers: Mapping[str, str] = field(default_factory=dict)
    anything: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    forms: Sequence[str] = ()


@dataclass(frozen=True)
class _Near:
    """Of each row the expert of the class nearest to it, of those that were taught, and the `log` of its distance.

    `astray`: prompts about anything are nearer than that class, and than the mean of any task, which few rows tell
    better than the means of their labels. `distances` `[n, classes]` are squared.
    """

    experts: list[str]
    log: Tensor
    astray: list[bool]
    distances: Tensor


@dataclass
class Router:
    """What is known of the rows learned so far, whose vectors have `size` numbers.

    `expert` names each class's expert; `counts` and `sums` `[classes, size]` are of its rows, in the same order;
    `products` `[size, size]` is the sum of all rows' outer products. `answers` has the texts of classes that are
    labels, as they came last. `whole`: all that was learned it was shown, which an adapter made elsewhere forbids.
    `spread` is that of each task. `forms` are those in which it was shown prompts about anything; `mistaken` the tasks
    whose rows are like them.
    """

    size: int
    expert: dict[str, str] = field(default_factory=dict)
    counts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    sums: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))
    products: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))
    known: Known = Known()
    answers: dict[str, str] = field(default_factory=dict)
    whole: bool = True
    spread: dict[str, Spread] = field(default_factory=dict)
    forms: list[str] = field(default_factory=list)
    mistaken: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.sums.numel():
            self.sums = torch.zeros(0, self.size, dtype=torch.float64)
            self.products = torch.zeros(self.size, self.size, dtype=torch.float64)

    def learn(self, shown: Shown, owners: Mapping[str, str]) -> None:
        """The rows `shown`, which the experts in `owners` answer by their classes from now on."""
        rows, classes = shown.vectors.double(), shown.classes
        tasks = [task_of(name) for name in classes]
        logs, astray = {task: list[float]() for task in tasks}, Counter[str]()
        losses, labelled = torch.zeros(len(SHARPNESSES), dtype=torch.float64), 0
        if shown.forms:
            self._add(shown.anything.double(), [ANYTHING] * len(shown.anything), {ANYTHING: NOBODY})
            self.forms = [*self.forms, *shown.forms]
        for part in _folds(len(rows)):
            told, asked = self._told(rows, classes, part)
            if not told._taught:  # The first row of all has no other to be measured by.
                continue
            near = told._near(asked)
            for at, log, strayed in zip(part, near.log.tolist(), near.astray, strict=True):
                logs[tasks[at]].append(log)
                astray[tasks[at]] += strayed
            labels = [classes[at] if classes[at] in shown.answers else None for at in part]
            found, count = told._losses(near.distances, labels)
            losses, labelled = losses + found, labelled + count
        self._add(rows, classes, owners)
        self.answers = {**self.answers, **shown.answers}
        self.known = self.known.sharper(losses, labelled)
        spreads = {
            task: self.spread.get(task, Spread()).with_new(torch.tensor(found, dtype=torch.float64))
            for task, found in logs.items()
        }
        self.spread = {**self.spread, **spreads}
        lost = {task for task in logs if astray[task] > max(1, MISTAKEN * tasks.count(task))}
        self.mistaken = [*(task for task in self.mistaken if task not in logs), *sorted(lost)]

    def with_rows(self, features: Tensor, classes: Sequence[str], owners: Mapping[str, str]) -> Router:
        """Another that knows these rows as well, but no more of what is far."""
        found = replace(self, expert=dict(self.expert))
        found._add(features.double(), classes, owners)
        return found

    def nearest(self, features: Tensor) -> tuple[list[str], Tensor]:
        """The expert of the class nearest to each of `features` `[n, size]`, and the log of its squared distance."""
        near = self._near(features)
        return near.experts, near.log

    def like(self, features: Tensor, sharper: float, most: int) -> list[dict[str, float]]:
        """How likely each of `features` `[n, size]` is of which class, `most` classes of each; none where it is far.

        The chances are those that rows which were not learned yet had, each to the power of `sharper`.
        """
        names, found = list(self.expert), list[dict[str, float]]()
        for part in features.split(AT_ONCE):
            near = self._near(part)
            far, distances = self._far(near), near.distances
            if self.mistaken:
                distances[:, names.index(ANYTHING)] = math.inf
            chances = torch.softmax(distances * (-sharper * self.known.sharpness / 2), 1)
            top = chances.topk(min(most, len(names)), 1)
            found += [
                {} if away else {names[at]: chance for at, chance in zip(places, values, strict=True)}
                for away, places, values in zip(far, top.indices.tolist(), top.values.tolist(), strict=True)
            ]
        return found

    def route(self, features: Tensor) -> list[str | None]:
        """The expert that answers each of `features` `[n, size]`; None: none of them."""
        if not len(features):
            return []
        near = self._near(features)
        pairs = zip(self._far(near), near.astray, strict=True)
        elsewhere = [far or (astray and not self.mistaken) for far, astray in pairs]
        return [None if away else expert for expert, away in zip(near.experts, elsewhere, strict=True)]

    def novelty(self, features: Tensor, classes: Sequence[str]) -> float:
        """The share of the rows `features` `[n, size]` that go to `classes` of the others, not to what is known."""
        rows = features.double()
        found: list[str] = []
        for part in _folds(len(rows)):
            told, asked = self._told(rows, classes, part)
            found += told._near(asked).experts if told._taught else []
        return found.count(_OTHERS) / max(1, len(rows))

    def save(self, folder: Path) -> None:
        """Write `router.json` and `router.safetensors` into `folder`."""
        from safetensors.torch import save

        about = {
            "size": self.size,
            "expert": self.expert,
            "known": asdict(self.known),
            "answers": self.answers,
            "whole": self.whole,
            "spread": {task: asdict(spread) for task, spread in self.spread.items()},
            "forms": self.forms,
            "mistaken": self.mistaken,
        }
        write_json(folder / FILE, about)
        tensors = {"counts": self.counts, "sums": self.sums, "products": self.products}
        write_file(folder / SUMS, save({name: tensor.contiguous() for name, tensor in tensors.items()}))

    @classmethod
    def load(cls, folder: Path) -> Router:
        """Read what `save` wrote."""
        from safetensors.torch import load_file

        about: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
        known = about.pop("known")
        of_sharpness = {name: known.pop(name) for name in ("labelled", "sharpness") if name in known}
        about["spread"] = {task: Spread(**told) for task, told in about.get("spread", {"": known}).items()}
        # What older versions do not say, they were judged without; their tasks have one spread.
        told = {"answers": {}, "whole": False, **about, **load_file(folder / SUMS)}
        return cls(**told, known=Known(**of_sharpness))

    @property
    def _taught(self) -> bool:
        """Whether there is a class that rows taught."""
        return bool(self.expert.keys() - {ANYTHING})

    def _near(self, features: Tensor) -> _Near:
        """What is nearest to each of `features` `[n, size]`."""
        factor, means, tasks = self._fitted
        white = torch.linalg.solve_triangular(factor, features.double().T, upper=False).T
        distances = torch.cdist(white, means).square().clamp_min(1e-12)
        owners = list(self.expert.values())
        nobody = torch.tensor([owner == NOBODY for owner in owners])
        found = distances.masked_fill(nobody, math.inf).min(1)
        known = torch.minimum(found.values, torch.cdist(white, tasks).square().min(1).values)
        astray = distances[:, nobody].lt(known[:, None]).any(1)
        return _Near([owners[at] for at in found.indices.tolist()], found.values.log(), astray.tolist(), distances)

    def _far(self, near: _Near) -> list[bool]:
        """Which are farther than rows of any task are: of what is unlike another, all may lie farther."""
        limit = max((spread.far for spread in self.spread.values()), default=math.inf)
        return near.log.gt(limit).tolist()

    @cached_property
    def _fitted(self) -> tuple[Tensor, Tensor, Tensor]:
        """The Cholesky factor of the covariance within classes; in whose space that is the identity, means.

        Those of the classes, and those of the tasks.
        """
        means = self.sums / self.counts[:, None]
        # Sums of outer products less those of the means: the covariance within classes, whatever came when.
        within = (self.products - self.sums.T @ means) / self.counts.sum()
        even = within.trace() / self.size
        shrunk = (1 - SHRINKAGE) * within
        shrunk.diagonal().add_(SHRINKAGE * even.clamp_min(1e-12))
        factor = torch.linalg.cholesky(shrunk)
        places: dict[str, list[int]] = {}
        for at, name in enumerate(self.expert):
            if name != ANYTHING:
                places.setdefault(task_of(name), []).append(at)
        tasks = [self.sums[own].sum(0) / self.counts[own].sum() for own in places.values()]
        found = (means, torch.stack(tasks) if tasks else means[:0])
        white = [torch.linalg.solve_triangular(factor, rows.T, upper=False).T for rows in found]
        return factor, white[0], white[1]

    def _add(self, rows: Tensor, classes: Sequence[str], owners: Mapping[str, str]) -> None:
        self.expert |= {name: owners[name] for name in classes}
        names = {name: at for at, name in enumerate(self.expert)}
        more = len(names) - len(self.counts)
        self.counts = torch.cat([self.counts, self.counts.new_zeros(more)])
        self.sums = torch.cat([self.sums, self.sums.new_zeros(more, self.size)])
        places = torch.tensor([names[name] for name in classes], dtype=torch.long)
        self.counts = self.counts.index_add(0, places, torch.ones(len(rows), dtype=torch.float64))
        self.sums = self.sums.index_add(0, places, rows)
        self.products = self.products + rows.T @ rows
        self.__dict__.pop("_fitted", None)

    def _told(self, rows: Tensor, classes: Sequence[str], part: range) -> tuple[Router, Tensor]:
        """One that knows all others of `rows` too, as those of `_OTHERS`, and the rows in `part`."""
        others = [at for at in range(len(rows)) if at not in part]
        told = self.with_rows(rows[others], [classes[at] for at in others], dict.fromkeys(classes, _OTHERS))
        return told, rows[part.start :: part.step]

    def _losses(self, distances: Tensor, labels: Sequence[str | None]) -> tuple[Tensor, int]:
        """The cross entropy in nats at each of `SHARPNESSES`, summed over the rows whose label is known; their number.

        None are, where there is but one class: any sharpness would do.
        """
        names = {name: at for at, name in enumerate(self.expert)}
        known = [at for at, label in enumerate(labels) if label in names and len(names) > 1]
        right = torch.tensor([names[str(labels[at])] for at in known], dtype=torch.long)
        halves = -distances[known] / 2
        found = [cross_entropy(halves * sharp, right, reduction="sum") for sharp in SHARPNESSES.tolist()]
        return torch.stack(found), len(known)


def _folds(count: int) -> list[range]:
    """The places of `count` rows in parts."""
    return [range(start, count, FOLDS) for start in range(min(FOLDS, count))]
