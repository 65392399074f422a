"""Weights between the parent's and those that were trained: some of the new for most of the old.

WiSE-FT (Wortsman et al. 2022, arXiv:2109.01903), and patching (Ilharco et al. 2022, arXiv:2208.05592), which chooses
the share by what is gained on the new task and lost on the old ones.

LoRA's A and B are interpolated apart. With the parent's A and B and the changes dA and dB, their product at `share` is
the interpolated product less `share (1 - share) dB dA`: the ends are the same, the way between them bends, at most by
a quarter of dB dA. In the first update B begins at 0, and `dB (A + dA)` becomes `share dB (A + share dA)`: less than
`share` of it. What `auto` measures are the weights that it then takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from treering.config import Config
from treering.methods import Losses, trained

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARES = (1.0, 0.8, 0.6, 0.4, 0.2)
"""What `auto` chooses from; of equals it takes the first."""


class Interpolate:
    """`weights = parent + share (weights - parent)`, once, when training is over."""

    def __init__(self, config: Config) -> None:
        self.share = config.interpolate.share
        self.parent: dict[str, Tensor] = {}
        self.choices: dict[str, dict[str, Any]] = {}

    def prepare(self, model: PreTrainedModel, state: dict[str, Tensor]) -> PreTrainedModel:
        """Keep a copy of the weights as they are, in memory that a GPU need not spare."""
        self.parent = {name: weight.detach().to("cpu", copy=True) for name, weight in trained(model).items()}
        return model

    def after_training(self, model: PreTrainedModel, measure: Callable[[], Losses]) -> None:
        """Put the weights at the share that is set, or at the best."""
        learned = {name: weight.detach().to("cpu", copy=True) for name, weight in trained(model).items()}
        if self.share != "auto":
            self._put(model, learned, self.share)
            return
        found: dict[float, Losses] = {}
        for share in SHARES:
            self._put(model, learned, share)
            found[share] = measure()
            if not found[share].old:
                break
        best = min(found, key=lambda share: found[share].new + found[share].old)
        self._put(model, learned, best)
        self.choices["interpolate.share"] = {"value": best, "reason": _reason(found)}

    @torch.no_grad()
    def _put(self, model: PreTrainedModel, learned: dict[str, Tensor], share: float) -> None:
        """At 1 they are those learned, to the bit."""
        for name, weight in trained(model).items():
            weight.copy_(torch.lerp(self.parent[name], learned[name], share))


def _reason(found: dict[float, Losses]) -> str:
    if len(found) == 1:
        return "nothing is remembered yet that could be forgotten, so the weights stay as trained"
    told = ", ".join(f"{share:g}: {one.new:.3g} and {one.old:.3g}" for share, one in found.items())
    return f"lowest sum of the mean losses of new rows and of remembered ones; they are, for each share, {told}"
