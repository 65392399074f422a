"""Sequences that are decoded together: they join and leave between any two tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from treering.errors import ModelError, no_memory
from treering.model import pad
from treering.serve.adapters import Slots
from treering.serve.cache import joined, made
from treering.serve.past import Past, Read
from treering.serve.threads import worth

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")


@dataclass
class Row(Generic[T]):
    """One sequence in a batch: whose it is, its prompt, its adapter's slot, the token it goes on with, those before."""

    owner: T
    prompt: list[int]
    slot: int = 0
    last: int = field(default=0, init=False)
    written: list[int] = field(default_factory=list, init=False)


@dataclass
class _Part(Generic[T]):
    """Sequences side by side, padded on the left: their next tokens stand in one column.

    `mask` is `[rows, columns]` and says where there is a token; `cache` has the keys and values of the columns read;
    `left`, `[rows, columns]`, are the tokens that are still to be read.
    """

    rows: list[Row[T]]
    mask: Tensor
    cache: DynamicCache
    left: Tensor

    def cut(self, columns: int) -> None:
        """Forget all keys and values but those of the first `columns`."""
        self.cache = made(self.cache, lambda tensor: tensor[:, :, :columns]) if columns else DynamicCache()

    def drop(self, gone: Callable[[Row[T]], bool]) -> None:
        """Rows that are `gone` end; columns that only they needed go too."""
        kept = [at for at, row in enumerate(self.rows) if not gone(row)]
        if len(kept) == len(self.rows):
            return
        index = torch.tensor(kept, dtype=torch.long, device=self.mask.device)
        self.rows = [self.rows[at] for at in kept]
        self.mask = self.mask[index]
        start = self.mask.shape[1] - int(self.mask.sum(1).max()) if kept else 0
        self.mask = self.mask[:, start:]
        self.left = self.left[index, max(self.left.shape[1] - self.mask.shape[1], 0) :]
        self.cache = made(self.cache, lambda tensor: tensor[index, :, start:])


