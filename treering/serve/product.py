"""Linear layers that read the same input, computed in one product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

BATCH = 8
"""Weights are packed with a batch of so many tokens in mind; the layout serves other sizes as well."""


Product = Callable[[Tensor, Tensor | None], Tensor]
"""Of `x` `[rows, length, in]`, and of what is to be added, `[rows, length, out]`, before the sum is rounded."""


def product(layers: Sequence[nn.Linear]) -> Product:
    """What computes all `layers`, their outputs side by side, for inference.

    Plain layers are emptied, so that only one copy of their weights stays; any other layer comes alone.
    """
    if not all(plain(layer) for layer in layers):
        (layer,) = layers
        return lambda x, added: layer(x) if added is None else layer(x) + added
    weight = torch.cat([layer.weight.detach() for layer in layers])
    biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
    bias = torch.cat(biases) if biases else None
    for layer in layers:
        layer.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)
        layer.register_parameter("bias", None)
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    if on_cpu and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        # Else every call brings the weights into this layout, which takes as long as the product of a few rows.
        return partial(_packed, torch.ops.mkldnn._reorder_linear_weight(weight, BATCH), bias)
    return partial(_product, weight, bias)


def _product(weight: Tensor, bias: Tensor | None, x: Tensor, added: Tensor | None) -> Tensor:
    if added is None:
        return linear(x, weight, bias)
    added = added if bias is None else added + bias
    return torch.addmm(added.flatten(0, 1), x.flatten(0, 1), weight.T).view_as(added)


def _packed(packed: Tensor, bias: Tensor | None, x: Tensor, added: Tensor | None) -> Tensor:
    kernel = torch.ops.mkldnn._linear_pointwise
    found = kernel(x, packed, bias, "none", [], "") if added is None else kernel.binary(x, added, packed, bias, "add")
    return cast(Tensor, found)


def plain(layer: nn.Module | None) -> bool:
    """Whether it is a linear layer and no more: not quantised, not adapted, its weights its own."""
    return type(layer) is nn.Linear
