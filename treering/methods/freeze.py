"""Partial freezing: a few decoder layers learn, whole or in part; the rest stays.

Which ones is a matter of their place, or of how important each was to what was learned before: the diagonal of the
Fisher information (Kirkpatrick et al. 2017, arXiv:1612.00796), summed over a layer and over all updates so far (as
online EWC; Schwarz et al. 2018, arXiv:1805.06370). An optimiser that moves all weights about as far costs old rows in
proportion to that sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from treering import scaling
from treering.config import Config, names
from treering.errors import ConfigError
from treering.model import compute, decoder_layers, logits_at, precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from treering.batches import Batch

ROWS = 64
"""New rows that importance is measured on at most; each costs about as much as a row of training."""

IMPORTANCE = "importance."
"""What is kept: for each part of a layer (`importance.mlp`) the importance of every layer, `[layers]`, float64."""


class Freeze:
    """Trains `freeze_trainable_layers` layers, or what `freeze_trainable_modules` names of them."""

    def __init__(self, config: Config) -> None:
        self.layers, self.by = config.freeze_trainable_layers, config.freeze_by
        self.parts = [] if config.freeze_trainable_modules == "all" else names(config.freeze_trainable_modules)
        self.dtype, _ = precision(config)
        self.known: dict[str, Tensor] = {}
        self.choices: dict[str, dict[str, Any]] = {}

    def prepare(self, model: PreTrainedModel, state: dict[str, Tensor]) -> PreTrainedModel:
        """Returns the model with what was chosen in float32 and trained, everything else frozen."""
        model.requires_grad_(False)
        stack = list(decoder_layers(model))
        if abs(self.layers) > len(stack):
            raise ConfigError(f"freeze_trainable_layers is {self.layers}, but the model has {len(stack)} layers")
        self.known = {key: tensor.cpu() for key, tensor in state.items() if key.startswith(IMPORTANCE)}
        parts = [self._parts(layer) for layer in stack]
        for number in self._chosen(len(stack)):
            for part in parts[number]:
                part.float().requires_grad_(True)
        return model

    def after_update(self, model: PreTrainedModel, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """With `freeze_by: importance`, what was known, and that of the new rows added to it."""
        if self.by == "position":
            return {}
        found = importance(model, batches, self.dtype)
        return {key: tensor + self.known.get(key, 0) for key, tensor in found.items()}

    def _parts(self, layer: nn.Module) -> list[nn.Module]:
        children = {name: part for name, part in layer.named_children() if any(True for _ in part.parameters())}
        for name in self.parts:
            if name not in children:
                raise ConfigError(
                    f"freeze_trainable_modules names {name!r}, but a layer of the model has {', '.join(children)}"
                )
        return [children[name] for name in self.parts] or [layer]

    def _chosen(self, count: int) -> list[int]:
        numbers = list(range(count))
        by_place = numbers[-self.layers :] if self.layers > 0 else numbers[: -self.layers]
        if self.by == "position":
            return by_place
        if self.known:
            wanted = [IMPORTANCE + name for name in self.parts] or list(self.known)
            by_layer = torch.stack([self.known[key] for key in wanted]).sum(0)
            chosen = sorted(by_layer.argsort(stable=True)[: abs(self.layers)].tolist())
            share = float(by_layer[chosen].sum()) / (float(by_layer.sum()) or 1.0)
            reason = f"least important to the rows learned before: {share:.1%} of the importance of all {count} layers"
        else:
            chosen, reason = by_place, "by position: no update before kept the importance of layers"
        self.choices = {"freeze_trainable_layers": {"value": chosen, "reason": reason}}
        return chosen


def importance(model: PreTrainedModel, batches: Sequence[Batch], dtype: torch.dtype) -> dict[str, Tensor]:
    """By part and layer the sum over rows of `(d log p(answer) / d weight)^2`, summed over the weights there.

    `batches` are rows, each alone; of many, `ROWS` at most are taken, at even distances, and stand for the others.
    """
    taken = batches[:: max(1, math.ceil(len(batches) / ROWS))]
    model.eval()
    scale = scaling.first(dtype)
    with _measured(model) as found:
        sums = {key: torch.zeros_like(tensor) for key, tensor in found.items()}
        for batch in taken:
            with compute(batch.targets.device, dtype):
                logits = logits_at(model, **batch.inputs, at=batch.at)
            loss = cross_entropy(logits, batch.targets, reduction="sum")
            scale, _ = scaling.finite(scale, partial(_backward, loss, list(found.values())))
            for key, tensor in found.items():
                sums[key] += tensor / scale**2
    return {key: tensor * (len(batches) / max(1, len(taken))) for key, tensor in sums.items()}


def _backward(loss: Tensor, found: Sequence[Tensor], scale: float) -> Sequence[Tensor]:
    """`found` as a backward pass of `loss` at `scale` leaves it (`_measured`)."""
    for tensor in found:
        tensor.zero_()
    (scale * loss).backward(retain_graph=scale > scaling.LEAST)  # Only what may have to be done again keeps its graph.
    return found


@contextmanager
def _measured(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """Inside, every backward pass adds to what is yielded, and leaves no gradients: the room of one weight will do."""
    stack, found, hooks = decoder_layers(model), dict[str, Tensor](), []
    learned = {weight: weight.requires_grad for weight in model.parameters()}
    model.requires_grad_(False)
    for number, layer in enumerate(stack):
        for name, part in layer.named_children():
            for weight in part.parameters():
                total = found.setdefault(IMPORTANCE + name, torch.zeros(len(stack), dtype=torch.float64))
                weight.requires_grad_(True)
                hooks.append(weight.register_post_accumulate_grad_hook(partial(_add, total, number)))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
        for weight, learns in learned.items():
            weight.requires_grad_(learns)


def _add(total: Tensor, number: int, weight: Tensor) -> None:
    assert weight.grad is not None
    total[number] += weight.grad.double().square().sum().cpu()
    weight.grad = None
