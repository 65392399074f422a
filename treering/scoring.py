"""How an answer is scored: the metric of each task, and what each metric makes of an answer.

All scores lie between 0 and 1.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treering import own
from treering.data.example import Example, normalise
from treering.errors import ConfigError
from treering.files import sha256

if TYPE_CHECKING:
    from treering.config import Config
    from treering.results import Result

VERSION = 2
"""Raised when the same answers would get other scores; results of different versions are not compared."""

TOKEN_ACCURACY = "token_accuracy"
"""Of a plain text: the share of its tokens that are the likeliest after those before them."""

PREFERENCE = "preference"
"""Of a preference pair: whether the chosen answer is likelier than the rejected one, by the mean of its tokens."""

EXACT_MATCH = "exact_match"
"""The metric of tasks whose answers are labels."""

Scorer = Callable[[Example, str], float]
"""What the score of an answer (the text) to a row (with its right answer) is."""


def exact_match(prediction: str, answer: str) -> float:
    """1.0 if both are the same after normalisation (see `Example.label`), else 0.0."""
    return float(normalise(prediction) == normalise(answer))


def token_f1(prediction: str, answer: str) -> float:
    """F1 of the bags of words of both (Rajpurkar et al. 2016), normalised; 1.0 if both are empty."""
    got, wanted = _words(prediction), _words(answer)
    if not got or not wanted:
        return float(got == wanted)
    return _f1((Counter(got) & Counter(wanted)).total(), len(got), len(wanted))


def rouge_l(prediction: str, answer: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004, ROUGE-L), normalised; 1.0 if both are empty."""
    got, wanted = _words(prediction), _words(answer)
    if not got or not wanted:
        return float(got == wanted)
    longest = [0] * (len(wanted) + 1)
    for word in got:
        before = 0
        for at, other in enumerate(wanted, 1):
            before, longest[at] = longest[at], before + 1 if word == other else max(longest[at], longest[at - 1])
    return _f1(longest[-1], len(got), len(wanted))


def chrf(prediction: str, answer: str) -> float:
    """F2 of character n-grams up to six (Popović 2015, chrF), as sacrebleu computes it; 1.0 if both are empty."""
    from sacrebleu import sentence_chrf

    if not prediction.strip() or not answer.strip():
        return float(prediction.strip() == answer.strip())
    return min(1.0, float(sentence_chrf(prediction, [answer]).score) / 100)


def macro_f1(predictions: Sequence[str], answers: Sequence[str]) -> float:
    """Mean over the labels among `answers` of each label's F1; a prediction that is none of them is a miss.

    Rare labels count as much as frequent ones (Sokolova and Lapalme 2009, macro-averaging of F1 scores).
    """
    got, wanted = [normalise(text) for text in predictions], [normalise(text) for text in answers]
    right = Counter(one for one, other in zip(got, wanted, strict=True) if one == other)
    said, there = Counter(got), Counter(wanted)
    return sum(_f1(right[label], said[label], count) for label, count in there.items()) / max(1, len(there))


METRICS: dict[str, Callable[[str, str], float]] = {
    EXACT_MATCH: exact_match,
    "token_f1": token_f1,
    "rouge_l": rouge_l,
    "chrf": chrf,
}
"""Those of texts that a task may be given by name, `(prediction, answer)`."""


def _of_text(metric: Callable[[str, str], float], row: Example, prediction: str) -> float:
    return metric(prediction, row.answer)


SCORERS: dict[str, Scorer] = {name: partial(_of_text, metric) for name, metric in METRICS.items()}

WHY = {
    TOKEN_ACCURACY: "its rows are plain text",
    PREFERENCE: "its rows are preference pairs",
    EXACT_MATCH: "short answers, each used at least twice on average",
    "token_f1": "answers are no small label set",
}
"""Why `metric_for` chooses each."""


def metric_for(rows: Collection[Example]) -> str:
    """The metric of a task with these training rows."""
    if any(row.is_text for row in rows):
        return TOKEN_ACCURACY
    if rows and all(row.rejected for row in rows):
        return PREFERENCE
    return EXACT_MATCH if is_label_set([row.label for row in rows]) else "token_f1"


def is_label_set(answers: Sequence[str]) -> bool:
    """Whether these (normalised) answers look like labels: short, and on average used at least twice."""
    distinct = set(answers)
    return 2 * len(distinct) <= len(answers) and all(len(answer.split()) <= 8 for answer in distinct)


def wanted(config: Config, metrics: Mapping[str, str]) -> dict[str, str]:
    """The metric of each task: what the user names, else the one chosen for it, which `metrics` has."""
    named = config.eval.metrics
    return {task: named.get(task, named.get("*", chosen)) for task, chosen in metrics.items()}


def scorers(config: Config, root: Path) -> dict[str, Scorer]:
    """All metrics of texts by their names, with those of the user's own that lie in the workspace `root`.

    Raises `ConfigError` where one of these cannot be had.
    """
    named = filter(own.is_own, config.eval.metrics.values())
    return SCORERS | {name: partial(_asked, name, own.function(name, root, "eval.metrics")) for name in named}


def conditions(config: Config, root: Path) -> dict[str, Any]:
    """What scores depend on besides model and rows; only results with the same are compared."""
    found: dict[str, Any] = {"metric_version": VERSION, "max_new_tokens": config.eval.max_new_tokens}
    if config.quantization_bit:
        found["quantization_bit"] = config.quantization_bit
    if named := config.eval.metrics:
        found["metrics"] = named
        found["own"] = {
            name: sha256(own.source(name, root, "eval.metrics")) for name in named.values() if own.is_own(name)
        }
    return found


def further(results: Sequence[Result], examples: Mapping[str, Example]) -> dict[str, dict[str, float]]:
    """By task what other measures say of the same answers; rows that are not among `examples` are passed over.

    Labels have `macro_f1`; all else that was written has every metric of texts.
    """
    of_task: dict[str, list[tuple[Result, str]]] = defaultdict(list)
    for result in results:
        if result.id in examples and result.metric not in (TOKEN_ACCURACY, PREFERENCE):
            of_task[result.task].append((result, examples[result.id].answer))
    found = dict[str, dict[str, float]]()
    for task, rows in of_task.items():
        if all(result.metric == EXACT_MATCH for result, _ in rows):
            said, right = zip(*((result.prediction, answer) for result, answer in rows), strict=True)
            found[task] = {"macro_f1": macro_f1(said, right)}
        else:
            found[task] = {
                name: sum(metric(result.prediction, answer) for result, answer in rows) / len(rows)
                for name, metric in METRICS.items()
            }
    return found


def _asked(name: str, metric: Callable[..., Any], row: Example, prediction: str) -> float:
    """What the user's metric says: it gets the row's messages, the right answer last, and the text to be scored."""
    try:
        score = float(metric(row.as_dicts(), prediction))
    except (Exception, SystemExit) as error:
        said = f"eval.metrics: {name} failed ({error!r}) on the answer {prediction[:200]!r}; correct it"
        raise ConfigError(said) from error
    if not 0 <= score <= 1:
        raise ConfigError(f"eval.metrics: {name} gave {score}; a score lies between 0 and 1")
    return score


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", normalise(text))


def _f1(shared: int, one: int, other: int) -> float:
    return 2 * shared / (one + other) if one + other else 0.0
