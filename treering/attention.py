"""Attention as plain matrix products: on processors, the backward of fused kernels is several times slower.

Heads that share keys and values are computed in one product. A batch may be flat (`Layout`): then the tokens that all
its rows begin with are there once, and every row sees them. Or it goes on along many paths of a tree (`Paths`), some
of whose tokens were read before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
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


@dataclass
class Kept:
    """Keys and values of all tokens read so far: for each layer two tensors `[key heads, tokens, size]`."""

    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def grown(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All of them, with those of the new tokens."""
        before = self.layers.get(layer)
        pairs = zip(before, (key, value), strict=True) if before else ()
        # Values are a view of a product that also has queries and keys; a copy lets go of those.
        now = tuple(torch.cat(pair, 1) for pair in pairs) or (key.contiguous(), value.contiguous())
        self.layers[layer] = cast("tuple[Tensor, Tensor]", now)
        return self.layers[layer]


@dataclass(frozen=True)
class Paths:
    """One sequence of new tokens, each of which goes on along one of several paths of tokens.

    The first `prefix` of all tokens ever read are on every path; `begun` says how many of these are new (all, or none).
    `keys` `[paths, n]` are the other tokens of a path, by their number among all tokens; `queries` `[paths, m]` those
    of its tokens that are new, by their number in this sequence; both padded with any. `hidden` `[paths, 1, m, n]` says
    which keys a query does not see. `own` are the places of the sequence's tokens, less `begun`, in `queries`, flat.
    """

    prefix: int
    begun: int
    keys: Tensor
    queries: Tensor
    hidden: Tensor
    own: Tensor
    kept: Kept | None
    """Where keys and values go, and those of earlier passes are; None: this is the first pass and the last."""


LAYOUT: ContextVar[Layout | Paths | None] = ContextVar("LAYOUT", default=None)
"""How the sequence of this forward pass is laid out; None: a batch as usual, with a mask."""


@contextmanager
def laid_out(layout: Layout | Paths | None) -> Iterator[None]:
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
    module: torch.nn.Module,
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
    if layout is None:
        found = _masked(query, key, value, attention_mask, scaling)
    elif isinstance(layout, Layout):
        found = _flat(query, key, value, layout, scaling)
    else:
        found = _along(query, key, value, layout, scaling, cast(int, module.layer_idx))
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
    own_q = q[:, :, prefix:].unflatten(2, (rows, length)).transpose(1, 2)
    later = _later(length, q.device)
    found = _rows(own_q, own_k, own_v, k[:, :prefix], v[:, :prefix], later).flatten(0, 1)
    return torch.cat([_first(q[:, :, :prefix], k, v), found])[None] if prefix else found[None]


def _along(query: Tensor, key: Tensor, value: Tensor, paths: Paths, scaling: float, layer: int) -> Tensor:
    prefix, begun = paths.prefix, paths.begun
    k, v = (key[0], value[0]) if paths.kept is None else paths.kept.grown(layer, key[0], value[0])
    q = query[0].unflatten(0, (len(k), -1)) * scaling
    own_q = q[:, :, paths.queries].transpose(1, 2)
    found = _rows(own_q, k[:, paths.keys], v[:, paths.keys], k[:, :prefix], v[:, :prefix], paths.hidden)
    found = found.flatten(0, 1)[paths.own]
    return torch.cat([_first(q[:, :, :begun], k, v), found])[None] if begun else found[None]


def _rows(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, hidden: Tensor) -> Tensor:
    """Rows that see a prefix and each its own tokens; returns `[rows, length, heads, size]`.

    `q` `[key heads, rows, heads to each, length, size]`; `k` and `v` `[key heads, rows, n, size]`, of which `hidden`
    is not seen; the prefix's `[key heads, prefix, size]`.
    """
    prefix, asked = prefix_k.shape[1], q.flatten(2, 3)
    scores = (asked @ k.mT).unflatten(2, q.shape[2:4]).masked_fill(hidden, float("-inf"))
    if prefix:
        before = (asked.flatten(1, 2) @ prefix_k.mT).view(*q.shape[:4], prefix)
        scores = torch.cat([before, scores], -1)
    weights = _softmax(scores, q.dtype).flatten(2, 3)
    found = weights[..., prefix:] @ v
    if prefix:
        found = found + (weights[..., :prefix].flatten(1, 2) @ prefix_v).view_as(found)
    return cast(Tensor, found.unflatten(2, q.shape[2:4]).permute(1, 3, 0, 2, 4).flatten(2, 3))


def _first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What the prefix makes of itself: `q` `[key heads, heads to each, prefix, size]` to `[prefix, heads, size]`."""
    prefix = q.shape[2]
    scores = (q.flatten(1, 2) @ k[:, :prefix].mT).unflatten(1, q.shape[1:3])
    scores = scores.masked_fill(_later(prefix, q.device), float("-inf"))
    found = (_softmax(scores, q.dtype).flatten(1, 2) @ v[:, :prefix]).view_as(q)
    return found.permute(2, 0, 1, 3).flatten(1, 2)


def _later(length: int, device: torch.device) -> Tensor:
    """Which of `length` tokens come after each, `[length, length]`."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)


def _softmax(scores: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.softmax(scores, -1, dtype=torch.float32).to(dtype)


def _mask(*arguments: Any, **settings: Any) -> Tensor | None:
    """A flat batch needs none."""
    if LAYOUT.get() is not None:
        return None
    # What hides a key is the lowest number there is. Half of it hides as well, and stays finite with a score added: in
    # float16 padding, which sees nothing, would have infinite scores alone, and be NaN.
    found = eager_mask(*arguments, **settings)
    return None if found is None else found / 2


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _mask)
