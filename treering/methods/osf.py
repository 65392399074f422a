"""OSF: weights learn in the directions that they use least (OSFT; Nayak et al. 2025, arXiv:2504.07097).

What a model knows lies mostly in the large singular values of its weights. Each linear layer's `W = U S V` is split:
the `effective_rank` largest singular values keep their values and directions, and only what is orthogonal to these, in
and out, may change: `U_high^T W` and `W V_high^T` stay. peft's OSF learns the rest as three factors, which can become
all matrices of that kind and no other. So here W learns itself and is projected, and a version is a plain transformers
folder. The next update splits its parent's weights anew, as the paper does for each task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.osf.utils import decompose_weight_matrix
from torch import Tensor, nn

from treering.config import Config
from treering.errors import ConfigError
from treering.sharding import parted, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from treering.methods import Losses


@dataclass(frozen=True)
class _High:
    """What of a weight `[out, in]` stays: `u` `[out, k]`, `s` `[k]` and `v` `[k, in]`, its largest singular values."""

    u: Tensor
    s: Tensor
    v: Tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> _High:
        return self  # As large as the model, and never changed.

    def without(self, gradient: Tensor) -> Tensor:
        """`gradient` without what would change that."""
        gradient = gradient - self.u @ (self.u.T @ gradient)
        return gradient - (gradient @ self.v.T) @ self.v

    def restored(self, weight: Tensor) -> Tensor:
        """`weight` with that as it was, and the rest as it is."""
        weight = weight - self.u @ (self.u.T @ weight - self.s[:, None] * self.v)
        return weight - (weight @ self.v.T - self.u * self.s) @ self.v


class OSF:
    """Trains linear layers, all but the output layer, outside of what they use most."""

    def __init__(self, config: Config) -> None:
        self.rank = config.osf.effective_rank
        self.high: dict[str, _High] = {}

    def prepare(self, model: PreTrainedModel, state: dict[str, Tensor]) -> PreTrainedModel:
        """Returns the model with its linear weights in float32 and trained, everything else frozen.

        Raises `ConfigError` where `effective_rank` leaves nothing to learn.
        """
        model.requires_grad_(False)
        for name, layer in _linear(model):
            smaller = min(layer.weight.shape)
            rank = max(1, int(smaller * self.rank) if isinstance(self.rank, float) else self.rank)
            if rank >= smaller:
                continue
            layer.weight.data = layer.weight.data.float()
            parts = decompose_weight_matrix(layer.weight.data, rank)
            high = self.high[f"{name}.weight"] = _High(parts["U_high"], parts["S_high"], parts["V_high"])
            layer.weight.requires_grad_(True).register_hook(high.without)
        if not self.high:
            raise ConfigError(
                f"osf.effective_rank is {self.rank}, which is all that any linear layer of the model has: "
                "lower it, or set a share such as 0.5"
            )
        return model

    def after_step(self, model: PreTrainedModel) -> None:
        """Undo what optimisers do outside of the gradient: AdamW scales each number, decay shrinks all."""
        self._restore(model)

    def after_training(self, model: PreTrainedModel, measure: Callable[[], Losses]) -> None:
        """Once more for optimisers that have put an average in place."""
        self._restore(model)

    @torch.no_grad()
    def _restore(self, model: PreTrainedModel) -> None:
        weights = dict(model.named_parameters())
        for name, high in self.high.items():
            weights[name].copy_(parted(high.restored(whole(weights[name])), weights[name]))


def _linear(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    output = model.get_output_embeddings()
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and layer is not output:
            yield name, layer
