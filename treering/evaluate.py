"""Scores per row and per task: free generation against the answer, and held-out loss.

A row is read together with its right answer. That gives the loss, and what greedy decoding writes as far as it is
right; the rest is read from there on (`greedy.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch.nn.functional import cross_entropy

from treering.data.example import Example
from treering.experts import routed
from treering.greedy import Answer, Known, after, text, watched, write
from treering.guides import guides
from treering.methods.recall import Recalled
from treering.model import encode
from treering.passes import read_answers
from treering.progress import bar
from treering.readings import Reading
from treering.results import Result
from treering.scoring import EXACT_MATCH, PREFERENCE, SCORERS, TOKEN_ACCURACY, Scorer
from treering.stop import Stop
from treering.tree import Tree

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from treering.config import Config


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[tuple[Example, str]],
    metrics: Mapping[str, str],
    config: Config,
    *,
    scorers: Mapping[str, Scorer] = SCORERS,
    title: str = "evaluating",
    stop: Stop | None = None,
    quiet: bool = False,
    reading: Reading | None = None,
) -> list[Result]:
    """Score `rows` (example, task); `metrics` names each task's metric, `scorers` are those of texts.

    The model is never told the task.
    """
    model.eval()
    named = [_metric(example, metrics[task], scorers) for example, task in rows]
    pairs = [at for at, name in enumerate(named) if name == PREFERENCE]
    rows = [*rows, *((rows[at][0].rejected or rows[at][0], rows[at][1]) for at in pairs)]
    names = [*named, *(PREFERENCE for _ in pairs)]
    end, pad_id = cast(int, tokenizer.eos_token_id), cast(int, tokenizer.pad_token_id)
    tokens = [encode(tokenizer, example, last_only=True) for example, _ in rows]
    right = [[row.ids[place] for place in row.answers] for row in tokens]
    judged = [name == EXACT_MATCH for name in names]
    known = Known(answer for answer, is_label in zip(right, judged, strict=True) if is_label)
    longest = config.eval.max_new_tokens

    def score(part: Sequence[int]) -> Sequence[tuple[str, float, float]]:
        now, recalled = [tokens[at] for at in part], [hints[at].recalled for at in part]
        tree = Tree(model, config, pad_id, watched=watched(recalled))
        logits = read_answers(tree, now)
        targets = torch.tensor([token for at in part for token in right[at]], device=logits.device)
        each = cross_entropy(logits, targets, reduction="none").split([len(right[at]) for at in part])
        losses = [loss.mean().item() for loss in each]
        right_tokens = (logits.argmax(-1) == targets).float().split([len(right[at]) for at in part])
        share = {at: found.mean().item() for at, found in zip(part, right_tokens, strict=True)}
        del logits  # The largest of all, and no longer needed.
        answers: dict[int, Answer] = {}
        whole: dict[int, str] = {}
        for at, row, past in zip(part, now, recalled, strict=True):
            if names[at] not in scorers:
                whole[at] = ""  # What counts is how likely its tokens are.
                continue
            path, long = tree.path(row.ids[:-1]), len(right[at])
            # An answer that is too long to be written whole (the end mark aside) is written after all.
            if long - 1 <= longest and _comes(right[at], path[-long:], past, tree):
                whole[at] = rows[at][0].answer
                continue
            # A label is right or wrong two tokens after it; what is right so far and rambles on is scored with all
            # it says.
            limit = min(long + 2, longest) if judged[at] else longest
            answers[at] = Answer(row.ids[: row.answers[0]], path[: len(path) - long + 1], limit, past)
        write(tree, model, list(answers.values()), known, config, end, pad_id, stop)
        texts = whole | {at: text(tokenizer, answer) for at, answer in answers.items()}
        return [(texts[at], loss, share[at]) for at, loss in zip(part, losses, strict=True)]

    with bar(title, len(rows), quiet) as advance:
        hints = guides(model, tokenizer, [example.prompt for example, _ in rows], config, stop, reading)
        chosen, read = [guide.expert for guide in hints], [row.ids for row in tokens]
        found = routed(model, chosen, read, score, config, advance, stop, reading and reading.next())
    rejected = {at: loss for at, (_, loss, _) in zip(pairs, found[len(named) :], strict=True)}
    results = []
    for at, ((example, task), name, (said, loss, share)) in enumerate(zip(rows, named, found, strict=False)):
        if name == TOKEN_ACCURACY:
            points = share
        elif name == PREFERENCE:
            points = float(loss < rejected[at])
        else:
            points = scorers[name](example, said)
        results.append(Result(example.id, task, name, points, loss, said, chosen[at] is None))
    return results


def _metric(row: Example, of_task: str, scorers: Mapping[str, Scorer]) -> str:
    """The metric of a row: that of its task, but where only texts or pairs have it and the row is none, or is one."""
    if row.is_text:
        return TOKEN_ACCURACY
    if of_task == PREFERENCE and row.rejected is not None:
        return PREFERENCE
    return of_task if of_task in scorers else "token_f1"


def _comes(right: Sequence[int], numbers: Sequence[int], recalled: Recalled | None, tree: Tree) -> bool:
    """Whether `right` is what is written, where each of its tokens comes after one of these numbers in `tree`."""
    for token, number in zip(right, numbers, strict=True):
        if after(tree, number, recalled) != token:
            return False
        recalled = recalled and recalled.after(token)
    return True
