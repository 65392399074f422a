"""L2 to the start: every weight is drawn back to the parent's (L2-SP; Li et al. 2018, arXiv:1802.01483)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from treering.config import Config
from treering.methods.anchor import Anchor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class L2:
    """Adds `weight / 2 * sum((w - w_parent)^2)` over all weights that learn.

    In a first update the start is the base model, or the new adapter, which changes nothing. It keeps one more copy of
    what learns, and nothing in the version.
    """

    def __init__(self, config: Config) -> None:
        self.weight = config.l2.weight

    def prepare(self, model: PreTrainedModel, state: dict[str, Tensor]) -> PreTrainedModel:
        """Returns `model` as it is, whose weights are noted."""
        self.anchor = Anchor(model, None, "l2")
        return model

    def penalty(self, model: PreTrainedModel) -> Tensor | None:
        """The term, a scalar."""
        pull = self.anchor.pull(model)
        return None if pull is None else self.weight * pull
