"""Accept an example, or say by which rule and why it goes to quarantine."""

from __future__ import annotations

import re
from collections.abc import Callable

from treering.data.example import Example, normalise

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")

Rule = Callable[[Example], str | None]


def check(example: Example, count_tokens: Callable[[Example], int], cutoff_len: int) -> tuple[str, str] | None:
    """The first rule that the example breaks and the reason in words, or None where it breaks none."""
    rules: dict[str, Rule] = {
        "empty-question": empty_question,
        "answer-equals-question": answer_equals_question,
        "control-characters": control_characters,
    }
    for name, rule in rules.items():
        reason = rule(example)
        if reason:
            return name, reason
    try:
        tokens = count_tokens(example)
    except Exception as error:  # Templates raise whatever they like; some want turns to alternate, or no system.
        return "template-refuses", f"the model's chat template refuses it ({error}); change the turns, or the model"
    reason = too_long(tokens, cutoff_len)
    return ("too-long", reason) if reason else None


def empty_question(example: Example) -> str | None:
    """Nothing is asked in the last user turn."""
    return None if _question(example) else "the last user turn is empty; write the question or delete the row"


def answer_equals_question(example: Example) -> str | None:
    """The answer only repeats the question, which a shifted or copied column does."""
    if example.messages[-1].role != "assistant":
        return None
    # What is nothing but punctuation normalises to nothing, so "?" and "!" would count as equal.
    repeats = example.label and example.label == normalise(_question(example))
    return f"the answer {example.answer[:80]!r} repeats the question; write the real answer" if repeats else None


def control_characters(example: Example) -> str | None:
    """A C0 control character, which text never needs apart from tab and line ends."""
    for number, message in enumerate(example.messages, 1):
        found = _CONTROL.search(message.content)
        if found:
            return f"turn {number} holds U+{ord(found[0]):04X} at character {found.start() + 1}; delete it"
    return None


def too_long(tokens: int, cutoff_len: int) -> str | None:
    """More tokens than one training row may have; cutting would teach an answer without its end."""
    if tokens <= cutoff_len:
        return None
    return f"{tokens} tokens are more than cutoff_len={cutoff_len}; shorten the row or raise cutoff_len"


def _question(example: Example) -> str:
    return next((turn.content.strip() for turn in reversed(example.messages) if turn.role == "user"), "")
