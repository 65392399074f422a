"""One training example in the one shape everything else uses: OpenAI chat `messages`."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

ROLES = ("system", "user", "assistant", "tool")


_encode = json.JSONEncoder(ensure_ascii=False).encode  # `dumps` would make an encoder for each row.


@dataclass(frozen=True)
class Message:
    """One turn. `role` is one of `ROLES`; `content` is its text."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """A conversation whose last turn is the assistant's.

    Every assistant turn is trained; the last one is the answer that is scored.
    """

    messages: tuple[Message, ...]

    @classmethod
    def of(cls, messages: Sequence[Mapping[str, str]]) -> Example:
        """Build from OpenAI-style dictionaries with `role` and `content`."""
        return cls(tuple(Message(m["role"], m["content"]) for m in messages))

    @cached_property
    def id(self) -> str:
        """32 hex digits of the content; the task is left out, so a row is the same row in every task."""
        turns = [[m.role, unicodedata.normalize("NFC", m.content).strip()] for m in self.messages]
        return hashlib.blake2b(_encode(turns).encode(), digest_size=16).hexdigest()

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The turns before the answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The text of the last turn."""
        return self.messages[-1].content

    @property
    def label(self) -> str:
        """The answer as scores compare it: NFKC, case folded, white space collapsed, end punctuation dropped."""
        return normalise(self.answer)

    def as_dicts(self) -> list[dict[str, str]]:
        """The messages as OpenAI-style dictionaries."""
        return [{"role": m.role, "content": m.content} for m in self.messages]


def normalise(text: str) -> str:
    """The form in which two answers are compared (see `Example.label`)."""
    folded = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split()).strip(" .!?,;:\"'`")
