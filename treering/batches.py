"""Rows as tensors: what one forward pass reads, and what it is to predict."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

import torch
from torch import Tensor

from treering.memory import Teacher, stack
from treering.model import Tokens, pad
from treering.preference import Pairs, pairs_of, with_rejected


@dataclass(frozen=True)
class Taught:
    """Answer tokens for which a teacher's logits are known.

    `at` `[m]` are their places in `Batch.targets`; `ids` and `logits`, `[m, k]`, the teacher's highest logits there;
    `of` is how many such tokens the whole optimiser step has.
    """

    at: Tensor
    ids: Tensor
    logits: Tensor
    of: int


class Inputs(TypedDict, total=False):
    """What the model reads: token `ids` and their `mask`, both `[rows, length]`."""

    ids: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Noise:
    """NEFTune (Jain et al. 2023, arXiv:2310.05914): uniform noise on the embeddings; the same for the same `seed`."""

    alpha: float
    seed: int

    def drawn(self, mask: Tensor, size: int) -> Tensor:
        """For embeddings of `size` of the tokens in `mask`, `[rows, length]`: `[rows, length, size]`, on its device.

        Each number lies within `alpha / sqrt(length of its row * size)` of zero.
        """
        generator = torch.Generator().manual_seed(self.seed)  # On the processor, whatever the device: the same bits.
        noise = torch.rand(*mask.shape, size, generator=generator).to(mask.device) * 2 - 1
        return noise * (self.alpha / (mask.sum(1) * size).sqrt())[:, None, None]


@dataclass(frozen=True)
class Batch:
    """One forward pass.

    `inputs`: `ids` and `mask`, `[rows, length]`. `at`: `[tokens]` flat positions whose logits predict `targets`
    `[tokens]`, of each row those of its answers and then those of its prompts, where these are trained; `of` is how
    many the whole optimiser step has, so that a sum over a batch, divided by it, is the batch's part of a mean over the
    step. `teacher`: what `distill` holds rows to. `parent`: what the version before makes of new rows. `noise`: what is
    added to the embeddings. `pairs`: those rows that are learned as such, behind all rows their rejected answers; their
    targets are not in `plain`, the places of those whose cross entropy is learned (None: all), nor in `of`.
    """

    inputs: Inputs
    at: Tensor
    targets: Tensor
    of: int
    teacher: Taught | None = None
    parent: Taught | None = None
    noise: Noise | None = None
    pairs: Pairs | None = None
    plain: Tensor | None = None


def make_batch(
    rows: Sequence[Tokens],
    pad_id: int,
    device: torch.device | str = "cpu",
    *,
    teachers: Mapping[str, Teacher] | None = None,
    parents: Mapping[str, Teacher] | None = None,
) -> Batch:
    """Collate `rows`, as a step of their own; their last token is only predicted, never read."""
    pairs, read = pairs_of(rows, device), with_rejected(rows)
    inputs = pad([row.ids[:-1] for row in read], pad_id)
    length = inputs["input_ids"].shape[1]
    learned = [[*row.answers, *row.prompts] for row in read]
    at = [n * length + position - 1 for n, places in enumerate(learned) for position in places]
    targets = [row.ids[position] for row, places in zip(read, learned, strict=True) for position in places]
    plain = None if pairs is None else _outside(pairs, len(targets))
    return Batch(
        {"ids": inputs["input_ids"].to(device), "mask": inputs["attention_mask"].to(device)},
        torch.tensor(at).to(device),
        torch.tensor(targets).to(device),
        len(targets) if plain is None else len(plain),
        _taught(rows, teachers or {}, device),
        _taught(rows, parents or {}, device),
        pairs=pairs,
        plain=None if plain is None else torch.tensor(plain, dtype=torch.long).to(device),
    )


def as_step(batches: Sequence[Batch]) -> list[Batch]:
    """The same batches, as parts of one optimiser step."""
    of = sum(batch.of for batch in batches)
    teacher = sum(batch.teacher.of for batch in batches if batch.teacher)
    parent = sum(batch.parent.of for batch in batches if batch.parent)
    pairs = sum(batch.pairs.of for batch in batches if batch.pairs)
    return [
        replace(
            batch,
            of=of,
            teacher=batch.teacher and replace(batch.teacher, of=teacher),
            parent=batch.parent and replace(batch.parent, of=parent),
            pairs=batch.pairs and replace(batch.pairs, of=pairs),
        )
        for batch in batches
    ]


def with_noise(batches: Sequence[Batch], alpha: float, seed: str) -> list[Batch]:
    """The same batches, each with noise of its own; the same for the same `seed`."""
    draw = random.Random(seed)
    return [replace(batch, noise=Noise(alpha, draw.getrandbits(63))) for batch in batches]


def _outside(pairs: Pairs, count: int) -> list[int]:
    """Which of `count` targets are of no pair."""
    inside = {place for spans in (pairs.chosen, pairs.rejected) for start, end in spans for place in range(start, end)}
    return [place for place in range(count) if place not in inside]


def _taught(rows: Sequence[Tokens], teachers: Mapping[str, Teacher], device: torch.device | str) -> Taught | None:
    places: list[int] = []
    found = []
    start = 0
    for row in rows:
        teacher = teachers.get(row.id)
        if teacher is not None and len(teacher.ids) == len(row.answers):
            places += range(start, start + len(row.answers))
            found.append(teacher)
        start += len(row.answers) + len(row.prompts)
    if not found:
        return None
    ids, logits = stack(found)
    return Taught(torch.tensor(places).to(device), ids.long().to(device), logits.to(device), len(places))
