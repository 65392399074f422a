"""Tokens to text as they come: whole characters only, nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokenizers.decoders import DecodeStream

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Writer:
    """The text of one answer. What may be the beginning of a stop string is held back until it is known."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = [text for text in stop if text]
        self._held = ""
        self._open: list[int] = []  # Tokens that are no whole character yet.

    def push(self, token: int) -> str:
        """Text that is certain after `token`; `stopped` tells whether a stop string was met."""
        text = self._stream.step(self._tokenizer, token)
        self._open = [*self._open, token] if text is None else []
        self._held += text or ""
        found = [at for at in (self._held.find(text) for text in self._stop) if at >= 0]
        if found:
            self.stopped = True
            return self._release(min(found))
        return self._release(len(self._held) - self._doubtful())

    def rest(self) -> str:
        """What was held back, when the answer ends without a stop string."""
        if self.stopped:
            return ""
        self._held += self._tokenizer.decode(self._open, skip_special_tokens=True)
        return self._release(len(self._held))

    def _release(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text

    def _doubtful(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = 0
        for text in self._stop:
            for length in range(min(len(text) - 1, len(self._held)), longest, -1):
                if self._held.endswith(text[:length]):
                    longest = length
                    break
        return longest
