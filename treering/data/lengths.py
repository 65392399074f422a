"""How many tokens rows have as training sees them, counted only where that is in question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from treering.data.example import Example, Message
from treering.rendering import rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


FOR_A_TOKEN = 64
"""Characters that no tokenizer makes one token of, save for long runs of one sign."""


class Lengths:
    """Lengths by a tokenizer and its chat template; `most` is what a row may have."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, most: int) -> None:
        self.tokenizer, self.most = tokenizer, most
        self._templates: dict[tuple[str, ...], tuple[int, str | None]] = {}

    def of(self, row: Example) -> int:
        """The tokens of a whole conversation. Raises what the chat template does."""
        from treering.model import token_count

        return token_count(self.tokenizer, row)

    def fits(self, row: Example) -> bool:
        """Whether it has at most as many as it may."""
        if row.tells_more:
            return self.of(row) <= self.most
        size = sum(len(turn.content.encode("utf-8", "surrogatepass")) for turn in row.messages)
        around, _ = self._template(row)
        # No token is shorter than a byte, so most rows need not be tokenised to know.
        return size + around <= self.most or self.of(row) <= self.most

    def far_too_long(self, row: Example) -> str | None:
        """What is to be said of a row whose tokens need no counting, which takes long for a text without end."""
        size = sum(len(turn.content) + len(turn.extra) for turn in row.messages)
        if size <= FOR_A_TOKEN * self.most:
            return None
        return f"{size:,} characters are far more than cutoff_len={self.most} tokens; split the row"

    def refusal(self, row: Example) -> str | None:
        """What the chat template says against such turns; None: nothing. It is asked once for each order of roles."""
        return self._template(row)[1]

    def shortened(self, row: Example) -> Example | None:
        """As much of it as fits, None where nothing does: the longest turn before the answer is cut, or it."""
        turns = list(row.messages)
        prompt = range(len(turns) - 1)
        longest = max(prompt, key=lambda at: len(turns[at].content), default=len(turns) - 1)
        for at in (longest, len(turns) - 1):
            low, high = 0, min(len(turns[at].content), FOR_A_TOKEN * self.most)
            while low < high:
                middle = (low + high + 1) // 2
                low, high = (middle, high) if self.fits(_cut(turns, at, middle)) else (low, middle - 1)
            if low > 0:
                return _cut(turns, at, low)
        return None

    def _template(self, row: Example) -> tuple[int, str | None]:
        """The bytes that the template puts around such turns, and what it says against them."""
        if row.is_text:
            return len(str(self.tokenizer.bos_token or "").encode()), None
        if row.tells_more:
            return self._around(row.as_dicts())
        roles = tuple(turn.role for turn in row.messages)
        if roles not in self._templates:
            self._templates[roles] = self._around([{"role": role, "content": "x"} for role in roles])
        return self._templates[roles]

    def _around(self, turns: Sequence[Mapping[str, Any]]) -> tuple[int, str | None]:
        try:
            return len(rendered(self.tokenizer, turns, open_answer=False).encode()), None
        # Templates raise whatever they like; some want turns to alternate, or no system.
        except Exception as error:
            return 0, str(error)


def _cut(turns: list[Message], at: int, length: int) -> Example:
    shorter = replace(turns[at], content=turns[at].content[:length].strip())
    return Example((*turns[:at], shorter, *turns[at + 1 :]))
