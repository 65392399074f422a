"""Partial freezing: the last (or first) few decoder layers learn, the rest stays."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from treering.config import Config
from treering.errors import ConfigError
from treering.model import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Freeze:
    """Trains `freeze_trainable_layers` layers, counted from the last (positive) or the first (negative)."""

    def __init__(self, config: Config) -> None:
        self.layers = config.freeze_trainable_layers

    def prepare(self, model: PreTrainedModel, state: dict[str, Tensor]) -> PreTrainedModel:
        """Returns the model with the chosen layers in float32 and trained, everything else frozen."""
        model.requires_grad_(False)
        stack = decoder_layers(model)
        if abs(self.layers) > len(stack):
            raise ConfigError(f"freeze_trainable_layers is {self.layers}, but the model has {len(stack)} layers")
        chosen = list(stack)[-self.layers :] if self.layers > 0 else list(stack)[: -self.layers]
        for layer in chosen:
            layer.float().requires_grad_(True)
        return model
