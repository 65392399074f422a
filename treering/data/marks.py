"""Texts that a tokenizer reads as marks of its chat format, and what is written by people without them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from treering.data.example import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def marks_of(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """Texts that the tokenizer reads as a special token; None: there are none."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    texts = {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True)))) if texts else None


def neutral(turn: Message, marks: re.Pattern[str]) -> Message:
    """The turn with a blank in each mark, so that it is read as plain text."""
    return turn.said(lambda text: marks.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text))
