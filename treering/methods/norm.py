"""Layer norms and biases learn, all matrices stay (LN-tuning; Zhao et al. 2023, arXiv:2312.11420; BitFit; Ben Zaken et
al. 2021, arXiv:2106.10199).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from treering.config import Config
from treering.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Norm:
    """Trains the vectors of all norms, and every bias where the model has any."""

    def __init__(self, config: Config) -> None:
        pass

    def prepare(self, model: PreTrainedModel, state: dict[str, Tensor]) -> PreTrainedModel:
        """Returns the model with those in float32 and trained, everything else frozen.

        Raises `ConfigError` for a model that has none.
        """
        model.requires_grad_(False)
        chosen = [
            weight
            for module in model.modules()
            for name, weight in module.named_parameters(recurse=False)
            if weight.ndim == 1 and (name == "bias" or _is_norm(module))
        ]
        if not chosen:
            raise ConfigError(
                "finetuning_type is norm, but the model's norms have no weights, and it has no biases: take lora"
            )
        for weight in chosen:
            weight.data = weight.data.float()
            weight.requires_grad_(True)
        return model


def _is_norm(module: nn.Module) -> bool:
    """Whether it is a norm of any make (`LayerNorm`, `LlamaRMSNorm`): they have nothing in common but the name."""
    return "norm" in type(module).__name__.lower()
