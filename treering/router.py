"""Which expert answers a prompt: a linear discriminant on what the base model makes of it, fitted in closed form.

Every class (a task's label, or a task without labels) is a mean; all share the covariance within classes (Fisher 1936;
Rao 1948). Both follow from sums, so rows may come in any order and any number of updates: the router of all of them is
the router of all rows at once, and nothing is forgotten (streaming discriminant analysis, Hayes and Kanan 2020,
arXiv:1909.01520). What is far from every class gets no expert.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from treering.files import write_file, write_json

FILE, SUMS = "router.json", "router.safetensors"

SHRINKAGE = 0.2
"""Share of the covariance that is taken as the same in all directions (Ledoit and Wolf 2004)."""

FOLDS = 5
"""Parts of new rows; each is measured by a router that knows the others."""

_OTHERS = ""
"""Whose classes those others are meanwhile."""

FAR = 2.5
"""Standard deviations above the mean distance of known rows from which on a prompt gets no expert."""

NOVEL = 0.8
"""Rows that are unlike what is known: of each other, so large a share is told apart from it."""


ENOUGH = 10
"""Rows whose distances say what is far."""


@dataclass(frozen=True)
class Known:
    """How far rows lie from the nearest class that other rows made, the logarithm of the squared distance."""

    rows: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def with_new(self, logs: Tensor) -> Known:
        """Of `logs` and of what was before, which counts no more than they do: distances shrink as rows come in."""
        new, old = len(logs), min(self.rows, len(logs))
        if not new:
            return self
        mean = float(logs.mean())
        total = new + old
        variance = (float(logs.var(correction=0)) * new + self.variance * old) / total
        between = (mean - self.mean) ** 2 * new * old / total**2
        return Known(total, (mean * new + self.mean * old) / total, variance + between)

    def deviations(self, logs: Tensor) -> Tensor:
        """By how many standard deviations `logs` are above the mean; 0 where too few rows are known to tell."""
        if self.rows < ENOUGH:
            return torch.zeros_like(logs)
        return (logs - self.mean) / math.sqrt(max(self.variance, 1e-12))


@dataclass
class Router:
    """What is known of the rows learned so far, whose vectors have `size` numbers.

    `expert` names each class's expert; `counts` and `sums` `[classes, size]` are of its rows, in the same order;
    `products` `[size, size]` is the sum of all rows' outer products.
    """

    size: int
    expert: dict[str, str] = field(default_factory=dict)
    counts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    sums: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))
    products: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))
    known: Known = Known()

    def __post_init__(self) -> None:
        if not self.sums.numel():
            self.sums = torch.zeros(0, self.size, dtype=torch.float64)
            self.products = torch.zeros(self.size, self.size, dtype=torch.float64)

    def learn(self, features: Tensor, classes: Sequence[str], owners: Mapping[str, str]) -> None:
        """Rows `[n, size]` of these classes, which the experts in `owners` answer from now on."""
        rows = features.double()
        measured = [self._told(rows, classes, part)[1] for part in _folds(len(rows))]
        self._add(rows, classes, owners)
        self.known = self.known.with_new(torch.cat(measured))

    def with_rows(self, features: Tensor, classes: Sequence[str], owners: Mapping[str, str]) -> Router:
        """Another that knows these rows as well, but no more of what is far."""
        found = replace(self, expert=dict(self.expert))
        found._add(features.double(), classes, owners)
        return found

    def nearest(self, features: Tensor) -> tuple[list[str], Tensor]:
        """The expert of the class nearest to each of `features` `[n, size]`, and the log of its squared distance."""
        means = self.sums / self.counts[:, None]
        # Sums of outer products less those of the means: the covariance within classes, whatever came when.
        within = (self.products - self.sums.T @ means) / self.counts.sum()
        even = within.trace() / self.size
        shrunk = (1 - SHRINKAGE) * within
        shrunk.diagonal().add_(SHRINKAGE * even.clamp_min(1e-12))
        factor = torch.linalg.cholesky(shrunk)
        white = torch.linalg.solve_triangular(factor, torch.cat([means, features.double()]).T, upper=False).T
        found = torch.cdist(white[len(means) :], white[: len(means)]).square().min(1)
        owners = list(self.expert.values())
        return [owners[at] for at in found.indices.tolist()], found.values.clamp_min(1e-12).log()

    def route(self, features: Tensor) -> list[str | None]:
        """The expert that answers each of `features` `[n, size]`; None: none of them."""
        if not len(features):
            return []
        experts, logs = self.nearest(features)
        far = self.known.deviations(logs) > FAR
        return [None if away else expert for expert, away in zip(experts, far.tolist(), strict=True)]

    def novelty(self, features: Tensor, classes: Sequence[str]) -> float:
        """The share of the rows `features` `[n, size]` that go to `classes` of the others, not to what is known."""
        rows = features.double()
        found = [owner for part in _folds(len(rows)) for owner in self._told(rows, classes, part)[0]]
        return found.count(_OTHERS) / max(1, len(rows))

    def save(self, folder: Path) -> None:
        """Write `router.json` and `router.safetensors` into `folder`."""
        from safetensors.torch import save

        known = {"rows": self.known.rows, "mean": self.known.mean, "variance": self.known.variance}
        write_json(folder / FILE, {"size": self.size, "expert": self.expert, "known": known})
        tensors = {"counts": self.counts, "sums": self.sums, "products": self.products}
        write_file(folder / SUMS, save({name: tensor.contiguous() for name, tensor in tensors.items()}))

    @classmethod
    def load(cls, folder: Path) -> Router:
        """Read what `save` wrote."""
        from safetensors.torch import load_file

        about = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return cls(about["size"], about["expert"], **load_file(folder / SUMS), known=Known(**about["known"]))

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

    def _told(self, rows: Tensor, classes: Sequence[str], part: range) -> tuple[list[str], Tensor]:
        """`nearest` of the rows at the places in `part`, once all others of `rows` are known, as those of `_OTHERS`."""
        others = [at for at in range(len(rows)) if at not in part]
        told = self.with_rows(rows[others], [classes[at] for at in others], dict.fromkeys(classes, _OTHERS))
        if not told.expert:  # The first row of all has no other to be measured by.
            return [], rows.new_empty(0)
        return told.nearest(rows[part.start :: part.step])


def _folds(count: int) -> list[range]:
    """The places of `count` rows in parts."""
    return [range(start, count, FOLDS) for start in range(min(FOLDS, count))]
