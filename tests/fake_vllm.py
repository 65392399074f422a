"""A fake of the vLLM server: its routes and its bodies, and words in place of a model.

It says which adapter answered, by the name of its folder. As vLLM does on CPU, it lets the adapter loaded last answer
for the base model when both are asked at once; an adapter of zeros changes nothing, wherever it lies.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

SECONDS_A_TOKEN = 0.01
CONTEXT = 2048


def create_app(model: str, key: str | None, *, updates: bool = True) -> FastAPI:
    """The server of `model`."""
    app = FastAPI()
    adapters: dict[str, str] = {}
    running: list[str] = []
    seen: dict[str, Any] = {"requests": [], "loads": [], "unloads": [], "left": 0}

    @app.middleware("http")
    async def check_key(request: Request, call_next: Any) -> Response:
        if key and request.url.path.startswith("/v1") and request.headers.get("authorization") != f"Bearer {key}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        answer: Response = await call_next(request)
        return answer

    @app.get("/health")
    async def health() -> Response:
        return Response()

    @app.get("/seen")
    async def what_was_seen() -> dict[str, Any]:
        return {**seen, "running": running, "adapters": adapters}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        cards = [{"id": model, "root": model, "parent": None, "max_model_len": CONTEXT}]
        cards += [{"id": name, "root": path, "parent": model, "max_model_len": None} for name, path in adapters.items()]
        return {"object": "list", "data": cards}

    if updates:

        @app.post("/v1/load_lora_adapter")
        async def load(request: Request) -> Response:
            body = await request.json()
            seen["loads"].append(body)
            name, path = body["lora_name"], body["lora_path"]
            if name in adapters and not body["load_inplace"]:
                return refused(400, f"The lora adapter '{name}' has already been loaded.")
            if not (Path(path) / "adapter_model.safetensors").exists():
                return refused(404, f"Loading lora {name} failed: No adapter found for {path}")
            if json.loads((Path(path) / "adapter_config.json").read_bytes()).get("use_dora"):
                return refused(500, "vLLM does not yet support DoRA.")
            adapters[name] = path
            return Response("Success")

        @app.post("/v1/unload_lora_adapter")
        async def unload(request: Request) -> Response:
            name = (await request.json())["lora_name"]
            seen["unloads"].append(name)
            return Response("Success") if adapters.pop(name, None) else refused(404, f"'{name}' cannot be found.")

    @app.post("/v1/chat/completions", response_model=None)
    @app.post("/v1/completions", response_model=None)
    async def complete(request: Request) -> Response:
        body = await request.json()
        seen["requests"].append(body)
        name = body["model"]
        if name != model and name not in adapters:
            return refused(404, f"The model `{name}` does not exist.")
        if body["max_tokens"] > CONTEXT:
            return refused(400, "max_tokens cannot be greater than max_model_len")
        return StreamingResponse(answer(body, chat="messages" in body), media_type="text/event-stream")

    async def answer(body: dict[str, Any], chat: bool) -> AsyncIterator[str]:
        asked = body["messages"][-1]["content"] if chat else str(body["prompt"])
        name = body["model"]
        running.append(name)
        try:
            if asked == "fail":
                yield event(
                    {"error": {"message": "Grammar error: Invalid type", "type": "BadRequestError", "code": 400}}
                )
                return
            if chat:
                yield event(chunk(chat, "", None))
            words = f"{speaker(name)} heard {asked}".split(" ")
            words = words * 500 if asked == "tell me more" else words
            finish = "stop" if len(words) < body["max_tokens"] else "length"
            words = words[: body["max_tokens"]]
            for number, word in enumerate(words):
                await asyncio.sleep(SECONDS_A_TOKEN)
                last = finish if finish == "length" and number == len(words) - 1 else None
                yield event(chunk(chat, word if number == 0 else f" {word}", last))
            if finish == "stop":
                yield event(chunk(chat, "", finish))
            counts = {"prompt_tokens": len(asked), "completion_tokens": len(words) + (finish == "stop")}
            yield event({"choices": [], "usage": counts})
            yield "data: [DONE]\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            seen["left"] += 1
            raise
        finally:
            running.remove(name)

    def speaker(name: str) -> str:
        if name == model and any(other != model for other in running) and adapters:
            name = list(adapters)[-1]
        return "base" if name == model or is_zero(Path(adapters[name])) else Path(adapters[name]).name

    app.state.adapters = adapters
    return app


def is_zero(adapter: Path) -> bool:
    """Whether all matrices of the adapter are zero."""
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    return not any(weights[8 + int.from_bytes(weights[:8], "little") :])


def refused(status: int, message: str) -> JSONResponse:
    """An error in vLLM's shape."""
    return JSONResponse({"error": {"message": message, "type": "x", "param": None, "code": status}}, status)


def chunk(chat: bool, text: str, finish: str | None) -> dict[str, Any]:
    """One event of a stream, with log-probabilities as if they were asked for."""
    token = text or "<end>"
    found: dict[str, Any] | None
    choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "stop_reason": None}
    if chat:
        top = [{"token": token, "logprob": -0.5}, {"token": "other", "logprob": -1.5}]
        entry = {"token": token, "logprob": -0.5, "top_logprobs": top}
        found = {"content": [entry]} if text or finish else None
        return {"choices": [{**choice, "delta": {"content": text}, "logprobs": found}]}
    found = {"tokens": [token], "token_logprobs": [-0.5], "top_logprobs": [{"other": -1.5, token: -0.5}]}
    return {"choices": [{**choice, "text": text, "logprobs": found}]}


def event(content: dict[str, Any]) -> str:
    """As it goes over the wire."""
    return f"data: {json.dumps(content)}\n\n"


if __name__ == "__main__":
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--model", required=True)
    arguments.add_argument("--port", type=int, required=True)
    known, _ = arguments.parse_known_args()
    allowed = os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING") == "True"
    served = create_app(known.model, os.environ.get("VLLM_API_KEY"), updates=allowed)
    uvicorn.run(served, host="127.0.0.1", port=known.port, log_level="warning")
