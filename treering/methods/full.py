"""Full fine-tuning: every weight learns, kept in float32 while it does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from treering.config import Config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Full:
    """Trains all weights."""

    def __init__(self, config: Config) -> None:
        pass

    def prepare(self, model: PreTrainedModel, state: dict[str, Tensor]) -> PreTrainedModel:
        """Returns the model in float32, all of it trained: bfloat16 would swallow small steps."""
        model.float()
        model.requires_grad_(True)
        return model
