"""O-LoRA: what an update adds reads the input in directions orthogonal to those that earlier updates read.

After Wang et al. 2023 (arXiv:2310.14152): the rows of A span the directions of the input that an adapter reacts to.
What is stacked learns beside the frozen A of earlier updates, and is kept orthogonal to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from treering.config import Config
from treering.methods import stacking

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class OLoRA:
    """Adds `weight * sum |A_old A_new^T|^2` over all layers with an adapter."""

    def __init__(self, config: Config) -> None:
        self.weight = config.olora.weight

    def penalty(self, model: PreTrainedModel) -> Tensor | None:
        """The term, or None while there is nothing before what learns."""
        overlaps = [(old @ new.T).square().sum() for _, (old, _), (new, _) in stacking.pairs(model)]
        return self.weight * torch.stack(overlaps).sum() if overlaps else None
