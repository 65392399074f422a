"""Jobs as vLLM's requests, and its streams as pieces: OpenAI's completions, with what vLLM adds to them."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TYPE_CHECKING, Any

from treering.data.example import Message
from treering.data.marks import neutral
from treering.serve.engine import EngineError, Job, Piece, Token
from treering.serve.grammars import checked
from treering.serve.vllm.client import DownError, refusal

if TYPE_CHECKING:
    from treering.config import Config

NEUTRAL = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""Said aloud: otherwise the model's generation_config.json decides, which the gate does not follow."""


def request(job: Job, name: str, config: Config, context: int, marks: str | None = None) -> tuple[str, dict[str, Any]]:
    """Path and body that ask the model `name` for one answer; `context` is the most tokens that vLLM reads.

    `marks`: a pattern of what texts of a conversation must not say (`data/marks.py`).
    """
    serve = config.serve
    body: dict[str, Any] = {
        **NEUTRAL,
        "model": name,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        # What the prompt leaves no room for vLLM takes off by itself; more than the context it refuses.
        "max_tokens": min(context, serve.max_new_tokens if job.max_tokens is None else job.max_tokens),
        "temperature": serve.temperature if job.temperature is None else job.temperature,
        "top_p": job.top_p,
        "seed": job.seed,
        "stop": job.stop,
        "frequency_penalty": job.frequency_penalty,
        "presence_penalty": job.presence_penalty,
        "logit_bias": {str(id): bias for id, bias in job.logit_bias.items()} or None,
    }
    if job.background and serve.vllm_url is None:  # A server of somebody else's may know no priorities.
        body["priority"] = 1
    if job.json_schema is not None:
        checked(job.json_schema)
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": job.json_schema}}
    if job.messages is None:
        return "/v1/completions", {**body, "prompt": job.prompt, "logprobs": job.logprobs}
    messages = job.messages
    if config.default_system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": config.default_system}, *messages]
    if marks is not None:
        messages = [neutral(Message.of(turn), re.compile(marks)).as_dict() for turn in messages]
    if job.tools:
        # The template shows them to the model; what it writes comes back as text, and is read by treering.
        body |= {"tools": job.tools, "tool_choice": "none"}
    if job.logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": job.logprobs}
    return "/v1/chat/completions", {**body, "messages": messages}


async def pieces(lines: AsyncIterator[str], top: int | None) -> AsyncGenerator[Piece, None]:
    """Pieces of one answer; `top` likeliest tokens are kept beside each. Raises `EngineError` for what breaks off."""
    last: Piece | None = None
    async for line in lines:
        if not line.startswith("data: {"):
            continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            raise refusal(event["error"])
        usage = event.get("usage")
        counts = {key: usage[key] for key in ("prompt_tokens", "completion_tokens")} if usage else {}
        for choice in event["choices"]:
            piece = _piece(choice, top).model_copy(update=counts)
            if piece.finish:
                last = piece  # Its counts come after it.
            elif piece.text or piece.tokens:
                yield piece
        if last and usage and not event["choices"]:
            yield last.model_copy(update=counts)
            return
    raise DownError("vLLM ended while it wrote this answer")


def _piece(choice: dict[str, Any], top: int | None) -> Piece:
    finish = choice.get("finish_reason")
    if finish not in (None, "stop", "length"):
        raise EngineError(f"vLLM ended this answer for a reason of its own: {finish}", status=503, code="engine_down")
    text = choice["delta"].get("content") if "delta" in choice else choice["text"]
    tokens = [] if top is None else _tokens(choice.get("logprobs") or {}, top)
    if finish == "stop" and not isinstance(choice.get("stop_reason"), str):
        tokens = tokens[:-1]  # The end mark is no part of the answer.
    return Piece(text=text or "", tokens=tokens, finish=finish)


def _tokens(found: dict[str, Any], top: int) -> list[Token]:
    """Log-probabilities in the shape of chats (`content`), or in that of plain completions."""
    if "content" in found:
        return [
            Token(
                text=entry["token"],
                logprob=entry["logprob"],
                top=[(other["token"], other["logprob"]) for other in entry["top_logprobs"][:top]],
            )
            for entry in found["content"]
        ]
    return [
        Token(text=text, logprob=logprob, top=sorted((others or {}).items(), key=lambda pair: -pair[1])[:top])
        for text, logprob, others in zip(
            found.get("tokens", []), found.get("token_logprobs", []), found.get("top_logprobs", []), strict=True
        )
    ]
