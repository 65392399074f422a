"""Synaptic intelligence: weights whose way has lowered the loss are held (Zenke et al. 2017, arXiv:1703.04200)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from treering.config import Config
from treering.methods import trained
from treering.methods.anchor import Anchor
from treering.sharding import parted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from treering.batches import Batch
    from treering.methods import Losses

DAMPING = 0.1
"""What keeps a weight that hardly moved from infinite importance, as a part of the mean squared way of all weights."""


class SI:
    """Adds `weight * sum(Omega * (w - w_parent)^2)` over weights that an earlier update has the importance Omega of.

    `Omega <- max(0, Omega + path / (way^2 + damping))`. `path` sums `-g * (w_after - w_before)` over the steps, the
    part of the fall of the loss that is a weight's own, and `way` is from the parent's weight to the last. `g` is the
    gradient of the losses of rows, those of other methods included (`distill`), before penalties are added and before
    clipping: it is taken when `penalty` is asked for. Omega is loss by squared way, in nats; at a `weight` of 1, to go
    as far as the old update went costs about what that gained. The damping is no fixed number, as it is in the paper,
    but a part of the mean squared way, for those of LoRA and of whole weights differ a hundredfold.

    Every update adds to Omega and none takes away. A first update has nothing to protect. It keeps five more copies of
    what learns (four in a first update; one of them is in checkpoints), and one, in float32, in the version. With
    `early_stopping_steps` the path is that of all steps, the way that to the best weights.
    """

    def __init__(self, config: Config) -> None:
        self.weight = config.si.weight
        self.running: dict[str, Tensor] = {}
        self.found: dict[str, Tensor] = {}
        self._before: dict[str, tuple[Tensor, Tensor]] = {}

    def prepare(self, model: PreTrainedModel, state: dict[str, Tensor]) -> PreTrainedModel:
        """Returns `model` as it is, whose weights are noted; `state` is Omega by the names of the weights."""
        self.anchor = Anchor(model, state, "si")
        self.running |= {name: torch.zeros_like(start) for name, start in self.anchor.start.items()}
        return model

    def penalty(self, model: PreTrainedModel) -> Tensor | None:
        """The term, a scalar, or None where nothing is known to be of importance."""
        self._before = {
            name: (weight.detach().clone(), weight.grad.detach().clone())
            for name, weight in trained(model).items()
            if weight.grad is not None
        }
        pull = self.anchor.pull(model)
        return None if pull is None else 2 * self.weight * pull

    @torch.no_grad()
    def after_step(self, model: PreTrainedModel) -> None:
        """Add what the step has gained by each weight."""
        for name, weight in trained(model).items():
            if name in self._before:
                before, gradient = self._before.pop(name)
                self.running[name] = parted(self.running[name], weight).addcmul_(gradient, before - weight)

    @torch.no_grad()
    def after_training(self, model: PreTrainedModel, measure: Callable[[], Losses]) -> None:
        """Take stock now, while the weights are those that learned: they may be saved in fewer bits."""
        self.found = dict(self.anchor.importance or {})
        ways = {name: weight - self.anchor.start[name] for name, weight in trained(model).items()}
        total = sum(float(way.square().sum(dtype=torch.float64)) for way in ways.values())
        damping = DAMPING * total / max(1, sum(way.numel() for way in ways.values()))
        for name, way in ways.items() if damping else ():
            gained = self.running[name] / way.square_().add_(damping)
            self.found[name] = (self.found[name] + gained if name in self.found else gained).clamp_min_(0)

    def after_update(self, model: PreTrainedModel, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Omega by the names of the weights, in their shapes; those that did not learn now have their old one."""
        return {name: importance.cpu() for name, importance in self.found.items()}
