"""What the base model makes of a prompt: one vector, the same whatever was learned since.

It is the mean of the hidden states at the middle layer over the tokens of the last question and of what follows it, up
to the answer. Middle layers tell texts apart better than the last, which is busy with the next token; and the tokens
before, which a task's rows have in common (a system turn), take part only in what the others make of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from treering.data.example import Message
from treering.model import compute, decoder_layers, encode_prompt, pad, use_bf16
from treering.passes import in_parts
from treering.progress import Advance, silent
from treering.readings import Reading

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from treering.config import Config
    from treering.stop import Stop

LONGEST = 512
"""Tokens of a prompt that are read, the last ones."""


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
    """Of each prompt the vector that `model` makes of it without its adapter, float32 `[prompts, hidden size]`.

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
    layers = decoder_layers(model)
    middle = layers[len(layers) // 2 - 1]

    @torch.no_grad()
    def one(part: Sequence[int]) -> list[Tensor]:
        inputs = pad([rows[at] for at in part], 0)
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        with compute(use_bf16(config)[0], model.device):
            hidden = _hidden(model, inputs).float()
        return [hidden[at, starts[row] : len(rows[row])].mean(0).cpu() for at, row in enumerate(part)]

    with _as_base(model), _ending_at(middle):
        found = in_parts(model, rows, one, config, advance, stop, reading)
    return torch.stack(found) if found else torch.empty(0, model.config.get_text_config().hidden_size)


class _Reached(Exception):  # noqa: N818
    """The layer that is wanted was computed; those above are not."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def _hidden(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """What the layer that ends the pass gives, `[rows, length, hidden size]`."""
    try:
        cast(Any, model)(**inputs, use_cache=False)
    except _Reached as reached:
        return reached.hidden
    raise AssertionError("no layer ended the pass")


@contextmanager
def _ending_at(layer: nn.Module) -> Iterator[None]:
    """Passes end there."""

    def reached(_: nn.Module, __: Any, output: Any) -> None:
        raise _Reached(output[0] if isinstance(output, tuple) else output)

    handle = layer.register_forward_hook(reached)
    try:
        yield
    finally:
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
