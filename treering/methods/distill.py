"""Distillation of stored logits: replayed rows keep the answer distribution they had when they were learned.

After Hinton et al. 2015 (arXiv:1503.02531), with the teacher's top logits stored beside the row as in
Dark Experience Replay (Buzzega et al. 2020, arXiv:2004.07211), so no teacher model is in memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from treering.config import Config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from treering.batches import Batch


class Distill:
    """Adds `weight * T^2 * KL(teacher || student)` over the stored top-k, averaged over a step's replayed tokens."""

    def __init__(self, config: Config) -> None:
        self.weight = config.distill.weight
        self.temperature = config.distill.temperature

    def loss(self, model: PreTrainedModel, batch: Batch, logits: Tensor) -> Tensor | None:
        """The distillation term of `batch`, or None when no row of it has stored logits."""
        if batch.teacher is None:
            return None
        taught = batch.teacher
        teacher = torch.softmax(taught.logits.float() / self.temperature, dim=-1)
        student = torch.log_softmax(logits[taught.at] / self.temperature, dim=-1).gather(-1, taught.ids)
        divergence = (teacher * (teacher.clamp_min(1e-9).log() - student)).sum()
        return self.weight * self.temperature**2 * divergence / taught.of
