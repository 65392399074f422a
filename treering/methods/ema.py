"""Exponential moving average of the weights: the version gets the average over the last steps, not the last step.

After Polyak and Juditsky 1992 and Tarvainen and Valpola 2017 (arXiv:1703.01780). The decay rises with the steps as in
TensorFlow's `ExponentialMovingAverage`: what is averaged is at most the last tenth of the training, so that a short
update is no average over what had not learned yet.

LoRA's A and B are averaged apart. The product of the averages is the average of the products B A less their covariance
over the steps averaged, `sum w (B - mean B) (A - mean A)`: of second order in how far both went in those steps. In the
first update B begins at 0, but the beginning is not averaged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from treering.config import Config
from treering.methods import Losses, trained
from treering.sharding import parted

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class EMA:
    """`average += (1 - d) (weights - average)` after each step, d = `min(decay, (step - 1) / (step + 9))`.

    `step` counts from 1: the average begins as the weights after the first step, and has nothing of the parent.
    """

    def __init__(self, config: Config) -> None:
        self.decay = config.ema.decay
        self.running: dict[str, Tensor] = {}
        """The averages by name of the weight, float32, and `steps`, how many there were."""

    @torch.no_grad()
    def after_step(self, model: PreTrainedModel) -> None:
        """Take the weights as they are into the average."""
        steps = self.running.get("steps", torch.tensor(0)) + 1
        past = min(self.decay, (int(steps) - 1) / (int(steps) + 9))
        self.running["steps"] = steps
        for name, weight in trained(model).items():
            if name not in self.running:
                self.running[name] = weight.detach().clone()
            average = parted(self.running[name], weight)
            self.running[name] = average.add_(weight - average, alpha=1 - past)

    @torch.no_grad()
    def after_training(self, model: PreTrainedModel, measure: Callable[[], Losses]) -> None:
        """Put the averages in place."""
        for name, weight in trained(model).items():
            weight.copy_(self.running.get(name, weight))  # There is none where no step was taken.
