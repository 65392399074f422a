"""LoRA layers that read the same input, in one product, with a backward pass that computes no more than is wanted.

peft adds an adapter to each layer on its own: small products, forward and backward, and casts between. Here the frozen
weights of sibling layers are one matrix, and so are their A. In bfloat16 it loses no small step to rounding.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from treering.model import TOGETHER

ADAPTER = "default"

ADDED = "added"
"""The adapter that learns beside a frozen `ADAPTER`, until the two are joined (`methods/stacking.py`)."""


def join(model: nn.Module) -> None:
    """Have the LoRA layers of `model` computed that way, where they are plain. Their parameters stay where they are."""
    for parent in list(model.modules()):
        left = {name: child for name, child in parent.named_children() if _plain(child)}
        for names in TOGETHER:
            layers = [cast(Linear, left[name]) for name in names if name in left]
            alike = {(layer.in_features, layer.r[ADAPTER], layer.scaling[ADAPTER]) for layer in layers}
            if len(layers) == len(names) and len(alike) == 1:
                _Group(layers)
                left = {name: child for name, child in left.items() if name not in names}
        for child in left.values():
            _Group([cast(Linear, child)])


def _plain(layer: nn.Module) -> bool:
    """Whether it is a linear layer and one LoRA adapter without anything more, and not in a group yet."""
    return (
        type(layer) is Linear
        and "forward" not in vars(layer)
        and type(layer.base_layer) is nn.Linear
        and layer.base_layer.bias is None
        and list(layer.lora_A) == [ADAPTER]
        and not layer.use_dora[ADAPTER]
        and not layer.lora_bias[ADAPTER]
        and isinstance(layer.lora_dropout[ADAPTER], nn.Identity)
    )


class _Group:
    """Layers of the same input. The first that is asked computes all; each thread has passes of its own.

    What it computed waits in one place for all groups, so that the next pass drops what one that failed has left there:
    with it goes the graph of that pass, which is large.
    """

    _pass = threading.local()

    def __init__(self, layers: Sequence[Linear]) -> None:
        self._layers = layers
        self._sizes = [layer.out_features for layer in layers]
        weights = [cast(Tensor, layer.base_layer.weight) for layer in layers]
        self._weight = torch.cat([weight.detach() for weight in weights])
        for at, (layer, weight, part) in enumerate(zip(layers, weights, self._weight.split(self._sizes), strict=True)):
            weight.data = part  # Only one copy stays.
            layer.forward = partial(self._output, at)  # type: ignore[method-assign]

    def _output(self, at: int, x: Tensor) -> Tensor:
        own = self._pass
        if getattr(own, "group", None) is not self or own.input is not x:
            own.group, own.input, own.outputs = self, x, self._compute(x).split(self._sizes, -1)
        found: Tensor = own.outputs[at]
        if at == len(self._layers) - 1:
            own.group = own.input = own.outputs = None
        return found

    def _compute(self, x: Tensor) -> Tensor:
        first = self._layers[0]
        if first.disable_adapters:
            return nn.functional.linear(x, self._weight)
        stacked = ADDED in first.lora_A
        learns = ADDED if stacked else ADAPTER
        a = [layer.lora_A[learns].weight for layer in self._layers]
        b = [layer.lora_B[learns].weight for layer in self._layers]
        frozen = [_scaled(layer, ADAPTER) for layer in self._layers] if stacked else []
        return cast(Tensor, _Product.apply(x, self._weight, self._sizes, first.scaling[learns], frozen, *a, *b))  # type: ignore[no-untyped-call]


def _scaled(layer: Linear, adapter: str) -> tuple[Tensor, Tensor]:
    """Its A `[rank, in]` and B `[out, rank]`, the scale in B."""
    a, b = (cast(Tensor, side[adapter].weight).detach() for side in (layer.lora_A, layer.lora_B))
    return a, b * layer.scaling[adapter]


class _Product(torch.autograd.Function):
    """`x W^T + scale (x A^T) B^T` of layers side by side: W `[outs, in]` is frozen; A `[rank, in]`, B `[out, rank]`.

    Where there are `frozen` A and B, the latter with their scale, each layer has its own before those that learn: they
    cost what they add to the product, but no gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        sizes: list[int],
        scale: float,
        frozen: list[tuple[Tensor, Tensor]],
        *pairs: Tensor,
    ) -> Tensor:
        """`x` `[..., in]` to `[..., outs]`."""
        count = len(sizes)
        flat = x.reshape(-1, x.shape[-1]).to(weight.dtype)
        rows, columns = list(pairs[:count]), [part * scale for part in pairs[count:]]
        ctx.old = len(frozen[0][0]) if frozen else 0
        if frozen:
            rows = [torch.cat([old, new]) for (old, _), new in zip(frozen, rows, strict=True)]
            columns = [torch.cat([old, new], 1) for (_, old), new in zip(frozen, columns, strict=True)]
        a = torch.cat(rows).to(weight.dtype)
        b = [part.to(weight.dtype) for part in columns]
        inner = flat @ a.T
        # What the adapters add comes first, and is rounded together with the rest: added to numbers that are rounded
        # already, the small steps of early training would all be lost in bfloat16.
        y: Tensor = inner @ torch.block_diag(*b).T
        y.addmm_(flat, weight.T)
        ctx.save_for_backward(flat, weight, a, inner, *b)
        ctx.sizes, ctx.scale, ctx.like = sizes, scale, pairs[0]
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Of `x`, if wanted, and of every A and B."""
        flat, weight, a, inner, *b = ctx.saved_tensors
        count = len(b)
        y = gradients[0].reshape(-1, gradients[0].shape[-1])
        outs = y.split(ctx.sizes, -1)
        inner_gradient = torch.cat([out @ side for out, side in zip(outs, b, strict=True)], -1)
        of_b = [
            (out.T @ part[:, ctx.old :]).to(ctx.like.dtype) * ctx.scale
            for out, part in zip(outs, inner.chunk(count, -1), strict=True)
        ]
        learned = inner_gradient.unflatten(-1, (count, -1))[..., ctx.old :].flatten(1)
        of_a = (learned.T @ flat).to(ctx.like.dtype).chunk(count)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (y @ weight).addmm_(inner_gradient, a).view(ctx.shape).to(ctx.dtype)
        return of_x, None, None, None, None, *of_a, *of_b
