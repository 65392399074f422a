"""What training consists of, decided before the first step: rows by optimiser step, and the rate of each.

So an interrupted run goes on exactly where it was.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from treering.memory import Memory, evenly
from treering.methods import Methods

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from treering.config import Config

LEARNING_RATES = {"lora": 1.5e-3, "freeze": 2e-4, "full": 5e-5, "osf": 5e-5, "adapter": 1e-3, "norm": 5e-3}
"""Peak rates that `learning_rate: auto` begins from; that of LoRA is for models up to `WIDTH` wide."""

WIDTH = 576
"""Hidden size above which LoRA's rate falls as one over it, as with muP (Yang et al. 2022, arXiv:2203.03466)."""

PREFERENCE = 0.05
"""Of the usual rate what preference pairs are learned at: as LLaMA-Factory's examples have it (1e-4 and 5e-6)."""

PASSES, MOST_PASSES, ENOUGH_STEPS = 3, 20, 100
"""What `num_train_epochs: auto` takes: that many passes, or more until the new rows alone make enough steps."""

BATCHES_SORTED_TOGETHER = 8
"""Rows of so many batches are sorted by length together: little padding, and still a random mix of rows."""


def default_rate(finetuning_type: str, base: PreTrainedConfig) -> float:
    """The peak rate that a `finetuning_type` begins from on the model `base`."""
    width = base.get_text_config().hidden_size if finetuning_type == "lora" else WIDTH
    return LEARNING_RATES[finetuning_type] * min(1.0, WIDTH / width)


def peak_rate(config: Config, model: PreTrainedModel) -> float:
    """The peak learning rate: as set, or the default for what learns and for `model`."""
    if config.learning_rate != "auto":
        return config.learning_rate
    return default_rate(config.finetuning_type, model.config) * (PREFERENCE if config.stage == "dpo" else 1.0)


def passes(config: Config, new: int) -> float:
    """Passes over `new` rows: as set, or by their number."""
    if config.num_train_epochs != "auto":
        return config.num_train_epochs
    steps = math.ceil(new / (config.batch_size * config.gradient_accumulation_steps))
    return min(max(PASSES, math.ceil(ENOUGH_STEPS / max(1, steps))), MOST_PASSES)


Step = list[list[str]]
"""The row ids of one optimiser step, micro-batch by micro-batch."""


def plan_steps(
    new: Sequence[str],
    memory: Memory,
    methods: Methods,
    lengths: Mapping[str, int],
    config: Config,
    general: Sequence[str] = (),
) -> list[Step]:
    """All steps of an update: each epoch's new and replayed rows, shuffled, in batches of like length.

    `lengths` gives the tokens of each row id. `general` are those of general text, of which each epoch has its share.
    """
    size, accumulate = config.batch_size, config.gradient_accumulation_steps
    steps: list[Step] = []
    wanted = passes(config, len(new))
    epochs = math.ceil(wanted)
    epoch = 0
    while True:
        rng = random.Random(f"{config.seed}:{epoch}")
        rows = [*new, *methods.replay(new, memory, epoch)]
        if general:
            share = config.memory.general_share
            rows += evenly(general, round(len(rows) * share / (1 - share)), f"{config.seed}:general:{epoch}")
        if epoch == epochs - 1 and config.max_steps <= 0:
            rng.shuffle(rows)
            rows = rows[: math.ceil(len(rows) * (wanted - epoch))]
        batches = _length_batches(rows, lengths, size, rng)
        steps += [batches[start : start + accumulate] for start in range(0, len(batches), accumulate)]
        epoch += 1
        if config.max_steps > 0:
            if len(steps) >= config.max_steps:
                return steps[: config.max_steps]
        elif epoch == epochs:
            return steps


def _length_batches(rows: list[str], lengths: Mapping[str, int], size: int, rng: random.Random) -> list[list[str]]:
    rng.shuffle(rows)
    window = size * BATCHES_SORTED_TOGETHER
    batches = []
    for start in range(0, len(rows), window):
        near = sorted(rows[start : start + window], key=lambda row: (lengths[row], row))
        batches += [near[at : at + size] for at in range(0, len(near), size)]
    rng.shuffle(batches)
    return batches


def rate_schedule(config: Config, steps: int) -> Callable[[int], float]:
    """Share of the peak rate at a step: a linear rise over `warmup_ratio`, then as `lr_scheduler_type` says."""
    warmup = math.ceil(config.warmup_ratio * steps)

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        left = 1 - (step - warmup) / max(1, steps - warmup)
        if config.lr_scheduler_type == "cosine":
            return 0.5 * (1 - math.cos(math.pi * left))
        return left if config.lr_scheduler_type == "linear" else 1.0

    return share
