"""Experts that are alike: one answers for both, where rows of both say that none of them loses by it.

Prompts that can be told apart get experts apart, though what is wanted of them may be the same. So after the lessons of
an update each expert that was taught is compared with its likeliest twin, the one its prompts would go to if it were
not there: one twin each, so that the cost does not grow with their number. What decides is how well the rows of both
are answered: by either of the two, or by the mean of their weights.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from treering.experts import FEW, Experts, by_age, class_of, of, using
from treering.lesson import MEASURED
from treering.memory import Memory, fair_shares, some
from treering.router import NOBODY, Router

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MARGIN = 0.02
"""Nats an answer token by which the rows of a merged expert may be answered worse."""

MEAN = "the mean of both"

Measure = Callable[[Sequence[str]], Sequence[float]]
"""Gives the losses of rows, by their ids, under the model as it is."""


@dataclass(frozen=True)
class Merged:
    """What became of the pairs that were compared, in words; and of those that are no more who answers for them."""

    found: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)

    def now(self, experts: Sequence[str]) -> list[str]:
        """Who answers for these, each once."""
        return list(dict.fromkeys(self.kept.get(expert, expert) for expert in experts))


def merge(
    model: PreTrainedModel,
    taught: Collection[str],
    new: Mapping[str, str],
    memory: Memory,
    before: Collection[str],
    measure: Measure,
) -> Merged:
    """Merge the experts of `model` that were `taught` with their twins, where these are alike; the older name stays.

    `new` has the class of each new row by its id, `memory` the rows that are remembered of the experts that were there
    `before`.
    """
    experts = of(model)
    assert experts is not None
    merged, judged = Merged(), set[tuple[str, str]]()
    for expert in sorted(taught, key=by_age):
        twin = twin_of(experts.router, expert) if expert in experts.adapters else None
        if twin is None:
            continue
        older, newer = pair = tuple(sorted((expert, twin), key=by_age))
        if pair in judged:
            continue
        judged.add((older, newer))
        rows = {one: _rows(one, experts.router, new, memory, one in before) for one in pair}
        few = [f"of {one} {len(ids)} rows can be asked" for one, ids in rows.items() if len(ids) < FEW]
        if few:
            merged.found.append(f"{older} and {newer} were not compared: {' and '.join(few)}, fewer than {FEW}")
            continue
        chosen, told = _compared(model, experts, rows, measure)
        merged.found.append(told)
        if chosen is not None:
            experts.adapters[older] = chosen
            del experts.adapters[newer]
            experts.router.expert = {
                name: older if owner == newer else owner for name, owner in experts.router.expert.items()
            }
            merged.kept.update({gone: older for gone, kept in merged.kept.items() if kept == newer})
            merged.kept[newer] = older
    return merged


def twin_of(router: Router, expert: str) -> str | None:
    """The other expert whose classes lie nearest to those of `expert`, these weighed by their rows; None: no other."""
    owners = list(router.expert.items())
    own = [at for at, (_, owner) in enumerate(owners) if owner == expert]
    rest = [at for at, (_, owner) in enumerate(owners) if owner != expert]
    if not own or {owners[at][1] for at in rest} <= {NOBODY}:
        return None
    means = router.sums[own] / router.counts[own, None]
    # Less what the own classes differ by, so that the covariance within classes is still that of all of them.
    products = router.products - router.sums[own].T @ means
    others = Router(router.size, dict(owners[at] for at in rest), router.counts[rest], router.sums[rest], products)
    votes: Counter[str] = Counter()
    for near, count in zip(others.nearest(means)[0], router.counts[own].tolist(), strict=True):
        votes[near] += count
    return max(votes, key=lambda near: (votes[near], by_age(near)))


def mean(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Halfway between the weights of two adapters."""
    return {name: torch.lerp(weight, other[name], 0.5) for name, weight in one.items()}


def alike(own: Sequence[float], other: Sequence[float], tasks: Sequence[str]) -> bool:
    """Whether rows with the losses `own` lose nothing by having the losses `other`.

    The mean rise and its standard error together are no more than `MARGIN`, nor is the mean rise on any of their tasks.
    """
    rises = [late - early for early, late in zip(own, other, strict=True)]
    if not all(map(math.isfinite, rises)):
        return False
    parts: dict[str, list[float]] = {}
    for task, rise in zip(tasks, rises, strict=True):
        parts.setdefault(task, []).append(rise)
    surely = fmean(rises) + stdev(rises) / math.sqrt(len(rises))
    return max(surely, *map(fmean, parts.values())) <= MARGIN


def _rows(expert: str, router: Router, new: Mapping[str, str], memory: Memory, was_there: bool) -> dict[str, str]:
    """The tasks of rows that `expert` answers for, by id: `MEASURED` at most, as many of one task as of another.

    None where it `was_there` before and nothing of that is remembered: new rows do not say what it would forget.
    """
    groups: dict[str, dict[str, str]] = {}
    for id, row in memory.rows.items():
        if router.expert.get(class_of(row.task, row.label)) == expert:
            groups.setdefault(f"old {row.task}", {})[id] = row.task
    if was_there and not groups:
        return {}
    for id, name in new.items():
        if router.expert[name] == expert:
            task = name.partition("\n")[0]
            groups.setdefault(f"new {task}", {})[id] = task
    shares = fair_shares(MEASURED, {name: len(group) for name, group in groups.items()})
    drawn = {name: some(group, shares[name], f"{memory.seed}:twins") for name, group in groups.items()}
    return {id: groups[name][id] for name, ids in drawn.items() for id in ids}


def _compared(
    model: PreTrainedModel, experts: Experts, rows: Mapping[str, Mapping[str, str]], measure: Measure
) -> tuple[dict[str, Tensor] | None, str]:
    """The best weights that answer the `rows` of both experts as well as their own do, if there are any; and why."""
    one, other = rows
    tried: dict[str, dict[str, Tensor]] = {name: experts.adapters[name] for name in rows}
    tried[MEAN] = mean(tried[one], tried[other])
    found: dict[str, dict[str, Sequence[float]]] = {}
    for name in tried:
        with using(model, Experts(experts.router, tried), name):
            found[name] = {side: measure(list(own)) for side, own in rows.items()}
    own = {side: found[side][side] for side in rows}
    fit = [n for n in tried if all(alike(own[side], found[n][side], list(rows[side].values())) for side in rows)]
    best = min(fit or tried, key=lambda name: sum(map(fmean, found[name].values())))
    losses = " and ".join(f"{fmean(own[side]):.3g} -> {fmean(found[best][side]):.3g}" for side in rows)
    told = f"losses in nats of {len(rows[one])} and {len(rows[other])} rows {losses}"
    if not fit:
        return None, f"{one} and {other} are not alike: at best, with {best}, {told}"
    return tried[best], f"{one} and {other} are alike: {best} answers both as {one}, {told}"
