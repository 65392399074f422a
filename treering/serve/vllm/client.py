"""The vLLM server as calls: its routes, and its refusals as `EngineError`."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2

from treering.serve.engine import EngineError

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 10.0
LOAD_SECONDS = 300.0
PASSED_ON = (400, 413, 429, 503)
"""Statuses of vLLM that mean the same to whoever asked treering; any other is an error of the server."""

logging.getLogger("httpx2").setLevel(logging.WARNING)  # Else there is a line for every look whether vLLM is there.


class DownError(EngineError):
    """The vLLM server cannot be reached, or broke off."""

    def __init__(self, message: str) -> None:
        super().__init__(message, status=503, code="engine_down")


class MissingError(EngineError):
    """The vLLM server has no such model, or finds no such folder."""

    def __init__(self, message: str) -> None:
        super().__init__(message, status=503, code="engine_down")


class Client:
    """Asks the vLLM server at `url`. Every method raises `EngineError`: `DownError` if nobody answers there."""

    def __init__(self, url: str, key: str | None) -> None:
        self.url = url
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._http = httpx2.AsyncClient(
            headers=headers,
            timeout=httpx2.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS),
            limits=httpx2.Limits(max_connections=None),
            trust_env=False,  # A proxy for the internet does not lead to this server.
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def health(self) -> None:
        """Return if its engine runs; anything else is `DownError`."""
        try:
            await self._call("GET", "/health")
        except EngineError as error:
            raise DownError(str(error)) from None

    async def models(self) -> list[dict[str, Any]]:
        """What it serves: the base model, and adapters, which have a `parent`."""
        answer = await self._call("GET", "/v1/models")
        data: list[dict[str, Any]] = answer.json()["data"]
        return data

    async def load(self, name: str, folder: str, *, inplace: bool) -> None:
        """Load the adapter in `folder`; `inplace` if another is known by that name."""
        body = {"lora_name": name, "lora_path": folder, "load_inplace": inplace}
        await self._call("POST", "/v1/load_lora_adapter", body, seconds=LOAD_SECONDS)

    async def unload(self, name: str) -> None:
        """Forget an adapter; answers under way end with it."""
        await self._call("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    @asynccontextmanager
    async def stream(self, path: str, body: dict[str, Any]) -> AsyncIterator[AsyncIterator[str]]:
        """The lines of an answer as they come. Leaving early closes the connection, and vLLM stops generating."""
        timeout = httpx2.Timeout(None, connect=CONNECT_SECONDS)  # How long an answer may take is the caller's matter.
        try:
            async with self._http.stream("POST", self.url + path, json=body, timeout=timeout) as answer:
                if answer.status_code != 200:
                    raise self._refusal(path, answer.status_code, await answer.aread())
                yield answer.aiter_lines()
        except httpx2.TransportError as error:
            raise self._down(error) from None

    async def _call(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, seconds: float = ANSWER_SECONDS
    ) -> httpx2.Response:
        try:
            answer = await self._http.request(method, self.url + path, json=body, timeout=seconds)
        except httpx2.TransportError as error:
            raise self._down(error) from None
        if answer.status_code != 200:
            raise self._refusal(path, answer.status_code, answer.content)
        return answer

    def _down(self, error: httpx2.TransportError) -> DownError:
        return DownError(f"vLLM at {self.url} does not answer ({type(error).__name__}: {error})")

    def _refusal(self, path: str, status: int, body: bytes) -> EngineError:
        if status in (401, 403):
            return EngineError(
                f"vLLM at {self.url} refuses treering's key; put the right one into the file that "
                "serve.vllm_key_file names",
                status=503,
                code="engine_refused",
            )
        try:
            message = str(json.loads(body)["error"]["message"])
        except (ValueError, KeyError, TypeError):
            if status == 404:
                return EngineError(
                    f"vLLM at {self.url} has no {path}; start it with --enable-lora, and with "
                    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment"
                )
            message = body.decode(errors="replace")[:300] or f"status {status}"
        return MissingError(message) if status == 404 else refusal({"message": message, "code": status})


def refusal(error: dict[str, Any]) -> EngineError:
    """What vLLM says is wrong, as our error; `code` is its HTTP status."""
    status = error.get("code")
    if status not in PASSED_ON:
        return EngineError(f"vLLM failed: {error.get('message')}")
    return EngineError(
        str(error.get("message")), status=status, code="invalid_request" if status < 429 else "engine_busy"
    )
