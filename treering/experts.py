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
from treering.features import features
from treering.passes import in_parts
from treering.progress import Advance
from treering.readings import Reading
from treering.registry import EXPERTS, Version
from treering.router import NOVEL, Router

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from treering.config import Config
    from treering.data.example import Message
    from treering.memory import Memory, Remembered
    from treering.stop import Stop

R = TypeVar("R")


@dataclass
class Experts:
    """The adapters by expert, each with its weights by parameter name, and the router."""

    router: Router
    adapters: dict[str, dict[str, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """The `expert` that an update teaches, whether it is new, the one it begins from, and why."""

    expert: str
    new: bool
    begins: str | None
    reason: str


def of(model: PreTrainedModel) -> Experts | None:
    """The experts of `model`; None: it has none, and answers as it is."""
    return cast("Experts | None", getattr(model, "treering_experts", None))


def attach(model: PreTrainedModel, experts: Experts) -> None:
    """Have `model` answer by `experts` from now on."""
    cast(Any, model).treering_experts = experts


def class_of(task: str, label: str) -> str:
    """The name of a class: a label of a task, or "" for a task whose answers are no labels."""
    return f"{task}\n{label}"


def choose(experts: Experts | None, vectors: Tensor, classes: Sequence[str]) -> Choice:
    """Which expert is to learn new rows of these `classes`, whose vectors are `[rows, size]`.

    A new one, if most rows are of classes that nobody knows, and prompts of theirs would find it; else the one that
    knows, or is nearest to, most of them.
    """
    if experts is None or not experts.adapters:
        return Choice("e1", True, None, "the first")
    router = experts.router
    unseen = [at for at, name in enumerate(classes) if name not in router.expert]
    nearest = router.nearest(vectors)[0]
    votes = Counter(router.expert.get(name, near) for name, near in zip(classes, nearest, strict=True))
    best, count = max(votes.items(), key=lambda vote: (vote[1], vote[0]))
    of_all = f"of {len(classes)} new rows"
    if 2 * len(unseen) > len(classes):
        novelty = router.novelty(vectors[unseen], [classes[at] for at in unseen])
        found = (
            f"{len(unseen)} {of_all} have labels or tasks that no expert knows; {novelty:.0%} of them are told apart "
            f"from what is known (new from {NOVEL:.0%})"
        )
        if novelty >= NOVEL:
            return Choice(f"e{len(experts.adapters) + 1}", True, best, f"{found}; it begins from {best}")
        return Choice(best, False, best, f"{found}, and {count} are nearest to it")
    return Choice(best, False, best, f"{count} {of_all} are of what it knows, or nearest to it")


def begin(model: PreTrainedModel, choice: Choice) -> None:
    """Put the weights that `choice` begins from into the adapter of `model`, to be taught."""
    experts = of(model)
    if experts is not None and choice.begins is not None:
        _put(model, {name: weight.clone() for name, weight in experts.adapters[choice.begins].items()})


def part(memory: Memory, choice: Choice, experts: Experts | None, classes: Sequence[str]) -> Memory:
    """The remembered rows that the chosen expert answers for, and those of the `classes` that it takes over."""
    own = set(classes)
    if experts is not None and not choice.new:
        own |= {name for name, expert in experts.router.expert.items() if expert == choice.expert}

    def wanted(row: Remembered) -> bool:
        return class_of(row.task, row.label) in own

    return memory.part(wanted)


def keep(model: PreTrainedModel, choice: Choice, vectors: Tensor, classes: Sequence[str]) -> None:
    """The weights in the adapter of `model` are the chosen expert's now, which answers for these rows."""
    experts = of(model)
    if experts is None:
        experts = Experts(Router(vectors.shape[1]))
        attach(model, experts)
    experts.adapters[choice.expert] = {name: p.detach().clone() for name, p in _weights(model).items()}
    experts.router.learn(vectors, classes, choice.expert)


def routed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    rows: Sequence[Sequence[int]],
    work: Callable[[Sequence[int]], Sequence[R]],
    config: Config,
    advance: Advance,
    stop: Stop | None = None,
    reading: Reading | None = None,
) -> list[R]:
    """As `passes.in_parts`; if `model` has experts, each row is worked on by the one that its prompt is routed to.

    `prompts` are the rows' questions, `rows` their tokens. Where no expert is near, the base model works.
    """
    experts = of(model)
    if experts is None:
        return in_parts(model, rows, work, config, advance, stop, reading)
    found: dict[int, R] = {}
    vectors = features(model, tokenizer, prompts, config, stop=stop, reading=reading)
    for expert, places in _groups(experts.router.route(vectors)).items():

        def own(part: Sequence[int], places: Sequence[int] = places) -> Sequence[R]:
            return work([places[at] for at in part])

        reading = reading and reading.next()
        with using(model, experts, expert):
            results = in_parts(model, [rows[at] for at in places], own, config, advance, stop, reading)
        found |= zip(places, results, strict=True)
    return [found[at] for at in range(len(rows))]


@contextmanager
def using(model: PreTrainedModel, experts: Experts, expert: str | None) -> Iterator[None]:
    """What is computed inside is that expert's, or the bare base model's for None."""
    if expert is None:
        with cast(Any, model).disable_adapter():
            yield
        return
    before = {name: p.data for name, p in _weights(model).items()}
    _put(model, experts.adapters[expert])
    try:
        yield
    finally:
        _put(model, before)


def save(folder: Path, experts: Experts, trained: str, parent: Version | None) -> None:
    """Write all experts into the version `folder`: `trained` is its own adapter, the others are those of `parent`."""
    before = parent.experts if parent else {}
    for expert in experts.adapters:
        own = folder / EXPERTS / expert
        own.mkdir(parents=True)
        source = folder if expert == trained else before[expert]
        for name in ADAPTER_FILES:
            _link(source / name, own / name)
    experts.router.save(folder)


def load(model: PreTrainedModel, version: Version) -> None:
    """Attach the experts of `version` to `model`, whose adapter is left as it is."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    experts = Experts(Router.load(version.folder))
    before = {name: p.detach().clone() for name, p in _weights(model).items()}
    for name, folder in version.experts.items():
        set_peft_model_state_dict(model, load_file(folder / ADAPTER_FILES[1]))
        experts.adapters[name] = {key: p.detach().clone() for key, p in _weights(model).items()}
    _put(model, before)
    attach(model, experts)


def _weights(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def _put(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    for name, parameter in _weights(model).items():
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
