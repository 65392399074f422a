"""What the base model makes of a prompt: one vector, the same whatever was learned since.

It is the mean of the hidden states over the tokens of the last question and of what follows it, up to the answer, at a
quarter and at half of the layers, each brought to a mean square of one. Middle layers tell texts apart better than the
last, which is busy with the next token, and the earlier ones know more of the words. The tokens before, which a task's
rows have in common (a system turn), take part only in what the others make of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from treering.data.example import Message
from treering.model import compute, decoder_layers, encode_prompt, pad, precision
from treering.passes import in_parts
from treering.progress import Advance, silent
from treering.readings import Reading

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from treering.config import Config
    from treering.stop import Stop

LONGEST = 512
"""Tokens of a prompt that are read, the last ones."""

LARGEST = 2048
"""Numbers of a vector; what wide models have more is folded in."""


def features(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    config: Config,
    *,
    advance: Advance = silent,
    stop: Stop | None = None,
    reading: Reading | None = None,
) -> Tensor:
    """Of each prompt the vector that `model` makes of it without its adapter, float32 `[prompts, numbers]`.

    Raises `UpdateInterruptedError` when `stop` was asked.
    """
    asked = []
    for prompt in prompts:
        ids, empty = (encode_prompt(tokenizer, turns) for turns in (prompt, emptied(prompt)))
        asked.append((ids, last_turn(ids, empty)))
    return vectors(model, asked, config, advance=advance, stop=stop, reading=reading)


def emptied(prompt: Sequence[Message]) -> list[Message]:
    """The same with nothing in its last turn."""
    return [*prompt[:-1], Message(prompt[-1].role, "")]


def last_turn(ids: Sequence[int], empty: Sequence[int]) -> int:
    """Where among the tokens `ids` of a prompt its last turn begins: where those of the same `emptied` differ."""
    start = next((at for at, (one, other) in enumerate(zip(ids, empty, strict=False)) if one != other), 0)
    return min(start, len(ids) - 1)


def vectors(
    model: PreTrainedModel,
    asked: Sequence[tuple[Sequence[int], int]],
    config: Config,
    *,
    advance: Advance = silent,
    stop: Stop | None = None,
    reading: Reading | None = None,
) -> Tensor:
    """As `features`, of prompts given as their tokens and the place where the last turn begins (`last_turn`)."""
    rows = [ids[-LONGEST:] for ids, _ in asked]
    starts = [max(0, start - max(0, len(ids) - LONGEST)) for ids, start in asked]
    layers = _layers(model)

    @torch.no_grad()
    def one(part: Sequence[int]) -> list[Tensor]:
        inputs = pad([rows[at] for at in part], 0)
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        with compute(model.device, precision(config)[0]):
            hidden = [states.float() for states in read(inputs)]
        spans = [slice(starts[row], len(rows[row])) for row in part]
        return [_even([states[at, span].mean(0) for states in hidden]) for at, span in enumerate(spans)]

    with _as_base(model), _read(layers, model) as read:
        found = in_parts(model, rows, one, config, advance, stop, reading)
    size = len(layers) * model.config.get_text_config().hidden_size
    return _folded(torch.stack(found) if found else torch.empty(0, size))


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    """Those that are read, in the order they are passed."""
    layers = decoder_layers(model)
    return [layers[at - 1] for at in sorted({max(1, len(layers) // 4), max(1, len(layers) // 2)})]


def _even(means: Sequence[Tensor]) -> Tensor:
    """One vector of several, none of them louder than another."""
    return torch.cat([mean / mean.square().mean().sqrt().clamp_min(1e-12) for mean in means]).cpu()


def _folded(found: Tensor) -> Tensor:
    """At most `LARGEST` numbers a vector: each is added, with a sign, to a place drawn for it (Weinberger et al. 2009).

    Products of vectors stay the same on average, and what is kept of all rows does not grow with the model's width.
    """
    count, size = found.shape
    if size <= LARGEST:
        return found
    draw = torch.Generator().manual_seed(0)
    places = torch.randint(LARGEST, (size,), generator=draw)
    signs = torch.randint(2, (size,), generator=draw) * 2.0 - 1.0
    return torch.zeros(count, LARGEST).index_add(1, places, found * signs)


class _Reached(Exception):  # noqa: N818
    """The last layer that is wanted was computed; those above are not."""


@contextmanager
def _read(layers: Sequence[nn.Module], model: PreTrainedModel) -> Iterator[Callable[[dict[str, Tensor]], list[Tensor]]]:
    """Gives what each of `layers` makes of inputs, `[rows, length, hidden size]`; a pass ends at the last."""
    passing = threading.local()  # Several threads pass at a time.

    def reached(_: nn.Module, __: Any, output: Any) -> None:
        passing.states.append(output[0] if isinstance(output, tuple) else output)
        if len(passing.states) == len(layers):
            raise _Reached

    def states(inputs: dict[str, Tensor]) -> list[Tensor]:
        passing.states = []
        with suppress(_Reached):
            cast(Any, model)(**inputs, use_cache=False)
        return cast(list[Tensor], passing.states)

    handles = [layer.register_forward_hook(reached) for layer in layers]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _as_base(model: PreTrainedModel) -> Iterator[None]:
    """`model` in evaluation mode and without its adapter; then in its mode again, learning what it did."""
    training, learns = model.training, [p.requires_grad for p in model.parameters()]
    without: AbstractContextManager[Any] = nullcontext()
    if hasattr(model, "disable_adapter"):
        without = cast(Any, model).disable_adapter()
    model.eval()
    try:
        with without:
            yield
    finally:
        model.train(training)
        for parameter, learned in zip(model.parameters(), learns, strict=True):
            parameter.requires_grad_(learned)  # peft lets the whole adapter learn again, whatever did not.
