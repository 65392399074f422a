"""Scores per row and per task: free generation against the answer, and held-out loss.

A row is first read once together with its right answer. That gives the loss, and what greedy decoding would write as
far as it is right (`greedy.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor
from torch.nn.functional import cross_entropy

from treering.batches import Batch
from treering.data.example import Example
from treering.greedy import Answer, Known, likeliest, write
from treering.metrics import exact_match, token_f1
from treering.model import encode
from treering.passes import read
from treering.progress import bar
from treering.results import Result
from treering.stop import Stop

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from treering.config import Config

METRIC_VERSION = 2
"""Raised when the same answers would get other scores; results of different versions are not compared."""

METRICS = {"exact_match": exact_match, "token_f1": token_f1}


def conditions(config: Config) -> dict[str, Any]:
    """What scores depend on besides model and rows; only results with the same are compared."""
    found = {"metric_version": METRIC_VERSION, "max_new_tokens": config.eval.max_new_tokens}
    return found | ({"quantization_bit": config.quantization_bit} if config.quantization_bit else {})


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[tuple[Example, str]],
    metrics: Mapping[str, str],
    config: Config,
    *,
    title: str = "evaluating",
    stop: Stop | None = None,
    quiet: bool = False,
) -> list[Result]:
    """Score `rows` (example, task); `metrics` names each task's metric. The model is never told the task."""
    model.eval()
    end, pad_id = cast(int, tokenizer.eos_token_id), cast(int, tokenizer.pad_token_id)
    tokens = [encode(tokenizer, example, last_only=True) for example, _ in rows]
    with bar(title, len(rows), quiet) as advance:
        found = read(model, tokens, _likeliest_and_loss, config, pad_id, advance, stop)
    losses = [loss for _, loss in found]
    longest = config.eval.max_new_tokens
    predictions: dict[int, str] = {}
    answers: dict[int, Answer] = {}
    labels = []
    for at, ((example, task), row, (written, _)) in enumerate(zip(rows, tokens, found, strict=True)):
        right = [row.ids[place] for place in row.answers]
        # A label is right or wrong two tokens after it; what is right so far and rambles on is scored with all it says.
        limit = longest
        if metrics[task] == "exact_match":
            labels.append(right)
            limit = min(len(right) + 2, longest)
        # An answer that is too long to be written whole (the end mark aside) is written after all.
        if written == right and len(right) - 1 <= longest:
            predictions[at] = example.answer
        else:
            answers[at] = Answer(row.ids[: row.answers[0]], limit)
            answers[at].take(right, written, end)
    with bar(f"{title}: writing {len(answers)} answers", len(answers), quiet) as advance:
        texts = write(model, tokenizer, list(answers.values()), Known(labels), config, advance=advance, stop=stop)
    predictions.update(zip(answers, texts, strict=True))
    return [
        Result(
            example.id,
            task,
            metrics[task],
            METRICS[metrics[task]](predictions[at], example.answer),
            losses[at],
            predictions[at],
        )
        for at, (example, task) in enumerate(rows)
    ]


def _likeliest_and_loss(batch: Batch, logits: Tensor) -> list[tuple[list[int], float]]:
    losses = cross_entropy(logits, batch.targets, reduction="none").split(batch.counts)
    return [(tokens, loss.mean().item()) for tokens, loss in zip(likeliest(batch, logits), losses, strict=True)]
