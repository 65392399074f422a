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

from treering.errors import ModelError
from treering.model import pad
from treering.serve.adapters import Slots
from treering.serve.cache import joined, made
from treering.serve.threads import worth

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

    def join(self, rows: list[Row[T]]) -> None:
        """Take in `rows`. What a prompt has in common with that of a running row of its slot is not read again."""
        inputs = pad([row.prompt for row in rows], self._pad_id, left=True)
        ids, mask = (inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask"))
        known = [self._known(row) for row in rows]
        unread = max(len(row.prompt) - count for row, (_, count) in zip(rows, known, strict=True))
        cache = DynamicCache(config=self.model.config)
        if self._running and unread < mask.shape[1]:
            starts = (self._running.mask.shape[1] - self._running.mask.sum(1)).tolist()

            def copied(tensor: Tensor) -> Tensor:
                copy = tensor.new_zeros(len(rows), tensor.shape[1], mask.shape[1] - unread, tensor.shape[3])
                for to, (row, (at, _)) in enumerate(zip(rows, known, strict=True)):
                    count = len(row.prompt) - unread
                    if count > 0:
                        copy[to, :, -count:] = tensor[at, :, starts[at] : starts[at] + count]
                return copy

            cache = made(self._running.cache, copied)
        self._reading.append(_Part(rows, mask, cache, ids[:, -unread:]))

    def _known(self, row: Row[T]) -> tuple[int, int]:
        """The running row with which `row` has most tokens in common at the start, and how many; one is always left."""
        shared = [
            (_common(row.prompt[:-1], other.prompt), at)
            for at, other in enumerate(self.running)
            if other.slot == row.slot
        ]
        count, at = max(shared, default=(0, 0))
        return at, count

    @torch.inference_mode()
    def read(self, tokens: int) -> tuple[list[Row[T]], Tensor | None]:
        """Read on in the prompts of those that joined together, `tokens` of them in all; then it is others' turn.

        The logits come when they are read, and None before.
        """
        part = self._reading[0]
        count = max(tokens // len(part.rows), 1)
        ids, left = part.left[:, :count], part.left[:, count:]
        logits = self._forward(part, ids, part.mask[:, : part.mask.shape[1] - left.shape[1]])
        part.left = left
        self._reading.popleft()
        if left.shape[1]:
            self._reading.append(part)
            return part.rows, None
        self._running = _below(self._running, part)
        return part.rows, logits

    @torch.inference_mode()
    def step(self) -> tuple[list[Row[T]], Tensor]:
        """One token more for every running row."""
        part = self._running
        assert part is not None, "there are no running rows"
        mask = pad_tensor(part.mask, (0, 1), value=1)
        logits = self._forward(part, torch.tensor([[row.last] for row in part.rows], device=mask.device), mask)
        part.mask = mask
        return part.rows, logits

    @torch.inference_mode()
    def leave(self, gone: Callable[[Row[T]], bool]) -> None:
        """Rows that are `gone` end."""
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
            part.cache = made(part.cache, lambda tensor: tensor[:, :, :known])  # Some layers have had the new columns.
            raise
        return cast(Tensor, out.logits[:, -1].float())


def _common(one: list[int], other: list[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


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
