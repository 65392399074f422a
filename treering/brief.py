"""A training so short that it only shows what would come of more, and is undone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch

from treering import scaling
from treering.checkpoints import Log, random_state, set_random_state
from treering.methods import trained
from treering.model import precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from treering.config import Config

STEPS, ROWS = 6, 8
"""Its steps, and the rows of each."""


def short(config: Config) -> Config:
    """The settings of an update, for `STEPS` steps of `ROWS` rows in this process."""
    size = min(ROWS, config.per_device_train_batch_size)  # Never more at once than memory is known to hold.
    return config.model_copy(
        update={
            "max_steps": STEPS,
            "processes": 1,
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": math.ceil(ROWS / size),
        }
    )


@contextmanager
def undone(model: PreTrainedModel) -> Iterator[None]:
    """What is learned inside is forgotten: weights, torch's random state and the mode are then as they were."""
    random_before, training = random_state(), model.training
    learned = trained(model)
    start = {name: weight.detach().to("cpu", copy=True) for name, weight in learned.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, weight in learned.items():
                weight.copy_(start[name])
        set_random_state(random_before)
        model.train(training)


Found = TypeVar("Found")


def briefly(
    model: PreTrainedModel,
    training: Callable[[float | None], Log],
    measure: Callable[[], Found],
    config: Config,
    scale: float | None = None,
) -> tuple[Found, float | None]:
    """What `measure` finds after `training`, which is then undone, and the scale of its loss.

    `training` gets the scale to begin with, and returns its log. One that skipped steps, as the scale was too high, is
    made again at the scale it came to: with fewer steps it would show less.
    """
    while True:
        with undone(model):
            log = training(scale)
            if not any(scaling.SKIPPED in entry for entry in log):
                return measure(), scale
        scale = scaling.scale(log, precision(config)[0])
