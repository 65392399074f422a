"""The rules that rows are checked by: what each looks for, in one row alone.

A rule returns None for a good row, or what is wrong with it and the way out. One that can mend a row returns the mended
row as well.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING

from treering.data.example import Example, Message, normalise
from treering.data.marks import marks_of, neutral

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from treering.data.lengths import Lengths

LEVELS = ("reject", "warn", "off")
MENDING = ("repair", *LEVELS)


@dataclass(frozen=True)
class Finding:
    """What is wrong with a row, and what the row would be without it if that can be said."""

    reason: str
    mended: Example | None = None


@dataclass(frozen=True)
class Around:
    """What rules know beside the row: its `task`, the settings that concern them, and the tokenizer.

    `cuts`: rows that are too long are cut.
    """

    tokenizer: PreTrainedTokenizerBase
    lengths: Lengths
    languages: tuple[str, ...] = ()
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    task: str = ""
    cuts: bool = False

    @cached_property
    def marks(self) -> re.Pattern[str] | None:
        """Texts that the tokenizer reads as a special token."""
        return marks_of(self.tokenizer)


Rule = Callable[[Example, Around], Finding | None]


@dataclass(frozen=True)
class Known:
    """A rule and its usual level; `levels` are those it may have."""

    check: Rule
    level: str
    levels: tuple[str, ...] = LEVELS


def empty_question(row: Example, _: Around) -> Finding | None:
    """Nothing is asked in the last user turn."""
    if row.is_text or _question(row):
        return None
    return Finding("the last user turn is empty; write the question or delete the row")


def answer_equals_question(row: Example, _: Around) -> Finding | None:
    """The answer only repeats the question, which a shifted or copied column does."""
    if row.is_text or row.messages[-1].role != "assistant" or not row.label or row.label != normalise(_question(row)):
        return None  # What is nothing but punctuation normalises to nothing, so "?" and "!" would count as equal.
    return Finding(f"the answer {row.answer[:80]!r} repeats the question; write the real answer")


_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")


def control_characters(row: Example, _: Around) -> Finding | None:
    """A C0 control character, which text never needs apart from tab and line ends."""
    number, found = _first(row, _CONTROL)
    if found is None:
        return None
    place, code = found.start() + 1, ord(found[0])
    return Finding(f"turn {number} holds U+{code:04X} at character {place}; delete it", _without(row, _CONTROL))


def broken_encoding(row: Example, _: Around) -> Finding | None:
    """Text that was read in the wrong encoding once, such as `cafÃ©` (ftfy, Speer 2019)."""
    if all(turn.content.isascii() and turn.extra.isascii() for turn in row.messages):
        return None
    import ftfy

    turns = [turn.said(ftfy.fix_encoding) for turn in row.messages]
    number = next((at for at, (new, old) in enumerate(zip(turns, row.messages, strict=True), 1) if new != old), None)
    if number is None:
        return None
    shown = row.messages[number - 1].content[:80]
    return Finding(f"turn {number} was read in the wrong encoding once: {shown!r}; export it as UTF-8", _of(turns))


def special_tokens(row: Example, around: Around) -> Finding | None:
    """Text that the model would read as the mark of a turn, so that a row could speak for somebody else."""
    if around.marks is None:
        return None
    marks = around.marks
    for number, turn in enumerate(row.messages, 1):
        if found := marks.search(turn.content) or marks.search(turn.extra):
            turns = [neutral(turn, marks) for turn in row.messages]
            return Finding(
                f"turn {number} holds {found[0]!r}, a mark of the chat format; write it otherwise", _of(turns)
            )
    return None


REPEATED, LOOP = 8, 0.5
"""Times that three words must come again, and their share of an answer, for it to be a loop."""


def repetition(row: Example, _: Around) -> Finding | None:
    """An answer that goes round and round, as models write when they fail."""
    if len(row.answer) < 3 * REPEATED:
        return None
    words = row.answer.split() if " " in row.answer else list(row.answer)
    if len(words) < 3 * REPEATED:
        return None
    threes = Counter(zip(words, words[1:], words[2:], strict=False))
    [(three, count)] = threes.most_common(1)
    if count < REPEATED or 3 * count < LOOP * len(words):
        return None
    return Finding(f"the answer says {' '.join(three)[:80]!r} {count} times; write it once")


_HTML = re.compile(
    r"</?(?:p|div|br|span|table|td|tr|th|li|ul|ol|b|i|em|strong|a|img|script|style|h[1-6])(?:\s[^<>]*)?/?>"
    r"|&(?:nbsp|amp|lt|gt|quot|apos|#\d{1,6});",
    re.IGNORECASE,
)


def html(row: Example, _: Around) -> Finding | None:
    """Tags and entities that a page left behind."""
    return _leftover(row, _HTML, "HTML")


_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}|\{%[^{}]*%\}|\[/?INST\]|<</?SYS>>|^### ?(?:Instruction|Input|Response):", re.M)


def template_markers(row: Example, _: Around) -> Finding | None:
    """Marks of a prompt template that was not filled in, or of another model's chat format."""
    return _leftover(row, _TEMPLATE, "a template's mark")


