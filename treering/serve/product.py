"""Linear layers that read the same input, computed in one product."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

BATCH = 8
"""Weights are packed with a batch of so many tokens in mind; the layout serves other sizes as well."""


def product(layers: Sequence[nn.Linear]) -> Callable[[Tensor], Tensor]:
    """What computes all `layers`, their outputs side by side, for inference.

    Plain layers are emptied, so that only one copy of their weights stays; any other layer comes alone.
    """
    if not all(plain(layer) for layer in layers):
        (layer,) = layers
        return layer
    weight = torch.cat([layer.weight.detach() for layer in layers])
    biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
    bias = torch.cat(biases) if biases else None
    for layer in layers:
        layer.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)
        layer.register_parameter("bias", None)
    kernel = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if kernel is None or weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return lambda x: linear(x, weight, bias)
    # Else every call brings the weights into this layout, which takes as long as the product of a few rows.
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, BATCH)
    return lambda x: kernel(x, packed, bias, "none", [], "")


def plain(layer: nn.Module | None) -> bool:
    """Whether it is a linear layer and no more: not quantised, not adapted, its weights its own."""
    return type(layer) is nn.Linear
