"""Reptile: now and then the weights go back part of the way that they went since the last time.

Nichol et al. 2018 (arXiv:1803.02999); with replay, as in Riemer et al. 2019 (MER, arXiv:1810.11910), it favours steps
whose gradients agree between batches, of old rows and of new ones. The optimiser keeps its moments and goes on, as in
Lookahead (Zhang et al. 2019, arXiv:1907.08610), which takes the same outer step.

LoRA's A and B go back apart: of the change of their product, `B dA + dB A + dB dA`, the first two terms keep `rate` and
the last `rate^2`. In the first update B begins at 0, and `dB (A + dA)` becomes `rate dB (A + rate dA)`.
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


class Reptile:
    """`weights = anchor + rate (weights - anchor)`, and then `anchor = weights`, every `steps` optimiser steps."""

    def __init__(self, config: Config) -> None:
        self.every, self.rate = config.reptile.steps, config.reptile.rate
        self.running: dict[str, Tensor] = {}
        """The anchors by name of the weight, float32, and `steps`, how many were taken since they were set."""

    def prepare(self, model: PreTrainedModel, state: dict[str, Tensor]) -> PreTrainedModel:
        """The first anchor is the parent."""
        self._anchor(model)
        return model

    def after_step(self, model: PreTrainedModel) -> None:
        """After `steps` of them, go back and begin anew."""
        self.running["steps"] = self.running["steps"] + 1
        if int(self.running["steps"]) == self.every:
            self._go_back(model)
            self._anchor(model)

    def after_training(self, model: PreTrainedModel, measure: Callable[[], Losses]) -> None:
        """Go back from the last steps too, where they were fewer: else a short update would not be protected."""
        if int(self.running["steps"]):
            self._go_back(model)

    def _anchor(self, model: PreTrainedModel) -> None:
        self.running["steps"] = torch.tensor(0)
        for name, weight in trained(model).items():
            self.running[name] = weight.detach().clone()

    @torch.no_grad()
    def _go_back(self, model: PreTrainedModel) -> None:
        for name, weight in trained(model).items():
            anchor = parted(self.running[name], weight)
            weight.copy_(torch.add(anchor, weight - anchor, alpha=self.rate))
