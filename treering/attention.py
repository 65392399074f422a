"""Attention as plain matrix products: on processors, the backward of fused kernels is several times slower.

Heads that share keys and values are computed in one product. A batch may be flat (`Layout`): then the tokens that all
its rows begin with are there once, and every row sees them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

NAME = "treering"


@dataclass(frozen=True)
class Layout:
    """One sequence in which `prefix` tokens stand before `rows` rows of `length` tokens, padded on the right."""

    prefix: int
    rows: int
    length: int


LAYOUT: ContextVar[Layout | None] = ContextVar("LAYOUT", default=None)
"""How the sequence of this forward pass is laid out; None: a batch as usual, with a mask."""


@contextmanager
def laid_out(layout: Layout | None) -> Iterator[None]:
    """What is computed inside is laid out so."""
    token = LAYOUT.set(layout)
    try:
        yield
    finally:
        LAYOUT.reset(token)


def recomputed() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For `torch.utils.checkpoint`: what runs again in the backward pass, on whatever thread, is laid out as before."""
    return nullcontext(), laid_out(LAYOUT.get())


def suits(config: Any) -> bool:
    """Whether a model's attention is no more than softmax over all earlier tokens, by its `config`."""
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    odd = ("sliding_window", "attn_logit_softcapping", "attention_chunk_size", "attention_dropout")
    return layers == {"full_attention"} and not any(getattr(config, name, None) for name in odd)


def attend(
    _: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **__: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: `query` `[batch, heads, length, size]`, fewer heads in `key` and `value`.

    Returns `[batch, length, heads, size]`.
    """
    layout = LAYOUT.get()
    found = (
        _masked(query, key, value, attention_mask, scaling)
        if layout is None
        else _flat(query, key, value, layout, scaling)
    )
    return found.contiguous(), None


def _masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    groups, length = query.shape[1] // key.shape[1], query.shape[2]
    grouped = query.unflatten(1, (-1, groups)).flatten(2, 3)
    scores = (grouped @ key.mT).unflatten(2, (groups, length)) * scaling
    if mask is not None:
        scores = scores + mask[:, :, None, :, : key.shape[2]]
    weights = _softmax(scores, query.dtype)
    found = (weights.flatten(2, 3) @ value).unflatten(2, (groups, length))
    return cast(Tensor, found).flatten(1, 2).transpose(1, 2)


def _flat(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float) -> Tensor:
    prefix, rows, length = layout.prefix, layout.rows, layout.length
    k, v = key[0], value[0]  # [key heads, tokens, size]
    q = query[0].unflatten(0, (len(k), -1)) * scaling  # [key heads, heads to each, tokens, size]
    own_k, own_v = (part[:, prefix:].unflatten(1, (rows, length)) for part in (k, v))
    own_q = (
        q[:, :, prefix:].unflatten(2, (rows, length)).transpose(1, 2)
    )  # [key heads, rows, heads to each, length, size]
    asked = own_q.flatten(2, 3)
    scores = _causal((asked @ own_k.mT).unflatten(2, own_q.shape[2:4]))
    if prefix:
        before = (asked.flatten(1, 2) @ k[:, :prefix].mT).view(*own_q.shape[:4], prefix)
        scores = torch.cat([before, scores], -1)
    weights = _softmax(scores, query.dtype).flatten(2, 3)
    found = weights[..., prefix:] @ own_v
    if prefix:
        found = found + (weights[..., :prefix].flatten(1, 2) @ v[:, :prefix]).view_as(found)
    found = found.unflatten(2, own_q.shape[2:4]).permute(1, 3, 0, 2, 4).flatten(2, 3).flatten(0, 1)
    if prefix:
        first = q[:, :, :prefix]
        scores = _causal((first.flatten(1, 2) @ k[:, :prefix].mT).unflatten(1, first.shape[1:3]))
        begun = (_softmax(scores, query.dtype).flatten(1, 2) @ v[:, :prefix]).view_as(first)
        found = torch.cat([begun.permute(2, 0, 1, 3).flatten(1, 2), found])
    return cast(Tensor, found[None])


def _causal(scores: Tensor) -> Tensor:
    """Nothing of what comes later; `scores` is `[..., length, length]`."""
    length = scores.shape[-1]
    later = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(later, float("-inf"))


def _softmax(scores: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.softmax(scores, -1, dtype=torch.float32).to(dtype)


def _mask(*arguments: Any, **settings: Any) -> Tensor | None:
    """A flat batch needs none."""
    return eager_mask(*arguments, **settings) if LAYOUT.get() is None else None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _mask)