class Batch(Generic[T]):
    """The running rows of one model.

    Those that `join` have their prompts read by calls of `read`, and run from then on; `step` goes on by one token.
    Both return rows and logits `[rows, vocabulary]`, float32, for their next tokens. The caller writes the token it
    chose into `row.last`. Where one of them raises, the rows stay as they were before.

    The beginning that a prompt has in common with what a running row, or one that left not long ago, has read with the
    same slot is not read again; `forget` when another adapter comes into a slot.

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
        self._pad_id = pad_id
        self._parameters = sum(parameter.numel() for parameter in model.parameters())
        self._running: _Part[T] | None = None
        self._reading: deque[_Part[T]] = deque()
        self._past = Past()

    @property
    def running(self) -> list[Row[T]]:
        """Rows that `step` goes on with."""
        return self._running.rows if self._running else []

    @property
    def reading(self) -> list[Row[T]]:
        """Those whose prompts `read` goes on with."""
        return self._reading[0].rows if self._reading else []

    @property
    def rows(self) -> list[Row[T]]:
        """All, with those whose prompts are still to be read."""
        return [*self.running, *(row for part in self._reading for row in part.rows)]

    def unread(self, row: Row[T]) -> int:
        """How many tokens of a prompt would have to be read, at least one."""
        return len(row.prompt) - self._known(row)[0]

    def join(self, rows: list[Row[T]]) -> None:
        """Take in `rows`; their prompts are read side by side."""
        inputs = pad([row.prompt for row in rows], self._pad_id, left=True)
        ids, mask = (inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask"))
        known = [self._known(row) for row in rows]
        unread = max(len(row.prompt) - count for row, (count, _) in zip(rows, known, strict=True))
        sources = {to: read for to, (_, read) in enumerate(known) if read and len(rows[to].prompt) > unread}
        cache = DynamicCache(config=self.model.config)
        if sources:

            def copied(tensors: list[Tensor]) -> Tensor:
                _, heads, _, size = tensors[0].shape
                copy = tensors[0].new_zeros(len(rows), heads, mask.shape[1] - unread, size)
                for tensor, (to, read) in zip(tensors, sources.items(), strict=True):
                    count = len(rows[to].prompt) - unread
                    copy[to, :, -count:] = tensor[read.at, :, read.start : read.start + count]
                return copy

            cache = joined([read.cache for read in sources.values()], copied)
        self._reading.append(_Part(rows, mask, cache, ids[:, -unread:]))

    def _known(self, row: Row[T]) -> tuple[int, Read | None]:
        """How many of the tokens of `row` were read before, and in what."""
        best: tuple[int, Read | None] = 0, None
        for read in (*self._now(), *self._past):
            count = read.common(row.prompt, row.slot)
            if count > best[0]:
                best = count, read
        return best

    def _now(self) -> Iterator[Read]:
        """What the running rows have read."""
        if self._running is not None:
            starts = (self._running.mask.shape[1] - self._running.mask.sum(1)).tolist()
            for at, (row, start) in enumerate(zip(self._running.rows, starts, strict=True)):
                yield Read([*row.prompt, *row.written], row.slot, self._running.cache, at, start)

    def forget(self, slot: int | None = None) -> bool:
        """Let go of what rows that left had read, with `slot` or with any; whether there was anything."""
        return self._past.forget(lambda read: slot in (None, read.slot))

    @torch.inference_mode()
    def read(self, tokens: int) -> tuple[list[Row[T]], Tensor | None]:
        """Read on in the prompts of those that joined together, `tokens` of them in all; then it is others' turn.

        The logits come when they are read, and None before.
        """
        part = self._reading[0]
        count = max(tokens // len(part.rows), 1)
        ids, left = part.left[:, :count], part.left[:, count:]
        mask = part.mask[:, : part.mask.shape[1] - left.shape[1]]
        logits = self._forward(part, ids, mask)
        before, part.left = part.left, left
        if left.shape[1]:
            self._reading.rotate(-1)
            return part.rows, None
        try:
            self._running = _below(self._running, part)
        except Exception:
            part.left = before  # The same slice is read again.
            part.cut(mask.shape[1] - ids.shape[1])
            raise
        self._reading.popleft()
        return part.rows, logits

    @torch.inference_mode()
    def step(self) -> tuple[list[Row[T]], Tensor]:
        """One token more for every running row."""
        part = self._running
        assert part is not None, "there are no running rows"
        mask = pad_tensor(part.mask, (0, 1), value=1)
        logits = self._forward(part, torch.tensor([[row.last] for row in part.rows], device=mask.device), mask)
        part.mask = mask
        for row in part.rows:
            row.written.append(row.last)
        return part.rows, logits

    @torch.inference_mode()
    def leave(self, gone: Callable[[Row[T]], bool], keep: bool = True) -> None:
        """Rows that are `gone` end. With `keep` others may go on from what they had read."""
        for row, read in zip(self.running, list(self._now()), strict=True):
            if keep and gone(row):
                try:
                    self._past.add(read)
                except Exception as error:  # It is not needed.
                    if not no_memory(error):
                        raise
                    self.forget()
        parts = [*self._reading, *([self._running] if self._running else [])]
        for part in parts:
            part.drop(gone)
        self._reading = deque(part for part in self._reading if part.rows)
        self._running = self._running if self.running else None

    def embed(self, texts: list[list[int]], slot: int, tokens: int) -> Iterator[Tensor | None]:
        """Mean of the last hidden states of each text, `[texts, hidden]`, each of length one.

        They are read in slices of `tokens` in all; after each but the last comes None.
        """
        inputs = {name: t.to(self.model.device) for name, t in pad(texts, self._pad_id).items()}
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        cache = DynamicCache(config=self.model.config)
        decoder = cast(Any, self.model.get_decoder())
        total = torch.zeros(())
        count = max(tokens // len(texts), 1)
        for start in range(0, ids.shape[1], count):
            if start:
                yield None
            end = min(start + count, ids.shape[1])
            with torch.inference_mode():
                torch.set_num_threads(worth(self._parameters, count * len(texts)))
                if self.slots is not None:
                    self.slots.use([slot] * len(texts))
                read = decoder(input_ids=ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
                hidden = read.last_hidden_state.float() * mask[:, start:end, None]
                total = total.to(hidden.device) + hidden.sum(1)
        yield torch.nn.functional.normalize(total, dim=-1)  # As long as the mean.

    def _forward(self, part: _Part[T], ids: Tensor, mask: Tensor) -> Tensor:
        """Logits after `ids`, which stand in the last columns of `mask`."""
        torch.set_num_threads(worth(self._parameters, ids.numel()))
        if self.slots is not None:
            self.slots.use([row.slot for row in part.rows])
        known = mask.shape[1] - ids.shape[1]
        # Padding has no position of its own; its keys are masked.
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, known:]
        try:
            out = cast(Any, self.model)(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=part.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        except Exception:
            part.cut(known)  # Some layers have had the new columns.
            raise
        return cast(Tensor, out.logits[:, -1].float())


def _below(old: _Part[T] | None, new: _Part[T]) -> _Part[T]:
    """The rows of both, `new` below `old`."""
    if old is None:
        return _Part(new.rows, new.mask, made(new.cache, lambda tensor: tensor), new.left)
    width = max(old.mask.shape[1], new.mask.shape[1])
    mask = torch.cat([pad_tensor(part.mask, (width - part.mask.shape[1], 0)) for part in (old, new)])

    def one_below_the_other(tensors: list[Tensor]) -> Tensor:
        return torch.cat([pad_tensor(tensor, (0, 0, width - tensor.shape[2], 0)) for tensor in tensors])

    cache = joined([old.cache, new.cache], one_below_the_other)
    return _Part(old.rows + new.rows, mask, cache, torch.cat([old.left, new.left]))
