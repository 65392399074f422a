"""Bottleneck adapters on frozen weights: serial (Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2020,
arXiv:2005.00247) or parallel (He et al. 2021, arXiv:2110.04366); `treering/bottleneck.py` has them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from treering.bottleneck import SCALES, Kind, attach, kind, weights
from treering.config import Config
from treering.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Adapter:
    """Adds adapters, or goes on with those that the parent version has."""

    def __init__(self, config: Config) -> None:
        self.size, self.placement = config.adapter_size, config.adapter_placement

    def prepare(self, model: PreTrainedModel, state: dict[str, Tensor]) -> PreTrainedModel:
        """Returns the model with its adapters in float32, which alone learn.

        Raises `ConfigError` where the parent's are others, and for a model that has no place for them.
        """
        found = kind(model)
        if found is None:
            attach(model, Kind(self.size, self.placement, SCALES[self.placement]))
        else:
            self._check(found)
        model.requires_grad_(False)
        for weight in weights(model).values():
            weight.data = weight.data.float()
            weight.requires_grad_(True)
        return model

    def _check(self, made: Kind) -> None:
        for key, wanted, found in (("size", self.size, made.size), ("placement", self.placement, made.placement)):
            if wanted != found:
                raise ConfigError(
                    f"adapter_{key} is {wanted}, but the parent version's adapter was made with {found}: "
                    f"set adapter_{key}: {found}, or start a new workspace"
                )
