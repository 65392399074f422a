"""The built-in engine around a worker that dies, talks nonsense or never gets ready: nobody hangs, others go on."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.serving import ASK, LONG, greedy
from treering import Workspace
from treering.serve import builtin
from treering.serve.builtin import BuiltinEngine
from treering.serve.engine import EngineError, Job, Piece

# It keeps a letter for each start, and all it was sent. What it does is told by prompts and by versions' names.
WORKER = """
import json, os, pathlib, sys, time
root = pathlib.Path(sys.argv[1])
def say(**event):
    print(json.dumps(event), flush=True)
with (root / "starts").open("a") as file:
    file.write("x")
starts = len((root / "starts").read_text())
if (root / "broken").exists():
    say(event="fatal", error="treering.yaml is wrong")
    sys.exit(1)
say(event="ready")
for line in sys.stdin:
    with (root / "sent").open("a") as file:
        file.write(line)
    message = json.loads(line)
    if message["op"] == "load":
        say(event="reading", version=message["version"])
        if (root / "versions" / message["version"] / "deadly").exists():
            os._exit(9)
        say(event="loaded", version=message["version"], error=None)
    elif message["op"] == "ping":
        say(event="pong")
    elif message["op"] == "embed":
        say(event="vector", id=message["id"], at=1, vector=[1.0], tokens=2)
        if starts == 1:
            os._exit(9)
        say(event="vector", id=message["id"], at=0, vector=[0.0], tokens=1)
        say(event="embedded", id=message["id"])
    elif message["op"] == "generate":
        id, prompt = message["job"]["id"], message["job"]["prompt"]
        if prompt != "silent":
            say(event="piece", id=id, text=f"one{starts} ")
        if prompt == "wrong":
            say(event="failed", id=id, error="it is wrong", status=400, code="wrong")
            continue
        if prompt == "kill" or (prompt == "kill once" and starts == 1):
            os._exit(9)
        if prompt == "hang" and starts == 1:
            time.sleep(60)
        if prompt == "too long" and starts == 1:
            print("x" * 5000, flush=True)
        if prompt == "nonsense" and starts == 1:
            print("nonsense", flush=True)
        if prompt not in ("wait", "silent"):
            say(event="piece", id=id, text="two", finish="stop")
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "RESTART_SECONDS", 0.05)
    monkeypatch.setattr(builtin, "LINE_BYTES", 1000)


@pytest.fixture
def run(tmp_path: Path) -> Callable[[Callable[[BuiltinEngine], Awaitable[None]]], None]:
    def begin(test: Callable[[BuiltinEngine], Awaitable[None]]) -> None:
        (tmp_path / "worker.py").write_text(WORKER)

        async def whole() -> None:
            engine = BuiltinEngine(tmp_path, (sys.executable, str(tmp_path / "worker.py")))
            try:
                async with asyncio.timeout(30):
                    await engine.start()
                    await test(engine)
            finally:
                await engine.stop()

        asyncio.run(whole())

    return begin


Run = Callable[[Callable[[BuiltinEngine], Awaitable[None]]], None]


async def text(engine: BuiltinEngine, prompt: str, whole: bool = False, version: str = "base") -> str:
    job = Job(id=f"{prompt}-{whole}-{version}", version=version, prompt=prompt, whole=whole)
    return "".join([piece.text async for piece in engine.generate(job)])


async def until(check: Callable[[], bool]) -> None:
    while not check():
        await asyncio.sleep(0.01)


def sent(root: Path) -> list[dict[str, Any]]:
    lines = (root / "sent").read_text().splitlines() if (root / "sent").exists() else []
    return [json.loads(line) for line in lines]


