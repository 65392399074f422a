"""Learning without forgetting: on new rows the model goes on ranking the other answers as its parent did.

After Li and Hoiem 2016 (arXiv:1606.09282), on the part of the distribution that is not the answer, as in decoupled
distillation (Zhao et al. 2022, arXiv:2203.08679, NCKD): the right token is left out of teacher and student, so that the
term never holds back what is to be learned. New rows thus protect old knowledge, of which only few rows are left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from treering.config import Config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from treering.batches import Batch

TOP_K = 64
"""Logits of the parent that are taken for each answer token."""


class LwF:
    """Adds `weight * T^2 * KL(parent || student)` over the parent's top-k but the answer.

    It is averaged over a step's new answer tokens.
    """

    def __init__(self, config: Config) -> None:
        self.weight = config.lwf.weight
        self.temperature = config.lwf.temperature

    def loss(self, model: PreTrainedModel, batch: Batch, logits: Tensor) -> Tensor | None:
        """The term of `batch`, or None when no row of it has logits of the parent."""
        if batch.parent is None:
            return None
        taught, right = batch.parent, batch.targets[batch.parent.at]
        taken = (taught.ids != right.unsqueeze(-1)) & taught.logits.isfinite()
        parent, student = (
            torch.log_softmax(scores.masked_fill(~taken, -1e4) / self.temperature, dim=-1)
            for scores in (taught.logits.float(), logits[taught.at].gather(-1, taught.ids))
        )
        divergence = parent.exp() * (parent - student)
        return self.weight * self.temperature**2 * divergence.masked_fill(~taken, 0.0).sum() / taught.of
