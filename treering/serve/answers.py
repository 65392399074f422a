"""Pieces from the engine in the shapes that OpenAI's clients read, whole or as a stream."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from treering.serve.engine import Piece, Token

_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


class Error(BaseModel):
    """What went wrong, in OpenAI's shape."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every response that is an error."""

    error: Error


class Shape:
    """One response in the making. `kind` is `chat.completion` or `text_completion`."""

    def __init__(self, id: str, kind: str, model: str, version: str, tools: bool = False) -> None:
        self.chat = kind == "chat.completion"
        self.tools = tools
        self._head = {"id": id, "created": int(time.time()), "model": model, "system_fingerprint": version}
        self._kind = kind

    def whole(self, answers: Sequence[Sequence[Piece]]) -> dict[str, Any]:
        """The response to a request that does not stream; `answers` has the pieces of each choice."""
        choices = [self._choice(index, pieces) for index, pieces in enumerate(answers)]
        return {**self._head, "object": self._kind, "choices": choices, "usage": usage(answers)}

    def chunk(self, index: int, piece: Piece, first: bool) -> dict[str, Any]:
        """One event of a stream."""
        if self.chat:
            delta: dict[str, Any] = {"role": "assistant"} if first else {}
            finish: str | None = piece.finish
            if self.tools and piece.finish:
                message, finish = _with_calls(piece.text, finish)
                delta |= {key: value for key, value in message.items() if value}
                delta["tool_calls"] = [
                    {"index": n, **call} for n, call in enumerate(message.get("tool_calls", []))
                ] or None
                delta = {key: value for key, value in delta.items() if value is not None}
            elif piece.text or first:
                delta["content"] = piece.text
            choice = {"index": index, "delta": delta, "finish_reason": finish, "logprobs": _chat_logprobs([piece])}
            return self._event([choice])
        choice = {
            "index": index,
            "text": piece.text,
            "finish_reason": piece.finish,
            "logprobs": _text_logprobs([piece]),
        }
        return self._event([choice])

    def usage_chunk(self, answers: Sequence[Sequence[Piece]]) -> dict[str, Any]:
        """The last event of a stream whose client asked for usage."""
        return {**self._event([]), "usage": usage(answers)}

    def _event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk" if self.chat else "text_completion", "choices": choices}

    def _choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        finish: str | None = pieces[-1].finish
        if not self.chat:
            return {"index": index, "text": text, "finish_reason": finish, "logprobs": _text_logprobs(pieces)}
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self.tools:
            called, finish = _with_calls(text, finish)
            message |= called
        return {"index": index, "message": message, "finish_reason": finish, "logprobs": _chat_logprobs(pieces)}


def usage(answers: Sequence[Sequence[Piece]]) -> dict[str, int]:
    """Tokens read and written; a prompt with several choices counts once."""
    prompt = max((pieces[-1].prompt_tokens for pieces in answers), default=0)
    written = sum(pieces[-1].completion_tokens for pieces in answers)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def error(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """OpenAI's shape of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def kind_of(status: int) -> str:
    """OpenAI's name for the kind of error that an HTTP status tells."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    return kinds.get(status, "invalid_request_error" if status < 500 else "server_error")


def _with_calls(text: str, finish: str | None) -> tuple[dict[str, Any], str | None]:
    """The message with the `<tool_call>` blocks of its text as tool calls; what is no JSON stays text."""
    calls = []
    for found in _CALL.finditer(text):
        try:
            call = json.loads(found[1])
            name, arguments = call["name"], call.get("arguments", {})
        except (ValueError, KeyError, TypeError):
            return {"content": text}, finish
        function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
        calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function})
    if not calls:
        return {"content": text}, finish
    return {"content": _CALL.sub("", text).strip() or None, "tool_calls": calls}, "tool_calls"


def _chat_logprobs(pieces: Sequence[Piece]) -> dict[str, Any] | None:
    tokens = [token for piece in pieces for token in piece.tokens]
    if not tokens:
        return None
    content = [
        {**_entry(token.text, token.logprob), "top_logprobs": [_entry(text, value) for text, value in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _entry(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _text_logprobs(pieces: Sequence[Piece]) -> dict[str, Any] | None:
    tokens: list[Token] = [token for piece in pieces for token in piece.tokens]
    if not tokens:
        return None
    offsets = [0]
    for token in tokens:
        offsets.append(offsets[-1] + len(token.text))
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [dict(token.top) for token in tokens],
        "text_offset": offsets[:-1],
    }
