"""What a prompt is about, as a vector: the mean of its tokens' hidden states in the middle of the base model.

The middle layers tell what a text is about; the last ones are bent to the next token. No adapter has a part in it, so
under LoRA a row's features are the same in every version.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from treering.model import Tokens, compute, decoder_layers, pad, use_bf16
from treering.passes import in_parts
from treering.progress import bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from treering.config import Config
    from treering.stop import Stop


class _ReachedError(Exception):
    """Ends a forward pass with the hidden states that were wanted: nothing above them is computed."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def features(
    model: PreTrainedModel,
    rows: Sequence[Tokens],
    config: Config,
    pad_id: int,
    *,
    stop: Stop | None = None,
    quiet: bool = False,
) -> Tensor:
    """Float32 `[rows, hidden]` on the processor: the mean over the tokens before a row's first answer.

    The hidden states are those that layer `num_hidden_layers // 2` (counted from 0) reads. Nobody else may use `model`
    meanwhile; afterwards it is as it was. Raises `UpdateInterruptedError` when `stop` was asked.
    """
    layers = decoder_layers(model)
    prompts = [row.ids[: row.answers[0]] for row in rows]

    def means(part: Sequence[int]) -> list[Tensor]:
        return list(_means(model, [prompts[at] for at in part], config, pad_id))

    hook = layers[len(layers) // 2].register_forward_pre_hook(_end_here, with_kwargs=True)
    try:
        with _as_base(model), bar("reading prompts", len(rows), quiet) as advance:
            found = in_parts(model, prompts, means, config, advance, stop)
    finally:
        hook.remove()
    return torch.stack(found) if found else torch.empty(0, model.config.get_text_config().hidden_size)


@torch.no_grad()
def _means(model: PreTrainedModel, prompts: Sequence[Sequence[int]], config: Config, pad_id: int) -> Tensor:
    inputs = {name: tensor.to(model.device) for name, tensor in pad(prompts, pad_id).items()}
    try:
        with compute(use_bf16(config)[0], model.device):
            cast(Any, model)(**inputs, use_cache=False)
    except _ReachedError as reached:
        mask = inputs["attention_mask"].unsqueeze(-1)
        return ((reached.hidden.float() * mask).sum(1) / mask.sum(1)).cpu()
    raise AssertionError("the pass did not come to the layer")


def _end_here(_: torch.nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
    raise _ReachedError(arguments[0] if arguments else named["hidden_states"])


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