def test_a_worker_that_hangs_is_replaced(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(builtin, "PING_SECONDS", 0.2)
    monkeypatch.setattr(builtin, "PINGS", 3)

    async def test(engine: BuiltinEngine) -> None:
        await asyncio.sleep(1.5)  # One that has nothing to do is not silent.
        assert await text(engine, "hang", whole=True) == "one2 two"

    run(test)
    assert "has been silent for 0.6 s" in caplog.text and caplog.text.count("starting another") == 1


def test_an_answer_nobody_has_seen_is_started_over(run: Run, tmp_path: Path) -> None:
    async def test(engine: BuiltinEngine) -> None:
        assert await text(engine, "kill once", whole=True) == "one2 two"
        assert await text(engine, "hello") == "one2 two"

    run(test)


def test_a_stream_that_had_begun_ends_and_is_not_sent_again(run: Run, tmp_path: Path) -> None:
    async def test(engine: BuiltinEngine) -> None:
        reading = engine.generate(Job(id="slow", version="base", prompt="wait"))
        assert (await anext(reading)).text == "one1 "
        with pytest.raises(EngineError, match="ended while it wrote"):
            await text(engine, "kill once")
        await until(lambda: engine.alive)  # The slow reader has not heard of it yet.
        assert await text(engine, "hello") == "one2 two"
        with pytest.raises(EngineError, match="ended while it wrote"):
            await anext(reading)

    run(test)
    asked = [message["job"]["prompt"] for message in sent(tmp_path) if message["op"] == "generate"]
    assert sorted(asked) == ["hello", "kill once", "wait"]
    assert all(message["op"] != "cancel" for message in sent(tmp_path))


def test_a_request_that_kills_is_given_up_and_others_are_answered(run: Run, tmp_path: Path) -> None:
    async def test(engine: BuiltinEngine) -> None:
        killer = asyncio.create_task(text(engine, "kill", whole=True))
        with pytest.raises(EngineError, match="ended while it wrote"):
            await killer
        assert await text(engine, "hello", whole=True) == "one4 two"

    run(test)


@pytest.mark.parametrize("what", ["too long", "nonsense"])
def test_a_worker_that_talks_nonsense_is_replaced(run: Run, what: str) -> None:
    async def test(engine: BuiltinEngine) -> None:
        assert await text(engine, what, whole=True) == "one2 two"
        assert engine.alive

    run(test)


def test_a_silent_worker_is_not_alive(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "PING_SECONDS", 0.01)
    monkeypatch.setattr(builtin, "PINGS", 10_000)

    async def test(engine: BuiltinEngine) -> None:
        assert engine._process is not None
        engine._process.send_signal(signal.SIGSTOP)
        await until(lambda: not engine.alive)
        engine._process.send_signal(signal.SIGCONT)
        await until(lambda: engine.alive)

    run(test)


def test_embeddings_are_started_over(run: Run) -> None:
    async def test(engine: BuiltinEngine) -> None:
        made = await engine.embed("base", ["a", "b"])
        assert (made.vectors, made.tokens) == ([[0.0], [1.0]], 3)

    run(test)


def test_what_the_client_left_is_cancelled_and_what_ended_is_not(run: Run, tmp_path: Path) -> None:
    async def test(engine: BuiltinEngine) -> None:
        with pytest.raises(EngineError, match="it is wrong"):
            await text(engine, "wrong")
        assert await text(engine, "hello") == "one1 two"
        leaving = asyncio.create_task(text(engine, "wait"))
        await until(lambda: any(m["op"] == "generate" and m["job"]["prompt"] == "wait" for m in sent(tmp_path)))
        leaving.cancel()
        await until(lambda: any(m["op"] == "cancel" for m in sent(tmp_path)))

    run(test)
    assert [m["id"] for m in sent(tmp_path) if m["op"] == "cancel"] == ["wait-False-base"]


def test_a_version_that_kills_is_refused_until_its_files_change(run: Run, tmp_path: Path) -> None:
    deadly = tmp_path / "versions" / "v1" / "deadly"
    deadly.parent.mkdir(parents=True)
    deadly.touch()

    async def test(engine: BuiltinEngine) -> None:
        waiting = asyncio.create_task(text(engine, "silent"))
        with pytest.raises(EngineError, match=r"v1 is not loaded: .* died 2 times while reading it") as found:
            await engine.load("v1")
        assert found.value.code == "version_unavailable"
        with pytest.raises(EngineError, match="v1 is not loaded"):
            await text(engine, "hello", version="v1")
        await until(lambda: engine.alive)
        assert await text(engine, "hello") == "one3 two"
        assert not waiting.done()  # It was there at the deaths and is not taken for their cause.
        waiting.cancel()
        deadly.unlink()
        await engine.load("v1", keep=True)

    run(test)


def test_what_is_kept_is_loaded_again_after_a_death(run: Run, tmp_path: Path) -> None:
    async def test(engine: BuiltinEngine) -> None:
        await engine.load("v1", keep=True)
        await engine.load("v2")
        await text(engine, "kill once", whole=True)

    run(test)
    loads = [(message["version"], message["keep"]) for message in sent(tmp_path) if message["op"] == "load"]
    assert loads == [("v1", True), ("v2", False), ("v1", True)]


def test_only_the_first_worker_must_get_ready(run: Run, tmp_path: Path) -> None:
    async def test(engine: BuiltinEngine) -> None:
        (tmp_path / "broken").touch()
        caught = asyncio.create_task(text(engine, "kill once", whole=True))
        with pytest.raises(EngineError, match="yaml is wrong"):
            await caught
        assert not engine.alive
        for ask in (engine.load("v1"), engine.embed("base", ["x"]), text(engine, "hello")):
            with pytest.raises(EngineError, match="yaml is wrong") as found:
                await ask
            assert found.value.status == 503
        starts = tmp_path / "starts"
        tried = len(starts.read_text())
        await until(lambda: len(starts.read_text()) > tried + 1)
        (tmp_path / "broken").unlink()
        await until(lambda: engine.alive)
        assert (await text(engine, "hello")).endswith("two")

    run(test)


def test_a_first_worker_that_does_not_get_ready_is_told(run: Run, tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    with pytest.raises(EngineError, match="yaml is wrong"):
        run(lambda _: asyncio.sleep(0))


def test_nothing_hangs_on_an_engine_that_was_stopped(run: Run) -> None:
    async def test(engine: BuiltinEngine) -> None:
        waiting = asyncio.create_task(text(engine, "wait"))
        await asyncio.sleep(0.1)
        await engine.stop()
        with pytest.raises(EngineError, match="shutting down"):
            await waiting
        with pytest.raises(EngineError, match="shutting down"):
            await engine.load("v1")

    run(test)


def test_what_no_json_can_carry_is_refused(run: Run) -> None:
    async def test(engine: BuiltinEngine) -> None:
        deep: Any = {}
        for _ in range(100_000):
            deep = {"properties": deep}
        job = Job.model_construct(id="deep", version="base", prompt="hello", json_schema=deep)
        with pytest.raises(EngineError, match="nested too deeply"):
            await anext(engine.generate(job))
        assert await text(engine, "hello") == "one1 two"

    run(test)


@pytest.mark.soak  # `test_serve.py` kills one below the server.
def test_the_real_worker_starts_an_answer_over(trained: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "LINE_BYTES", 2**20)

    async def test() -> None:
        engine = BuiltinEngine(trained.root)
        await engine.start()
        try:
            await engine.load("v2", keep=True)
            job = Job(id="long", version="base", messages=LONG, max_tokens=200)
            stream = engine.generate(job)
            await anext(stream)
            whole = asyncio.create_task(_collect(engine, job.model_copy(update={"id": "whole", "whole": True})))
            drawn = {"id": "drawn", "whole": True, "temperature": 1.0, "seed": 3}
            again = asyncio.create_task(_collect(engine, job.model_copy(update=drawn)))
            for _ in range(3):
                await anext(stream)
            assert engine._process is not None
            os.kill(engine._process.pid, signal.SIGKILL)
            assert await whole == greedy(trained, "base", LONG, 200)
            assert await again == await _collect(engine, job.model_copy(update=drawn))
            with pytest.raises(EngineError, match="ended while it wrote"):
                await _rest(stream)
            asked = Job(id="next", version="v2", messages=ASK, max_tokens=12)
            assert await _collect(engine, asked) == greedy(trained, "v2", ASK, 12)
        finally:
            await engine.stop()

    asyncio.run(test())


async def _collect(engine: BuiltinEngine, job: Job) -> str:
    return await _rest(engine.generate(job))


async def _rest(pieces: AsyncIterator[Piece]) -> str:
    return "".join([piece.text async for piece in pieces])
