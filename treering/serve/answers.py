"""Pieces from the engine in the shapes that OpenAI's clients read, whole or as a stream."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from typing import Any

from treering.files import json_line
from treering.serve.engine import Piece, Token
from treering.serve.tokens import bytes_of

_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)

_INNER = range(0x80, 0xC0)
"""Bytes that go on with a character in UTF-8."""


class Shape:
    """One response in the making, with `n` choices a prompt. `kind` is `chat.completion` or `text_completion`.

    With `tools` the text is searched for tool calls, and with `one_call` the first of them is the only one.
    """

    def __init__(
        self,
        id: str,
        kind: str,
        model: str,
        version: str,
        *,
        n: int = 1,
        tools: bool = False,
        one_call: bool = False,
    ) -> None:
        self._chat = kind == "chat.completion"
        self._n = n
        self._tools = tools
        self._one_call = one_call
        self._offsets: Counter[int] = Counter()
        self._head = {"id": id, "created": int(time.time()), "model": model, "system_fingerprint": version}
        self._kind = kind

    def whole(self, answers: Sequence[Sequence[Piece]]) -> dict[str, Any]:
        """The response to a request that does not stream; `answers` has the pieces of each choice."""
        choices = [self._choice(index, pieces) for index, pieces in enumerate(answers)]
        return {**self._head, "object": self._kind, "choices": choices, "usage": self.usage(answers)}

    def chunk(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        """The event of a stream for the last of the pieces that a choice has so far; None: it makes none."""
        piece = pieces[-1]
        if self._tools:  # Whether a text is a tool call is known at its end.
            return self._event([self._whole_delta(index, pieces)]) if piece.finish else None
        choice: dict[str, Any] = {"index": index, "finish_reason": piece.finish}
        if self._chat:
            delta = {"role": "assistant"} if len(pieces) == 1 else {}
            if piece.text or delta:
                delta["content"] = piece.text
            return self._event([{**choice, "delta": delta, "logprobs": _chat_logprobs([piece])}])
        logprobs = _text_logprobs([piece], self._offsets[index])
        self._offsets[index] += sum(_begun(token) for token in piece.tokens)
        return self._event([{**choice, "text": piece.text, "logprobs": logprobs}])

    def usage_chunk(self, answers: Sequence[Sequence[Piece]]) -> dict[str, Any]:
        """The last event of a stream whose client asked for usage."""
        return {**self._event([]), "usage": self.usage(answers)}

    def _event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            **self._head,
            "object": "chat.completion.chunk" if self._chat else "text_completion",
            "choices": choices,
        }

    def usage(self, answers: Sequence[Sequence[Piece]]) -> dict[str, int]:
        """Tokens read and written; a prompt with several choices counts once."""
        ends = [pieces[-1] if pieces else Piece() for pieces in answers]
        prompts = [ends[at : at + self._n] for at in range(0, len(ends), self._n)]
        read = sum(max(end.prompt_tokens for end in choices) for choices in prompts)
        written = sum(end.completion_tokens for end in ends)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def _whole_delta(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        choice = self._choice(index, pieces)
        delta = {key: value for key, value in choice.pop("message").items() if value is not None}
        if "tool_calls" in delta:
            delta["tool_calls"] = [{"index": n, **call} for n, call in enumerate(delta["tool_calls"])]
        return {**choice, "delta": delta}

    def _choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        choice: dict[str, Any] = {"index": index, "finish_reason": pieces[-1].finish}
        if not self._chat:
            return {**choice, "text": text, "logprobs": _text_logprobs(pieces)}
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        calls = _calls(text) if self._tools else []
        if calls:
            choice["finish_reason"] = "tool_calls"
            message["content"] = _CALL.sub("", text).strip() or None
            message["tool_calls"] = calls[:1] if self._one_call else calls
        return {**choice, "message": message, "logprobs": _chat_logprobs(pieces)}


def _calls(text: str) -> list[dict[str, Any]]:
    """The tool calls in a text; none if any of them is not what it should be, for then all of it stays text."""
    calls = []
    for found in _CALL.finditer(text):
        try:
            call = json.loads(found[1])
            name, arguments = call["name"], call.get("arguments", {})
            if isinstance(arguments, str):  # Some models write the JSON of the arguments as a text.
                arguments = json.loads(arguments)
            if not (isinstance(name, str) and isinstance(arguments, dict)):
                return []
            json_line([name, arguments])  # Escapes may hold what no response may.
        except (ValueError, KeyError, RecursionError):
            return []
        function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
        calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function})
    return calls


def _chat_logprobs(pieces: Sequence[Piece]) -> dict[str, Any] | None:
    tokens = [token for piece in pieces for token in piece.tokens]
    if not tokens:
        return None
    content = [
        {**_entry(token.text, token.logprob), "top_logprobs": [_entry(text, value) for text, value in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _entry(name: str, logprob: float) -> dict[str, Any]:
    return {"token": name, "logprob": logprob, "bytes": list(bytes_of(name))}


def _text_logprobs(pieces: Sequence[Piece], start: int = 0) -> dict[str, Any] | None:
    """`start`: how many characters the answer had before."""
    tokens: list[Token] = [token for piece in pieces for token in piece.tokens]
    if not tokens:
        return None
    offsets = []
    for token in tokens:
        # A token that goes on with a character stands where that one began.
        offsets.append(max(start - _goes_on(token), 0))
        start += _begun(token)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_by_text(token.top) for token in tokens],
        "text_offset": offsets,
    }


def _by_text(top: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Several tokens may have one text; it stands for the likeliest, the first of them."""
    found: dict[str, float] = {}
    for text, logprob in top:
        found.setdefault(text, logprob)
    return found


def _goes_on(token: Token) -> bool:
    """Whether a token begins inside a character."""
    raw = bytes_of(token.text)
    return bool(raw) and raw[0] in _INNER


def _begun(token: Token) -> int:
    """How many characters begin in a token."""
    return sum(byte not in _INNER for byte in bytes_of(token.text))
