"""OpenAI's routes."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from fastapi import APIRouter, Request

from treering import feedback
from treering.feedback import Feedback
from treering.serve.answers import Shape
from treering.serve.api import ChatRequest, CompletionRequest, EmbeddingRequest
from treering.serve.body import plain
from treering.serve.errors import ApiError
from treering.serve.guard import guarded, may, opened
from treering.serve.respond import Made, answer, unless_gone
from treering.serve.state import ERRORS, Here, Record, Server
from treering.serve.telemetry import Seen

router = APIRouter(prefix="/v1", route_class=guarded(may("api", counted=True), opened, plain), responses=ERRORS)

STREAMS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
"""What else a right request may get, for the page that describes the API."""


@router.get("/models")
async def models(server: Here) -> dict[str, Any]:
    """What `model` may name."""
    data = [_model(server, name, version) for name, version in server.following.names().items()]
    return {"object": "list", "data": data}


@router.get("/models/{name}")
async def model(name: str, server: Here) -> dict[str, Any]:
    """One of them."""
    return _model(server, name, server.following.version(name))


@router.post("/feedback", status_code=202)
async def give_feedback(body: Feedback, server: Here, seen: Record) -> dict[str, str]:
    """Take a user's word on an answer; whether and when it is trained on is the workspace's rule."""
    if server.settings.feedback == "off":
        raise ApiError("this server takes no feedback (serve.feedback is off)", status=403, code="feedback_off")
    with server.limits.entered(1), _about(server, body) as version:
        said = body.model_copy(update={"version": version})
        entry = await asyncio.to_thread(feedback.keep, server.ws, said, seen.key)
    return {"id": entry.id, "state": entry.state}


@contextmanager
def _about(server: Server, said: Feedback) -> Iterator[str | None]:
    """The version that a feedback is about. Thumbs are counted, so theirs is not taken on trust."""
    if said.rating is None:
        yield server.following.version(said.version) if said.version else None
        return
    with server.answered.rating(said.response_id) as version:
        if said.version not in (None, version):
            raise ApiError(
                f"{said.response_id!r} was answered by {version}, not by {said.version!r}; leave the version out",
                status=400,
                code="wrong_version",
            )
        yield version


def _model(server: Server, name: str, version: str) -> dict[str, Any]:
    folder = server.ws.versions / version
    created = int(folder.stat().st_mtime) if folder.exists() else 0  # The base model is no version.
    return {"id": name, "object": "model", "created": created, "owned_by": "treering", "version": version}


@router.post("/chat/completions", response_model=None, responses=STREAMS)
async def chat_completions(body: ChatRequest, request: Request, server: Here, seen: Record) -> Any:
    """Answer a conversation."""
    name = f"chatcmpl-{seen.id.removeprefix('req-')}"

    def make(version: str, attempt: str) -> Made:
        tools = {"tools": bool(body.active_tools), "one_call": body.parallel_tool_calls is False}
        shape = Shape(name, "chat.completion", body.model, version, n=body.n or 1, **tools)
        return shape, body.jobs(name + attempt, version)

    return await _noted(name, server, seen, answer(request, server, seen, body, make))


@router.post("/completions", response_model=None, responses=STREAMS)
async def completions(body: CompletionRequest, request: Request, server: Here, seen: Record) -> Any:
    """Go on with a text."""
    name = f"cmpl-{seen.id.removeprefix('req-')}"

    def make(version: str, attempt: str) -> Made:
        shape = Shape(name, "text_completion", body.model, version, n=body.n or 1)
        return shape, body.jobs(name + attempt, version)

    return await _noted(name, server, seen, answer(request, server, seen, body, make))


async def _noted(name: str, server: Server, seen: Seen, made: Awaitable[Any]) -> Any:
    """The answer, noted before it is sent: its thumb may come at once."""
    response = await made
    server.answered.note(name, seen.version or "")
    return response


@router.post("/embeddings", response_model=None)
async def embeddings(body: EmbeddingRequest, request: Request, server: Here, seen: Record) -> Any:
    """Vectors of texts: the mean of the last hidden states."""
    version = seen.version = server.following.version(body.model)
    seen.model = body.model
    texts = body.texts()
    # A text counts as an answer does, but a long list only as a full batch: else it would wait for an empty server.
    with server.limits.entered(min(len(texts), server.settings.max_batch_size)):
        found = await unless_gone(request, server.settings.request_timeout, server.engine.embed(version, texts))
    seen.prompt_tokens = found.tokens
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()
            if body.encoding_format == "base64"
            else vector,
        }
        for index, vector in enumerate(found.vectors)
    ]
    return {
        "object": "list",
        "data": data,
        "model": body.model,
        "system_fingerprint": version,
        "usage": {"prompt_tokens": found.tokens, "total_tokens": found.tokens},
    }
