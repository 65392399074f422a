"""The vLLM engine, seen from the server: a vLLM server that runs already, or one started as a child."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from treering.serve.engine import Embeddings, EngineError, Job, Piece
from treering.serve.vllm import wire
from treering.serve.vllm.adapters import Adapters, rank
from treering.serve.vllm.base import Base, find, is_base
from treering.serve.vllm.child import Child, command
from treering.serve.vllm.client import Client, DownError, MissingError

if TYPE_CHECKING:
    from treering.config import Config

SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_UNTIL_STARTED = 0.2

log = logging.getLogger("treering.serve")


class VllmEngine:
    """Generates with vLLM. Versions are adapters that it loads while it runs."""

    def __init__(self, root: Path, config: Config) -> None:
        self._root = root
        self._config = config
        self._up = asyncio.Event()
        self._child: Child | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._context = 0
        self._base: Base  # This and what follows is there once `start` has run.
        self._client: Client
        self._adapters: Adapters

    @property
    def alive(self) -> bool:
        """Whether the vLLM server answers, with the right model."""
        return self._up.is_set()

    async def start(self) -> None:
        """Attach to the server, or start one and wait for it. Raises `EngineError` if that fails."""
        serve = self._config.serve
        self._base = await find(self._root)
        if serve.vllm_url is None:
            ranks = [rank(folder) for folder in (self._root / "versions").glob("v*")]
            self._child = Child(command(self._config, self._base, ranks), self._root / "vllm.log")
            self._client = Client("", self._child.key)
        else:
            self._client = Client(serve.vllm_url, self._key())
        self._adapters = Adapters(self._client, self._root, self._base, serve.max_loaded_versions)
        if self._child is None:
            await self._meet()
        else:
            await self._wait_for(self._child)
        self._tasks.append(asyncio.create_task(self._watch()))

    async def stop(self) -> None:
        """Give back what was loaded, or end the child."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._child is None and self.alive:
            await self._adapters.unload()
        self._up.clear()
        await self._client.close()

    async def load(self, version: str, *, keep: bool = False) -> None:
        """Have `version` ready, and `keep` it so; while the server is down, this waits for it."""
        while True:
            await self._up.wait()
            try:
                async with self._adapters.using(version):
                    self._adapters.kept = version if keep else self._adapters.kept
                    return
            except DownError as error:
                self._lost(error)

    async def generate(self, job: Job) -> AsyncIterator[Piece]:
        """Pieces of the answer; the iterator's end, early or not, takes the job out of the server."""
        if not self.alive:
            raise DownError(f"vLLM at {self._client.url} does not answer; try again later")
        if job.tools and not self._base.tools:
            raise EngineError("the chat template of this model takes no tools", status=400, code="tools_not_supported")
        for again in (True, False):
            try:
                async with self._adapters.using(job.version) as name:
                    path, body = wire.request(job, name, self._config, self._context, self._base.marks)
                    async with (
                        self._client.stream(path, body) as lines,
                        aclosing(wire.pieces(lines, job.logprobs)) as pieces,
                    ):
                        async for piece in pieces:
                            yield piece
                return
            except MissingError:
                if not again:
                    raise
                await self._meet()  # Another server answers there by now, which has nothing loaded.

    async def embed(self, version: str, texts: list[str | list[int]]) -> Embeddings:
        """Not here."""
        raise EngineError(
            "vLLM was started to generate and makes no embeddings; serve with serve.engine: builtin for those",
            status=400,
            code="embeddings_not_supported",
        )

    async def _wait_for(self, child: Child) -> None:
        log.info("starting vLLM; what it prints goes to %s", self._root / "vllm.log")
        running = asyncio.create_task(child.run())
        self._tasks.append(running)
        while not running.done():
            with suppress(DownError):
                await self._meet()
                return
            await asyncio.sleep(SECONDS_UNTIL_STARTED)
        await running

    async def _watch(self) -> None:
        """Notice when the server is lost, and when it is back."""
        while True:
            await asyncio.sleep(SECONDS_BETWEEN_LOOKS)
            try:
                if self.alive:
                    await self._client.health()
                else:
                    await self._meet()
            except EngineError as error:
                self._lost(error)

    async def _meet(self) -> None:
        """Learn what the server has. Raises `EngineError` if it is not there, or serves another base model."""
        if self._child is not None:
            self._client.url = self._child.url
        await self._client.health()
        models = await self._client.models()
        plain = next(model for model in models if not model.get("parent"))
        if not await is_base(self._base, plain["root"]):
            self._up.clear()
            raise EngineError(
                f"vLLM at {self._client.url} serves {plain['root']!r}, which is not the workspace's base model; "
                f"start it with --model {self._base.folder}, or name its model in model_name_or_path",
                status=503,
                code="engine_down",
            )
        self._context = plain["max_model_len"]
        self._adapters.met(plain["id"], [model["id"] for model in models])
        if self._child is not None:
            self._child.is_ready()
        if not self.alive:
            log.info("vLLM at %s answers", self._client.url)
        self._up.set()

    def _lost(self, error: EngineError) -> None:
        if self.alive:
            log.error("%s", error)
        self._up.clear()

    def _key(self) -> str | None:
        file = self._config.serve.vllm_key_file
        if file is None:
            return None
        try:
            return (self._root / file).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise EngineError(f"serve.vllm_key_file: {self._root / file} cannot be read ({error})") from None
