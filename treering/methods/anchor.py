"""The weights that an update begins with, and a pull back to them: what `ewc`, `l2` and `si` have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from treering.errors import ConfigError
from treering.methods import trained
from treering.sharding import parted, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Anchor:
    """The weights that learn as they are now, `start`, and how much each number in them counts, `importance`.

    Both by name, in the shapes of the weights; `importance` may have names of weights that do not learn now, which are
    kept as they are, and None counts every number once. Raises `ConfigError`, which names `method`, for another shape.
    """

    def __init__(self, model: PreTrainedModel, importance: Mapping[str, Tensor] | None, method: str) -> None:
        learns = trained(model)
        self.start = {name: weight.detach().clone() for name, weight in learns.items()}
        self.importance = None if importance is None else dict(importance)
        check_shapes(importance or {}, learns, method)
        for name, known in (importance or {}).items():
            if name in learns:
                cast("dict[str, Tensor]", self.importance)[name] = known.to(learns[name].device)

    def pull(self, model: PreTrainedModel) -> Tensor | None:
        """Half the sum over all numbers of `importance * (weight - start)^2`; None where nothing is of importance.

        LoRA's A and B are numbers like others here: each is drawn to what it was, not their product.
        """
        parts = []
        for name, weight in trained(model).items():
            if self.importance is not None and name not in self.importance:
                continue
            # Once the weights are in shards, so is what belongs to them.
            self.start[name] = parted(self.start[name], weight)
            if self.importance is not None:
                self.importance[name] = parted(self.importance[name], weight)
            counts = None if self.importance is None else self.importance[name]
            parts.append(cast(Tensor, _Pull.apply(weight, self.start[name], counts)))  # type: ignore[no-untyped-call]
        return whole(torch.stack(parts).sum()) if parts else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Anchor:
        """Itself, for its numbers never change: the range test copies methods, and it is as large as what learns."""
        return self


def check_shapes(kept: Mapping[str, Tensor], learns: Mapping[str, Tensor], method: str) -> None:
    """Raise `ConfigError`, which names `method`, where what it `kept` of a weight has not the shape of that weight."""
    for name, known in kept.items():
        if name in learns and known.shape != learns[name].shape:
            raise ConfigError(
                f"protect has {method}, but the parent version's {method} is of another model: {name} is "
                f"{list(known.shape)} there and {list(learns[name].shape)} here; drop {method} from protect for "
                "one update, or start a new workspace"
            )


class _Pull(torch.autograd.Function):
    """`sum(importance * (weight - start)^2) / 2`. For its backward it keeps nothing that is not there anyway."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, start: Tensor, importance: Tensor | None) -> Tensor:
        """All of one shape; to a scalar."""
        ctx.save_for_backward(weight, start, importance)
        square = (weight - start).square_()
        return (square if importance is None else square.mul_(importance)).sum() / 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Of the weight."""
        weight, start, importance = ctx.saved_tensors
        away = (weight - start).mul_(gradients[0])
        return away if importance is None else away.mul_(importance), None, None
