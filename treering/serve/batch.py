"""Sequences that are decoded together: they join and leave between any two tokens.

The key-value cache is padded on the left, so that the next token of every row stands in the same column.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from treering.errors import ModelError
from treering.model import pad
from treering.serve.adapters import Slots

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")

SPARE = 64
"""Columns of keys and values that are reserved at once, so that not every token copies all those before."""


@dataclass
class Row(Generic[T]):
    """One sequence in a batch: its prompt, its adapter's slot, the token it goes on with, and whose it is."""

    owner: T
    prompt: list[int]
    slot: int = 0
    last: int = field(default=0, init=False)


class Batch(Generic[T]):
    """The running rows of one model.

    `join` reads new prompts, `step` goes on by one token; both return logits `[rows, vocabulary]`, float32, for the
    next token of the rows concerned. The caller writes the token it chose into `row.last`.

    Raises `ModelError` for a model whose cache is not made of keys and values of all tokens.
    """

    def __init__(self, model: PreTrainedModel, slots: Slots | None, pad_id: int) -> None:
        odd = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers} - {DynamicLayer.__name__}
        if odd:
            raise ModelError(
                f"{model.name_or_path or type(model).__name__} keeps {', '.join(sorted(odd))} from token to token, and "
                "this server can only join answers whose keys and values of all tokens are kept; serve its versions "
                "with another server (they are plain folders), or set model_name_or_path to a model with full attention"
            )
        self.model = model
        self.slots = slots
        self.rows: list[Row[T]] = []
        self._pad_id = pad_id
        self._cache = DynamicCache()
        self._mask = torch.zeros(0, 0, dtype=torch.long, device=model.device)

    @torch.inference_mode()
    def join(self, rows: list[Row[T]]) -> Tensor:
        """Read the prompts of `rows`, which run with the others from now on."""
        inputs = pad([row.prompt for row in rows], self._pad_id, left=True)
        mask = inputs["attention_mask"].to(self.model.device)
        cache = DynamicCache(config=self.model.config)
        logits = self._forward(rows, inputs["input_ids"].to(self.model.device), mask, cache)
        new = _tensors(cache)
        if self.rows:
            length = max(self._mask.shape[1], mask.shape[1])
            new = [
                (_merged(old_keys, keys, length), _merged(old_values, values, length))
                for (old_keys, old_values), (keys, values) in zip(_tensors(self._cache), new, strict=True)
            ]
            mask = torch.cat([pad_tensor(part, (length - part.shape[1], 0)) for part in (self._mask, mask)])
        self._cache, self._mask = _cache_of(new), mask
        self.rows += rows
        return logits

    @torch.inference_mode()
    def step(self) -> Tensor:
        """One token more for every running row."""
        ids = torch.tensor([[row.last] for row in self.rows], device=self.model.device)
        self._mask = pad_tensor(self._mask, (0, 1), value=1)
        return self._forward(self.rows, ids, self._mask, self._cache)

    def leave(self, gone: set[int]) -> None:
        """Rows at the places `gone` end; columns that only they needed go too."""
        kept = [at for at in range(len(self.rows)) if at not in gone]
        self.rows = [self.rows[at] for at in kept]
        index = torch.tensor(kept, dtype=torch.long, device=self.model.device)
        mask = self._mask[index]
        start = mask.shape[1] - int(mask.sum(1).max()) if kept else 0
        self._mask = mask[:, start:]
        self._cache = _cache_of(
            [(keys[index, :, start:], values[index, :, start:]) for keys, values in _tensors(self._cache)]
        )

    @torch.inference_mode()
    def embed(self, texts: list[list[int]], slot: int) -> Tensor:
        """Mean of the last hidden states of each text, `[texts, hidden]`, each of length one."""
        if self.slots is not None:
            self.slots.use([slot] * len(texts))
        inputs = {name: t.to(self.model.device) for name, t in pad(texts, self._pad_id).items()}
        hidden = cast(Any, self.model.get_decoder())(**inputs, use_cache=False).last_hidden_state.float()
        weight = inputs["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)

    def _forward(self, rows: list[Row[T]], ids: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        if self.slots is not None:
            self.slots.use([row.slot for row in rows])
        # Padding has no position of its own; its keys are masked.
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = cast(Any, self.model)(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return cast(Tensor, out.logits[:, -1].float())


class _Spacious(DynamicLayer):
    """Keys and values of a layer, in tensors with columns to spare."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        cast(Any, super()).__init__()
        self.lazy_initialization(keys, values)
        self._all_keys, self._all_values, self._length = keys, values, keys.shape[2]
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append columns; returns all."""
        start, end = self._length, self._length + key_states.shape[2]
        missing = end - self._all_keys.shape[2]
        if missing > 0:
            more = 0, 0, 0, missing + SPARE
            self._all_keys, self._all_values = pad_tensor(self._all_keys, more), pad_tensor(self._all_values, more)
        self._all_keys[:, :, start:end] = key_states
        self._all_values[:, :, start:end] = value_states
        self.keys, self.values, self._length = self._all_keys[:, :, :end], self._all_values[:, :, :end], end
        return self.keys, self.values


def _cache_of(tensors: list[tuple[Tensor, Tensor]]) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = [_Spacious(keys, values) for keys, values in tensors]
    return cache


def _tensors(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in cast("list[Any]", cache.layers)]


def _merged(old: Tensor, new: Tensor, length: int) -> Tensor:
    """Both `[rows, heads, columns, size]`, padded on the left to `length` columns, one below the other."""
    return torch.cat([pad_tensor(part, (0, 0, length - part.shape[2], 0)) for part in (old, new)])
