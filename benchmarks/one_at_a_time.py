"""A stand-in for LLaMA-Factory's API: transformers' `generate` behind a semaphore of one.

    python benchmarks/one_at_a_time.py MODEL_FOLDER PORT

The base model answers without any adapter, as it does there once an adapter was merged: nothing is slower here than in
the original.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from threading import Thread
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

app = FastAPI()
one = asyncio.Semaphore(1)
model: Any = None
tokenizer: Any = None


@app.get("/v1/models")
async def models() -> dict[str, Any]:
    """Says that it is ready."""
    return {"object": "list", "data": [{"id": "current", "object": "model"}]}


@app.post("/v1/chat/completions")
async def chat(request: Request) -> StreamingResponse:
    """One streamed answer."""
    return StreamingResponse(_answer(await request.json()), media_type="text/event-stream")


async def _answer(body: dict[str, Any]) -> AsyncIterator[str]:
    async with one:
        inputs = tokenizer.apply_chat_template(
            body["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        settings = {**inputs, "streamer": streamer, "max_new_tokens": body["max_tokens"], "do_sample": False}
        thread = Thread(target=model.generate, kwargs=settings)
        thread.start()
        pieces = iter(streamer)
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            event = {"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]}
            yield f"data: {json.dumps(event)}\n\n"
        thread.join()
    yield "data: [DONE]\n\n"


if __name__ == "__main__":
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()
    uvicorn.run(app, port=int(sys.argv[2]), log_level="warning")
