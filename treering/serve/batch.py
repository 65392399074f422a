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
        self._cache: list[tuple[Tensor, Tensor]] = []
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
            self._cache = [
                (_merged(old_keys, keys, length), _merged(old_values, values, length))
                for (old_keys, old_values), (keys, values) in zip(self._cache, new, strict=True)
            ]
            self._mask = torch.cat([pad_tensor(part, (length - part.shape[1], 0)) for part in (self._mask, mask)])
        else:
            self._cache, self._mask = new, mask
        self.rows += rows
        return logits

    @torch.inference_mode()
    def step(self) -> Tensor:
        """One token more for every running row."""
        ids = torch.tensor([[row.last] for row in self.rows], device=self.model.device)
        self._mask = pad_tensor(self._mask, (0, 1), value=1)
        cache = DynamicCache(ddp_cache_data=self._cache)
        logits = self._forward(self.rows, ids, self._mask, cache)
        self._cache = _tensors(cache)
        return logits

    def leave(self, gone: set[int]) -> None:
        """Rows at the places `gone` end; columns that only they needed go too."""
        kept = [at for at in range(len(self.rows)) if at not in gone]
        self.rows = [self.rows[at] for at in kept]
        index = torch.tensor(kept, dtype=torch.long, device=self.model.device)
        mask = self._mask[index]
        start = mask.shape[1] - int(mask.sum(1).max()) if kept else 0
        self._mask = mask[:, start:]
        self._cache = [(keys[index, :, start:], values[index, :, start:]) for keys, values in self._cache]

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


def _tensors(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in cast("list[Any]", cache.layers)]


def _merged(old: Tensor, new: Tensor, length: int) -> Tensor:
    """Both `[rows, heads, columns, size]`, padded on the left to `length` columns, one below the other."""
    return torch.cat([pad_tensor(part, (0, 0, length - part.shape[2], 0)) for part in (old, new)])
