"""Distillation of stored logits: replayed rows keep the answer distribution they had when they were learned.

After Hinton et al. 2015 (arXiv:1503.02531), with the teacher's top logits stored beside the row as in
Dark Experience Replay (Buzzega et al. 2020, arXiv:2004.07211), so no teacher model is in memory. Or of what the parent
makes of replayed rows, new ones (Li and Hoiem 2016, arXiv:1606.09282) or both: it does not change while an update
learns from it, so it is asked before the first step, and is not in memory either.
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
    """Adds `weight * T^2 * KL(teacher || student)`, averaged over those tokens of a step that have a teacher.

    Over the top-k alone where it is `stored`; against the `parent` over its top-k and all the rest as one more token.
    """

    def __init__(self, config: Config) -> None:
        self.weight, self.of_parent = config.distill.weight, config.distill.teacher == "parent"
        self.temperature = config.distill.temperature

    def loss(self, model: PreTrainedModel, batch: Batch, logits: Tensor) -> Tensor | None:
        """The distillation term of `batch`, or None when no row of it has a teacher's logits."""
        if batch.teacher is None:
            return None
        taught = batch.teacher
        student = torch.log_softmax(logits[taught.at] / self.temperature, dim=-1).gather(-1, taught.ids)
        if self.of_parent:
            teacher = (taught.logits.float() / self.temperature).exp()  # As `teach` has shifted them.
            teacher = torch.cat([teacher, (1 - teacher.sum(-1, keepdim=True)).clamp_min(0)], -1)
            rest = (1 - student.exp().sum(-1, keepdim=True)).clamp_min(1e-9)
            student = torch.cat([student, rest.log()], -1)
        else:
            teacher = torch.softmax(taught.logits.float() / self.temperature, dim=-1)
        divergence = (teacher * (teacher.clamp_min(1e-9).log() - student)).sum()
        return self.weight * self.temperature**2 * divergence / taught.of
