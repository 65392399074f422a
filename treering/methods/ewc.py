"""Elastic weight consolidation: weights that old answers hang on are held where the parent has them.

After Kirkpatrick et al. 2017 (arXiv:1612.00796), in the online form of Schwarz et al. 2018 (arXiv:1805.06370): one
importance for all that was learned so far, `F <- gamma * F + F_new`, and one anchor, the parent.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from treering import scaling
from treering.config import Config
from treering.methods import trained
from treering.methods.anchor import Anchor
from treering.model import compute, logits_at, precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from treering.batches import Batch

ROWS = 200
"""Rows that the importance is taken from, at most: each costs a pass forward and backward of its own."""


class EWC:
    """Adds `weight / 2 * sum(F * (w - w_parent)^2)` over the weights that an earlier update has the importance F of.

    F_new is the diagonal of the empirical Fisher information (of the answers in the data, not of the model's own;
    Kunstner et al. 2019, arXiv:1905.12558): the mean over rows of the squared gradient of a row's loss, the sum of the
    cross entropy of its answer tokens. It is divided by its mean over all numbers that learn (as in Schwarz et al.,
    each update counts alike, and what was learned well is not forgotten for its small gradients), so that F_new has no
    unit and a mean of 1, and `weight` is on the scale of `l2.weight`. After many updates F has a mean of
    `1 / (1 - gamma)`.

    Without the parent's F, as in a first update, there is nothing to protect. It keeps two more copies of what learns,
    and one, in float32, in the version.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.anchor: Anchor | None = None

    def prepare(self, model: PreTrainedModel, state: dict[str, Tensor]) -> PreTrainedModel:
        """Returns `model` as it is, whose weights are noted; `state` is F by the names of the weights."""
        self.anchor = Anchor(model, state, "ewc") if state else None
        return model

    def penalty(self, model: PreTrainedModel) -> Tensor | None:
        """The term, a scalar, or None where nothing is known to be of importance."""
        pull = self.anchor.pull(model) if self.anchor else None
        return None if pull is None else self.config.ewc.weight * pull

    def after_update(self, model: PreTrainedModel, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """F by the names of the weights, in their shapes; those that did not learn now have their old one, decayed."""
        sample = random.Random(f"{self.config.seed}:ewc").sample(batches, min(ROWS, len(batches)))
        old = (self.anchor.importance if self.anchor else None) or {}
        found = {name: self.config.ewc.gamma * importance for name, importance in old.items()}
        for name, importance in _of_mean_one(self._fisher(model, sample)).items():
            found[name] = importance + found[name] if name in found else importance
        return {name: importance.cpu() for name, importance in found.items()}

    def _fisher(self, model: PreTrainedModel, rows: Sequence[Batch]) -> dict[str, Tensor]:
        """The sum over `rows`, each a batch, of the squared gradient of its loss."""
        learns, training = trained(model), model.training
        found = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in learns.items()}
        dtype, _ = precision(self.config)
        scale = scaling.first(dtype)
        model.eval()
        for row in rows:
            with compute(row.targets.device, dtype):
                logits = logits_at(model, **row.inputs, at=row.at)
            loss = cross_entropy(logits, row.targets, reduction="sum")
            scale, gradients = scaling.finite(scale, partial(_gradients, loss, list(learns.values())))
            for name, gradient in zip(learns, gradients, strict=True):
                if gradient is not None:
                    found[name] += gradient.float().div_(scale).square()
        model.train(training)
        return found


def _gradients(loss: Tensor, weights: Sequence[Tensor], scale: float) -> tuple[Tensor | None, ...]:
    # Only what may have to be done again keeps its graph.
    return torch.autograd.grad(scale * loss, weights, allow_unused=True, retain_graph=scale > scaling.LEAST)


def _of_mean_one(found: dict[str, Tensor]) -> dict[str, Tensor]:
    total = sum(float(each.sum(dtype=torch.float64)) for each in found.values())
    mean = total / max(1, sum(each.numel() for each in found.values()))
    return {name: each / mean for name, each in found.items()} if mean else found
