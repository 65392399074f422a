"""One training example in the one shape everything else uses: OpenAI chat `messages`."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from treering.data.tools import CALLED, OFFERED, calls_as_text, compact, offer_as_text, strings

ROLES = ("system", "user", "assistant", "tool")
TEXT = "text"
"""The role of the one turn of a plain text, which is no conversation: all of it is learned."""
REJECTED = "rejected"
EXTRA = (OFFERED, CALLED, "name", "tool_call_id", REJECTED)
WEIGHT = "weight"
"""Of an assistant's turn, 0: it is read and not learned."""


_encode = json.JSONEncoder(ensure_ascii=False).encode  # `dumps` would make an encoder for each row.


@dataclass(frozen=True)
class Message:
    """One turn. `role` is one of `ROLES`; `content` is its text.

    `extra` is what else OpenAI's format has of it, as JSON: `tools` that a system turn offers, `tool_calls` of an
    assistant's, and its `weight` if that is 0, `name` and `tool_call_id` of a tool's; and of the last one the answer
    that was `rejected` for it, where the row is a preference pair.
    """

    role: str
    content: str
    extra: str = ""

    @classmethod
    def of(cls, turn: Mapping[str, Any]) -> Message:
        """Build from an OpenAI-style dictionary."""
        extra = {key: turn[key] for key in EXTRA if turn.get(key)} if len(turn) > 2 else {}
        if turn.get(WEIGHT) == 0:
            extra[WEIGHT] = 0
        return cls(turn["role"], turn["content"], compact(extra) if extra else "")

    def as_dict(self) -> dict[str, Any]:
        """The turn as an OpenAI-style dictionary."""
        return {"role": self.role, "content": self.content} | (json.loads(self.extra) if self.extra else {})

    def said(self, how: Callable[[str], str]) -> Message:
        """The turn with every text of it, in tools and calls too, said so."""
        extra = compact(strings(json.loads(self.extra), how)) if self.extra else ""
        return Message(self.role, how(self.content), extra)

    @property
    def texts(self) -> list[str]:
        """Every text of it, in tools and calls too."""
        found = list[str]()

        def note(text: str) -> str:
            found.append(text)
            return text

        self.said(note)
        return found

    @property
    def is_learned(self) -> bool:
        """Whether it has no weight of 0."""
        return not self.extra or WEIGHT not in json.loads(self.extra)

    @property
    def text(self) -> str:
        """All that it says as plain text, tools and calls included."""
        if not self.extra:
            return self.content
        extra = json.loads(self.extra)
        parts = [self.content, offer_as_text(extra.get(OFFERED, ())) if OFFERED in extra else ""]
        return "\n".join(filter(None, [*parts, calls_as_text(extra.get(CALLED, ()))]))


@dataclass(frozen=True)
class Example:
    """A conversation whose last turn is the assistant's, or a plain text (`TEXT`).

    Every assistant turn is trained but those of `weight` 0; the last one is the answer that is scored.
    """

    messages: tuple[Message, ...]

    @classmethod
    def of(cls, messages: Sequence[Mapping[str, Any]]) -> Example:
        """Build from OpenAI-style dictionaries with `role` and `content`."""
        return cls(tuple(map(Message.of, messages)))

    @cached_property
    def id(self) -> str:
        """32 hex digits of the content; the task is left out, so a row is the same row in every task."""
        turns = [
            [m.role, unicodedata.normalize("NFC", m.content).strip(), *((m.extra,) if m.extra else ())]
            for m in self.messages
        ]
        return hashlib.blake2b(_encode(turns).encode(), digest_size=16).hexdigest()

    @property
    def tells_more(self) -> bool:
        """Whether some turn offers tools, calls one, or gives a result by name."""
        return any(message.extra for message in self.messages)

    @property
    def is_text(self) -> bool:
        """Whether it is a plain text."""
        return self.messages[0].role == TEXT

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The turns before the answer; of a plain text itself, as somebody would ask about it."""
        return (Message("user", self.messages[0].content),) if self.is_text else self.messages[:-1]

    @property
    def answer(self) -> str:
        """The text of the last turn."""
        return self.messages[-1].text

    @property
    def rejected(self) -> Example | None:
        """The same with the answer that was rejected, where the row is a preference pair."""
        last = self.messages[-1]
        found = json.loads(last.extra).get(REJECTED) if last.extra else None
        return None if found is None else Example((*self.messages[:-1], Message(last.role, found)))

    @property
    def label(self) -> str:
        """The answer as scores compare it: NFKC, case folded, white space collapsed, end punctuation dropped."""
        return normalise(self.answer)

    def as_dicts(self) -> list[dict[str, Any]]:
        """The messages as OpenAI-style dictionaries."""
        return [message.as_dict() for message in self.messages]

    def as_json(self) -> str:
        """The same as the catalog keeps it."""
        return _encode(self.as_dicts())


def normalise(text: str) -> str:
    """The form in which two answers are compared (see `Example.label`)."""
    folded = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split()).strip(" .!?,;:\"'`")
