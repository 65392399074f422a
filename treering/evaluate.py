"""Scores per row and per task: free generation against the answer, and held-out loss.

A row is first read once together with its right answer. That gives the loss, and, where every answer token is also
the likeliest, what greedy decoding would write, at no further cost; only the other rows are generated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.nn.functional import cross_entropy

from treering.batches import make_batch
from treering.data.example import Example, Message
from treering.metrics import exact_match, token_f1
from treering.model import compute, encode, encode_prompt, logits_at, pad, use_bf16
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


@torch.no_grad()
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
    pad_id = cast(int, tokenizer.pad_token_id)
    bf16, size = use_bf16(config)[0], config.eval.batch_size
    tokens = [encode(tokenizer, example, last_only=True) for example, _ in rows]
    order = sorted(range(len(rows)), key=lambda at: (len(tokens[at].ids), tokens[at].id))
    losses: dict[int, float] = {}
    predictions: dict[int, str] = {}
    with bar(title, len(rows), quiet) as advance:
        for start in range(0, len(order), size):
            if stop is not None:
                stop.check()
            part = order[start : start + size]
            batch = make_batch([tokens[at] for at in part], pad_id, model.device)
            with compute(bf16, model.device):
                logits = logits_at(model, **batch.inputs, at=batch.at)
            counts = [len(tokens[at].answers) for at in part]
            right = (logits.argmax(-1) == batch.targets).split(counts)
            loss = cross_entropy(logits, batch.targets, reduction="none").split(counts)
            for at, row_right, row_loss in zip(part, right, loss, strict=True):
                losses[at] = row_loss.mean().item()
                # An answer that is too long to be written whole (the end mark aside) is written after all.
                if row_right.all() and len(row_right) - 1 <= config.eval.max_new_tokens:
                    predictions[at] = rows[at][0].answer
            advance(len(part))
    wrong = [at for at in range(len(rows)) if at not in predictions]
    with bar(f"{title}: writing {len(wrong)} answers", len(wrong), quiet) as advance:
        # A label is right or wrong by then; what is right so far and rambles on is scored with all it says.
        longest = config.eval.max_new_tokens
        limits = [
            min(len(tokens[at].answers) + 2, longest) if metrics[rows[at][1]] == "exact_match" else longest
            for at in wrong
        ]
        prompts = [rows[at][0].prompt for at in wrong]
        texts = generate(model, tokenizer, prompts, limits, config, advance=advance, stop=stop)
        predictions.update(zip(wrong, texts, strict=True))
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


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    limits: Sequence[int],
    config: Config,
    *,
    advance: Any = None,
    stop: Stop | None = None,
) -> list[str]:
    """Greedy answers to `prompts`, in their order, each at most its own number of tokens long."""
    model.eval()
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda at: len(ids[at]))
    answers = [""] * len(ids)
    for start in range(0, len(order), config.eval.batch_size):
        if stop is not None:
            stop.check()
        part = order[start : start + config.eval.batch_size]
        inputs = {
            n: t.to(model.device)
            for n, t in pad([ids[at] for at in part], cast(int, tokenizer.pad_token_id), left=True).items()
        }
        with compute(use_bf16(config)[0], model.device):
            written = cast(Any, model).generate(
                **inputs,
                max_new_tokens=max(limits[at] for at in part),
                do_sample=False,
                # Plain greedy, whatever the model's own generation_config.json asks for.
                repetition_penalty=1.0,
                no_repeat_ngram_size=0,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        for at, row in zip(part, written[:, inputs["input_ids"].shape[1] :], strict=True):
            answers[at] = cast(str, tokenizer.decode(row[: limits[at]], skip_special_tokens=True)).strip()
        if advance is not None:
            advance(len(part))
    return answers
