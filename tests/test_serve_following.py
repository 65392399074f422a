"""What answers to `current`: the version it names, as soon as that can, and never one that it no longer names."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from treering import Workspace, registry
from treering.serve import following as module
from treering.serve.engine import EngineError, Job, Piece
from treering.serve.errors import ApiError
from treering.serve.following import Following


class Slow:
    """An engine that loads a version when it is let to, and refuses those in `broken`."""

    alive = True

    def __init__(self) -> None:
        self.broken: set[str] = set()
        self.gates: dict[str, asyncio.Event] = {}
        self.kept: list[str] = []

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    async def load(self, version: str, *, keep: bool = False) -> None:
        assert keep
        self.kept.append(version)
        if version in self.gates:
            await self.gates[version].wait()
        if version in self.broken:
            raise EngineError(f"{version} is broken", status=503, code="version_unavailable")

    async def generate(self, job: Job) -> Any:
        yield Piece(text=job.version, finish="stop", prompt_tokens=1, completion_tokens=1)

    async def embed(self, version: str, texts: list[str | list[int]]) -> Any:
        raise NotImplementedError


@pytest.fixture
def ws(trained: Workspace, tmp_path: Path) -> Workspace:
    """v1 and v2, of which v1 is current."""
    copied = Workspace(shutil.copytree(trained.root, tmp_path / "ws", symlinks=True))
    copied.promote("v1", force=True)
    return copied


def follow(ws: Workspace, engine: Slow, test: Callable[[Following], Awaitable[None]]) -> None:
    async def whole() -> None:
        following = Following(ws, engine)
        await following.look()
        running = asyncio.create_task(following.run())
        try:
            async with asyncio.timeout(20):
                await test(following)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(whole())


async def until(check: Callable[[], bool]) -> None:
    while not check():
        await asyncio.sleep(0.01)


def test_a_version_rolled_back_while_it_loads_never_serves(ws: Workspace) -> None:
    engine = Slow()

    async def test(following: Following) -> None:
        engine.gates["v2"] = asyncio.Event()
        ws.promote("v2", force=True)
        await until(lambda: engine.kept[-1] == "v2")
        ws.rollback()
        await until(lambda: engine.kept[-1] == "v1")  # It is to be kept again.
        engine.gates["v2"].set()
        await asyncio.sleep(0.3)
        assert following.serving == "v1" and following.problem == ""

    follow(ws, engine, test)


def test_a_rollback_does_not_wait_for_what_loads(ws: Workspace) -> None:
    engine = Slow()

    async def test(following: Following) -> None:
        engine.gates["v2"] = asyncio.Event()
        ws.promote("v2", force=True)
        looking = asyncio.create_task(following.look())
        await until(lambda: engine.kept[-1] == "v2")
        ws.current.unlink()
        await looking
        assert following.serving == "base"

    follow(ws, engine, test)


def test_looks_at_once_load_once(ws: Workspace) -> None:
    engine = Slow()

    async def test(following: Following) -> None:
        ws.promote("v2", force=True)
        await asyncio.gather(*(following.look() for _ in range(5)))
        assert following.serving == "v2" and engine.kept == ["v1", "v2"]

    follow(ws, engine, test)


@pytest.mark.parametrize("mend", ["files", "promotion"])
def test_what_was_refused_is_tried_again_when_it_changed(ws: Workspace, mend: str) -> None:
    engine = Slow()
    engine.broken = {"v2"}

    async def test(following: Following) -> None:
        ws.promote("v2", force=True)
        await following.look()
        assert following.serving == "v1" and following.problem == "v2 is broken"
        await asyncio.sleep(0.3)
        assert engine.kept == ["v1", "v2"]
        engine.broken = set()
        if mend == "files":
            (ws.versions / "v2" / "adapter_config.json").touch()
        else:
            ws.promote("v2", force=True)
        await until(lambda: following.serving == "v2")
        assert following.problem == ""

    follow(ws, engine, test)


def test_what_was_refused_is_tried_again_after_a_while(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.4)
    engine = Slow()
    engine.broken = {"v2"}

    async def test(following: Following) -> None:
        ws.promote("v2", force=True)
        loop = asyncio.get_running_loop()
        tries = []
        for count in (2, 3, 4):
            await until(lambda count=count: len(engine.kept) == count)  # type: ignore[misc]
            tries.append(loop.time())
        assert tries[2] - tries[1] > 1.5 * (tries[1] - tries[0])
        engine.broken = set()
        await until(lambda: following.serving == "v2")

    follow(ws, engine, test)


def test_nothing_answers_to_a_current_that_is_damaged_at_the_start(ws: Workspace) -> None:
    engine = Slow()
    engine.broken = {"v1"}

    async def test(following: Following) -> None:
        assert following.serving == "" and following.problem == "v1 is broken"
        with pytest.raises(ApiError, match="nothing answers to `current`: v1 is broken") as found:
            following.version("current")
        assert found.value.status == 503
        assert following.version("v2") == "v2" and following.version("base") == "base"
        ws.promote("v2", force=True)
        await until(lambda: following.serving == "v2")
        assert following.version("current") == "v2" and following.problem == ""

    follow(ws, engine, test)


def test_a_current_that_leads_nowhere_is_told(ws: Workspace) -> None:
    async def test(following: Following) -> None:
        ws.current.unlink()
        ws.current.symlink_to("versions/v9")
        await until(lambda: "v9, which is missing" in following.problem)
        assert following.serving == "v1"
        ws.promote("v2", force=True)
        await until(lambda: following.serving == "v2" and following.problem == "")

    follow(ws, Slow(), test)
    assert registry.current(ws) is not None
