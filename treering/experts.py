"""Experts: several LoRA adapters over one base model, and a router that says which of them answers a prompt.

What one expert learned no later update touches, unless its rows are more of the same. The weights of the adapter in
the model are those of one expert at a time; to change to another, its tensors take their place.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from treering.adopt import ADAPTER_FILES
from treering.passes import in_parts
from treering.progress import Advance
from treering.readings import Reading
from treering.registry import EXPERTS, Version
from treering.router import NOVEL, Router, Shown

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from treering.config import Config
    from treering.memory import Memory
    from treering.stop import Stop

R = TypeVar("R")

FEW = 8
"""New rows of a task below which it gets no expert of its own: they are too few to tell what is unlike, or alike."""


@dataclass
class Experts:
    """The adapters by expert, each with its weights by parameter name, and the router."""

    router: Router
    adapters: dict[str, dict[str, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """An `expert` that an update teaches, the one whose weights it begins with (None: new ones), and why.

    `rows` are the places of the rows that it is taught.
    """

    expert: str
    begins: str | None
    reason: str
    rows: tuple[int, ...]


def of(model: PreTrainedModel) -> Experts | None:
    """The experts of `model`; None: it has none, and answers as it is."""
    return cast("Experts | None", getattr(model, "treering_experts", None))


def attach(model: PreTrainedModel, experts: Experts) -> None:
    """Have `model` answer by `experts` from now on."""
    cast(Any, model).treering_experts = experts


def class_of(task: str, label: str) -> str:
    """The name of a class: a label of a task, or "" for a task whose answers are no labels."""
    return f"{task}\n{label}"


def by_age(expert: str) -> tuple[int, str]:
    """Orders experts by when they were made: `e2` before `e10`."""
    return len(expert), expert


def split(experts: Experts | None, vectors: Tensor, tasks: Sequence[str], classes: Sequence[str]) -> list[Choice]:
    """Which experts learn which of the new rows, the one with most of them first.

    Each row has a vector of `[rows, size]`, a task and a class. Those of classes that an expert knows go to it. The
    others of a task go together: to a new expert, if they are no `FEW`, most of the task's rows, and prompts of theirs
    would find it; else to the expert that knows, or is nearest to, most of the task's rows. Tasks are taken by their
    names, small ones last, and what one was given is known to those that follow: two that are alike share an expert.
    """
    before = experts.router if experts is not None else Router(vectors.shape[1])
    # Not their number: of those that were merged one is no more.
    router, count = before, max((int(name[1:]) for name in experts.adapters), default=0) if experts is not None else 0
    rows: dict[str, list[int]] = {}
    begins: dict[str, str | None] = {}
    reasons: dict[str, list[str]] = {}
    for at, name in enumerate(classes):
        if name in before.expert:
            rows.setdefault(before.expert[name], []).append(at)
    for expert, own in rows.items():
        reasons[expert] = [f"{len(own)} of {len(classes)} new rows are of what it knows"]
    unknown = Counter(task for task, name in zip(tasks, classes, strict=True) if name not in before.expert)
    for task in sorted(set(tasks), key=lambda task: (unknown[task] < FEW, task)):
        own = [at for at, of_task in enumerate(tasks) if of_task == task]
        unseen = [at for at in own if classes[at] not in before.expert]
        if unseen:
            expert, is_new, reason = _judged(router, task, own, unseen, vectors, classes, f"e{count + 1}")
            if is_new:
                count += 1
                begins[expert] = _best(before, vectors[own], [classes[at] for at in own])[0] if before.expert else None
                reason += f"; it begins from {begins[expert]}" if begins[expert] else ""
            rows.setdefault(expert, []).extend(unseen)
            reasons.setdefault(expert, []).append(reason)
            owners = {classes[at]: before.expert.get(classes[at], expert) for at in own}
            router = router.with_rows(vectors[own], [classes[at] for at in own], owners)
    found = [
        Choice(expert, begins.get(expert, expert), "; ".join(reasons[expert]), tuple(sorted(own)))
        for expert, own in rows.items()
    ]
    return sorted(found, key=lambda choice: (-len(choice.rows), choice.expert))


def _judged(
    router: Router,
    task: str,
    own: Sequence[int],
    unseen: Sequence[int],
    vectors: Tensor,
    classes: Sequence[str],
    new: str,
) -> tuple[str, bool, str]:
    """Who is to learn the rows at the places `unseen`, of classes that nobody knows; whether that is `new`; and why.

    They are among those of `task`, at the places `own`.
    """
    if not router.expert:
        return new, True, "the first"
    found = f"of {task}, {len(unseen)} of {len(own)} new rows have labels or a task that no expert knows"
    if 2 * len(unseen) > len(own):
        if len(unseen) >= FEW:
            novelty = router.novelty(vectors[unseen], [classes[at] for at in unseen])
            found += f", and {novelty:.0%} of them are told apart from what is known (new from {NOVEL:.0%})"
            if novelty >= NOVEL:
                return new, True, found
        else:
            found += f", too few for an expert of their own (from {FEW})"
    best, count = _best(router, vectors[own], [classes[at] for at in own])
    return best, False, f"{found}; {count} of {len(own)} are of what it knows, or nearest to it"


def _best(router: Router, vectors: Tensor, classes: Sequence[str]) -> tuple[str, int]:
    """The expert that knows, or is nearest to, most of these rows, and how many."""
    nearest = router.nearest(vectors)[0]
    votes = Counter(router.expert.get(name, near) for name, near in zip(classes, nearest, strict=True))
    return max(votes.items(), key=lambda vote: (vote[1], vote[0]))


def part(memory: Memory, expert: str, experts: Experts | None) -> Memory:
    """The remembered rows that `expert` answers for."""
    owners = experts.router.expert if experts is not None else {}
    return memory.part(lambda row: owners.get(class_of(row.task, row.label)) == expert)


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """A copy of the weights of the adapter in `model`, by parameter name."""
    return {name: p.detach().clone() for name, p in _adapter(model).items()}


def put(model: PreTrainedModel, start: Mapping[str, Tensor]) -> None:
    """Put a copy of these weights into the adapter of `model`, to be taught."""
    _point(model, {name: weight.clone() for name, weight in start.items()})


def keep(
    model: PreTrainedModel,
    taught: Mapping[str, dict[str, Tensor]],
    shown: Shown,
    owners: Mapping[str, str],
) -> None:
    """The experts `taught` have these weights now, and the classes of the rows `shown` belong to their `owners`.

    The first of those taught is left in the adapter of `model`.
    """
    experts = of(model)
    if experts is None:
        experts = Experts(Router(shown.vectors.shape[1]))
        attach(model, experts)
    experts.adapters |= dict(sorted(taught.items(), key=lambda item: by_age(item[0])))
    experts.router.learn(shown, owners)
    put(model, next(iter(taught.values())))


def routed(
    model: PreTrainedModel,
    chosen: Sequence[str | None],
    rows: Sequence[Sequence[int]],
    work: Callable[[Sequence[int]], Sequence[R]],
    config: Config,
    advance: Advance,
    stop: Stop | None = None,
    reading: Reading | None = None,
) -> list[R]:
    """As `passes.in_parts`, each row worked on by the expert `chosen` for it (`using`). `rows` are their tokens."""
    found: dict[int, R] = {}
    for expert, places in _groups(chosen).items():

        def own(part: Sequence[int], places: Sequence[int] = places) -> Sequence[R]:
            return work([places[at] for at in part])

        reading = reading and reading.next()
        with using(model, of(model), expert):
            results = in_parts(model, [rows[at] for at in places], own, config, advance, stop, reading)
        found |= zip(places, results, strict=True)
    return [found[at] for at in range(len(rows))]


@contextmanager
def using(model: PreTrainedModel, experts: Experts | None, expert: str | None) -> Iterator[None]:
    """What is computed inside is that expert's, the bare base model's for None; where there are none, as `model` is."""
    if expert is None:
        with cast(Any, model).disable_adapter():
            yield
        return
    if experts is None:
        yield
        return
    before = {name: p.data for name, p in _adapter(model).items()}
    _point(model, experts.adapters[expert])
    try:
        yield
    finally:
        _point(model, before)


def save(
    model: PreTrainedModel, folder: Path, taught: Sequence[str], parent: Version | None, write: Callable[[Path], None]
) -> None:
    """Put all experts of `model` into the version `folder`: those that were `taught`, and those of `parent`.

    The first of those taught is in `folder` already; `write` puts the adapter of the model into a folder.
    """
    experts, before = of(model), parent.experts if parent else {}
    assert experts is not None
    for expert in experts.adapters:
        own = folder / EXPERTS / expert
        own.mkdir(parents=True)
        if expert in taught[1:]:
            with using(model, experts, expert):
                write(own)
            continue
        source = folder if expert == taught[0] else before[expert]
        for name in ADAPTER_FILES:
            _link(source / name, own / name)
    experts.router.save(folder)


def load(model: PreTrainedModel, version: Version) -> None:
    """Attach the experts of `version` to `model`, whose adapter is left as it is."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    experts = Experts(Router.load(version.folder))
    before = weights(model)
    for name, folder in version.experts.items():
        set_peft_model_state_dict(model, load_file(folder / ADAPTER_FILES[1]))
        experts.adapters[name] = weights(model)
    _point(model, before)
    attach(model, experts)


def _adapter(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def _point(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    for name, parameter in _adapter(model).items():
        parameter.data = weights[name]


def _groups(experts: Sequence[str | None]) -> dict[str | None, list[int]]:
    """The places of each."""
    found: dict[str | None, list[int]] = {}
    for at, expert in enumerate(experts):
        found.setdefault(expert, []).append(at)
    return found


def _link(source: Path, target: Path) -> None:
    """The same file under another name, or a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