_REFUSAL = re.compile(
    r"\b(?:as an? (?:ai|artificial intelligence)(?: language)?(?: model| assistant)?|"
    r"i am (?:just )?an ai language model|"
    r"i(?:'m| am) sorry,? but i (?:can(?:'t|not)|am unable)|i cannot (?:assist|help) with that)\b"
    r"|作为(?:一个|一名)?(?:AI|人工智能)|我(?:无法|不能)(?:回答|提供|协助)",
    re.IGNORECASE,
)


def refusal(row: Example, _: Around) -> Finding | None:
    """A refusal, or a phrase that assistants fall back on, which the model would learn to say more often."""
    found = _REFUSAL.search(row.answer[:500])
    return Finding(f"the answer says {found[0]!r}; drop the row if it should be answered") if found else None


def language(row: Example, around: Around) -> Finding | None:
    """A row in another language than those wanted (`pip install 'treering[language]'`)."""
    if not around.languages:
        return None
    from treering.data.language import language_of

    found = language_of(f"{_question(row)}\n{row.answer}", around.languages)
    wanted = ", ".join(around.languages)
    return (
        Finding(f"it is in {found}, and languages is [{wanted}]; translate it, or add the language") if found else None
    )


def personal_data(row: Example, _: Around) -> Finding | None:
    """Addresses, numbers and the like that belong to a person (`pip install 'treering[personal]'`)."""
    from treering.data.personal import masked

    kinds = set[str]()

    def mask(text: str) -> str:
        text, found = masked(text)
        kinds.update(found)
        return text

    turns = [turn.said(mask) for turn in row.messages]
    return Finding(f"it holds {', '.join(sorted(kinds))}; take it out", _of(turns)) if kinds else None


def unknown_label(row: Example, around: Around) -> Finding | None:
    """A label that the task may not have (`labels`)."""
    allowed = around.labels.get(around.task)
    if allowed is None or row.label in {normalise(label) for label in allowed}:
        return None
    return Finding(f"the answer {row.answer[:80]!r} is none of the {len(allowed)} labels of {around.task}; correct it")


def template_refuses(row: Example, around: Around) -> Finding | None:
    """The model's chat template does not take such turns."""
    refused = around.lengths.refusal(row)
    return (
        Finding(f"the model's chat template refuses it ({refused}); change the turns, or the model")
        if refused
        else None
    )


def too_long(row: Example, around: Around) -> Finding | None:
    """More tokens than one training row may have; cutting may teach an answer without its end."""
    lengths = around.lengths
    if lengths.fits(row):
        return None
    reason = f"{lengths.of(row)} tokens are more than cutoff_len={lengths.most}; shorten the row or raise cutoff_len"
    return Finding(reason, lengths.shortened(row) if around.cuts else None)


RULES: dict[str, Known] = {
    "empty-question": Known(empty_question, "reject"),
    "answer-equals-question": Known(answer_equals_question, "reject"),
    "control-characters": Known(control_characters, "reject", MENDING),
    "broken-encoding": Known(broken_encoding, "repair", MENDING),
    "special-tokens": Known(special_tokens, "repair", MENDING),
    "repetition": Known(repetition, "reject"),
    "html": Known(html, "warn"),
    "template-markers": Known(template_markers, "warn"),
    "refusal": Known(refusal, "warn"),
    "language": Known(language, "reject"),
    "personal-data": Known(personal_data, "off", MENDING),
    "unknown-label": Known(unknown_label, "reject"),
    "template-refuses": Known(template_refuses, "reject", ("reject",)),
    "too-long": Known(too_long, "reject", ("repair", "reject")),
}
"""Those that see one row, in the order in which rows meet them; what a rule mends the later ones see mended."""


SLIP, BALANCE = "look-alike-label", "imbalance"


@dataclass(frozen=True)
class OfTask:
    """A rule that sees all rows of a task (`data.labels`): its usual level, and those that it may have."""

    level: str
    levels: tuple[str, ...]


ALL: dict[str, Known | OfTask] = {
    **RULES,
    SLIP: OfTask("warn", LEVELS),
    BALANCE: OfTask("warn", ("warn", "off")),
}
"""These, and those that see all rows of a task once they are taken in."""


def _question(row: Example) -> str:
    return next((turn.content.strip() for turn in reversed(row.messages) if turn.role == "user"), "")


def _of(turns: list[Message]) -> Example:
    return Example(tuple(turns))


def _without(row: Example, what: re.Pattern[str]) -> Example:
    return _of([turn.said(partial(what.sub, "")) for turn in row.messages])


def _first(row: Example, what: re.Pattern[str]) -> tuple[int, re.Match[str] | None]:
    """The turn whose texts, tools and calls and rejected answers included, are the first to hold it, and where."""
    for number, turn in enumerate(row.messages, 1):
        for text in turn.texts:
            if found := what.search(text):
                return number, found
    return 0, None


def _leftover(row: Example, what: re.Pattern[str], name: str) -> Finding | None:
    number, found = _first(row, what)
    said = found and f"turn {number} holds {name}: {found[0][:80]!r}; take it out unless it belongs there"
    return Finding(said) if said else None
