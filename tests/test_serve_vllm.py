"""`serve.engine: vllm` against a fake of the vLLM server, met as users meet it; `test_vllm.py` has the real one."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from tests.fake_vllm import is_zero
from tests.serving import LONG, MAIN, Served
from treering import Workspace
from treering.cli import run
from treering.config import Config
from treering.errors import ConfigError
from treering.model import fingerprint
from treering.serve.engine import EngineError, Job, Piece
from treering.serve.vllm import base, engine, wire
from treering.serve.vllm.adapters import rank, stand_in
from treering.serve.vllm.base import Base, is_base
from treering.serve.vllm.child import command
from treering.testing import tiny_model, toy_rows

FAKE = Path(__file__).with_name("fake_vllm.py")
BASE = Base(name=None, folder="/m", sha256="0" * 64, dtype="float32", tools=True)
TOLD = """
import asyncio
from treering.serve.vllm import base, engine
told = base.Base.model_validate_json({!r})
engine.find = lambda _: asyncio.sleep(0, told)
"""
"""A server that knows the base model; the process that tells of it is met by the server that `attached` is."""
HELLO: list[Any] = [{"role": "user", "content": "hello you"}]


class Fake:
    """The fake server in a process of its own."""

    def __init__(self, model: Path, key: str | None = None, port: int = 0, updates: bool = True) -> None:
        if not port:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                port = listener.getsockname()[1]
        self.port, self.url = port, f"http://127.0.0.1:{port}"
        env = {**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": str(updates), **({"VLLM_API_KEY": key} if key else {})}
        self.process = subprocess.Popen(
            [sys.executable, str(FAKE), "--model", str(model), "--port", str(port)], env=env
        )
        for _ in range(600):
            try:
                self.seen()
                return
            except httpx2.TransportError:
                time.sleep(0.05)
        raise AssertionError("the fake did not start")

    def seen(self) -> dict[str, Any]:
        found: dict[str, Any] = httpx2.get(f"{self.url}/seen").json()
        return found

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def copied(trained: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Workspace]:
    """Makes a copy of the trained workspace with other settings under `serve`."""

    def make(**serve: Any) -> Workspace:
        root = tmp_path_factory.mktemp("vllm") / "ws"
        shutil.copytree(trained.root, root, symlinks=True)
        settings = {"model_name_or_path": str(base_of(trained)), "bf16": False}
        lines = [json.dumps({**settings, "serve": {"engine": "vllm", **serve}})]
        (root / "treering.yaml").write_text("\n".join(lines))
        ws = Workspace(root)
        ws.promote("v2", force=True)
        return ws

    return make


def base_of(ws: Workspace) -> Path:
    return Path(str(ws.config().model_name_or_path))


@pytest.fixture(scope="module")
def known(trained: Workspace) -> Base:
    """What there is to know of the base model."""
    folder = base_of(trained)
    return Base(name=str(folder), folder=str(folder), sha256=fingerprint(folder), dtype="float32", tools=False)


@pytest.fixture
def start(known: Base, tmp_path: Path) -> Iterator[Callable[[Workspace], Served]]:
    """Starts servers that know the base model."""
    program = TOLD.format(known.model_dump_json()) + MAIN
    made: list[Served] = []

    def serve(ws: Workspace) -> Served:
        made.append(Served(ws, tmp_path / f"serve{len(made)}.log", program=program))
        return made[-1]

    yield serve
    for served in made:
        served.process.kill()
        served.process.wait()


@pytest.fixture(scope="module")
def fake(trained: Workspace) -> Iterator[Fake]:
    running = Fake(base_of(trained), key="sesame")
    yield running
    running.kill()


@pytest.fixture(scope="module")
def attached(
    fake: Fake, copied: Callable[..., Workspace], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    ws = copied(vllm_url=f"{fake.url}/v1", vllm_key_file="vllm.key", max_loaded_versions=1, max_new_tokens=5000)
    (ws.root / "vllm.key").write_text("sesame\n")
    running = Served(ws, tmp_path_factory.mktemp("log") / "serve.log")
    yield running
    running.process.kill()
    running.process.wait()


def said(served: Served, model: str = "current", **settings: Any) -> str:
    text = served.ask(model, **{"messages": HELLO, **settings}).choices[0].message.content
    assert isinstance(text, str)
    return text


def problem(served: Served) -> str:
    """Why nothing answers to `current`."""
    with pytest.raises(urllib.error.HTTPError) as refused:
        served.get("/readyz")
    assert refused.value.code == 503
    return str(json.loads(refused.value.read())["problem"])


def test_each_version_answers_through_its_own_adapter(attached: Served, fake: Fake) -> None:
    for name, version in (("current", "v2"), ("v1", "v1"), ("base", "base"), ("v2", "v2")):
        answer = attached.ask(name, messages=HELLO)
        assert (answer.choices[0].message.content, answer.system_fingerprint) == (f"{version} heard hello you", version)
        assert answer.usage.completion_tokens == 5 and answer.choices[0].finish_reason == "stop"
    digest = json.loads((attached.ws.versions / "v2" / "manifest.json").read_text())["digest"]
    loaded = [load for load in fake.seen()["loads"] if load["lora_name"] == f"v2-{digest[:16]}"]
    assert loaded[0] == {
        "lora_name": f"v2-{digest[:16]}",
        "lora_path": str(attached.ws.versions / "v2"),
        "load_inplace": False,
    }


def test_no_more_versions_stay_loaded_than_the_settings_say(attached: Served, fake: Fake) -> None:
    """The one that is current stays, beside one other where there is one place."""
    attached.ws.ingest(toy_rows("c", 20), task="c")
    attached.ws.update(promote=False)
    for name in ("v1", "v3", "v2", "v1"):
        assert said(attached, name) == f"{name} heard hello you"
        loaded = {Path(path).name.partition("-")[0] for path in fake.seen()["adapters"].values()}
        assert loaded == {"base", "v2", "v3" if name == "v2" else name}


def test_a_load_that_nobody_waits_for_any_more_is_no_obstacle(attached: Served, fake: Fake) -> None:
    said(attached, "v2")
    impatient = attached.client.with_options(timeout=0.05)
    for _ in range(3):
        with pytest.raises(openai.APITimeoutError):
            impatient.chat.completions.create(model="v1", messages=LONG, max_tokens=1900)
    assert said(attached, "v1") == "v1 heard hello you"


def test_a_name_that_is_known_from_another_folder_is_moved(attached: Served, fake: Fake) -> None:
    said(attached, "v3")  # v1 makes way.
    digest = json.loads((attached.ws.versions / "v1" / "manifest.json").read_text())["digest"]
    elsewhere = {"lora_name": f"v1-{digest[:16]}", "lora_path": str(attached.ws.versions / "v2"), "load_inplace": True}
    httpx2.post(f"{fake.url}/v1/load_lora_adapter", json=elsewhere, headers={"authorization": "Bearer sesame"})
    assert said(attached, "v1") == "v1 heard hello you"


def test_the_base_model_is_never_asked_beside_adapters(attached: Served, fake: Fake) -> None:
    said(attached)
    plain = [request for request in fake.seen()["requests"] if request["model"] == str(base_of(attached.ws))]
    names = ["base", "v1", "v2"] * 6
    with ThreadPoolExecutor(len(names)) as pool:
        texts = list(pool.map(lambda name: said(attached, name), names))
    assert texts == [f"{name} heard hello you" for name in names]
    after = [request for request in fake.seen()["requests"] if request["model"] == str(base_of(attached.ws))]
    assert after == plain


def test_a_promotion_and_a_rollback_are_followed(attached: Served) -> None:
    attached.ws.promote("v1", force=True)
    attached.eventually(lambda: said(attached) == "v1 heard hello you", 10)
    attached.ws.rollback()
    attached.eventually(lambda: said(attached) == "v2 heard hello you", 10)


def test_a_stream_has_pieces_usage_and_log_probabilities(attached: Served, fake: Fake) -> None:
    settings: dict[str, Any] = {"logprobs": True, "top_logprobs": 1, "stream_options": {"include_usage": True}}
    events = list(attached.ask(messages=HELLO, stream=True, **settings))
    assert [e.choices[0].delta.content for e in events if e.choices] == ["v2", " heard", " hello", " you", None]
    tokens = [token for e in events if e.choices and e.choices[0].logprobs for token in e.choices[0].logprobs.content]
    assert [(token.token, len(token.top_logprobs)) for token in tokens] == [
        (word, 1) for word in ("v2", " heard", " hello", " you")
    ]
    assert events[-1].usage.completion_tokens == 5
    text = attached.client.completions.create(model="v1", prompt="ab", max_tokens=2, logprobs=2)
    assert (text.choices[0].text, text.choices[0].finish_reason) == ("v1 heard", "length")
    logprobs = text.choices[0].logprobs
    assert logprobs is not None and logprobs.top_logprobs == [{word: -0.5, "other": -1.5} for word in ("v1", " heard")]


def test_what_vllm_refuses_is_told_with_its_status(attached: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="Grammar error"):
        attached.ask(messages=[{"role": "user", "content": "fail"}])
    with pytest.raises(openai.BadRequestError, match="engine: builtin"):
        attached.client.embeddings.create(model="current", input="text")
    with pytest.raises(openai.BadRequestError, match="takes no tools"):
        attached.ask(tools=[{"type": "function", "function": {"name": "f"}}])
    # More than the context is cut to it, as the built-in engine does.
    assert said(attached, max_tokens=4000) == "v2 heard hello you"


def test_a_client_that_leaves_ends_the_answer_at_vllm(attached: Served, fake: Fake) -> None:
    left = fake.seen()["left"]
    stream = attached.ask(messages=LONG, max_tokens=1900, stream=True)
    next(stream)
    assert len(fake.seen()["running"]) == 1
    stream.close()
    attached.eventually(lambda: not fake.seen()["running"])
    impatient = attached.client.with_options(timeout=0.3)
    with pytest.raises(openai.APITimeoutError):
        impatient.chat.completions.create(model="v2", messages=LONG, max_tokens=1900)
    attached.eventually(lambda: not fake.seen()["running"] and fake.seen()["left"] >= left + 2)


def test_a_dead_server_is_told_and_one_that_comes_back_gets_its_adapters(
    copied: Callable[..., Workspace], trained: Workspace, start: Callable[[Workspace], Served]
) -> None:
    first = Fake(base_of(trained))
    served = start(copied(vllm_url=first.url))
    assert said(served) == "v2 heard hello you"
    stream = served.ask(messages=LONG, max_tokens=1900, stream=True)
    next(stream)
    first.kill()
    with pytest.raises(openai.APIError, match="does not answer"):
        list(stream)
    served.eventually(lambda: not ready(served), 10)
    with pytest.raises(openai.APIStatusError) as found:
        served.ask()
    assert found.value.status_code == 503
    served.ws.promote("v1", force=True)  # It waits for the server, and is not refused.
    second = Fake(base_of(trained), port=first.port)
    served.eventually(lambda: ready(served), 20)
    served.eventually(lambda: said(served) == "v1 heard hello you", 10)
    second.kill()  # So fast that nobody notices but by what is missing.
    third = Fake(base_of(trained), port=first.port)
    served.eventually(lambda: ready(served), 20)
    assert said(served) == "v1 heard hello you" and said(served, "base") == "base heard hello you"
    assert served.stop() == 0
    assert "/health" not in served.log.read_text()
    assert third.seen()["adapters"] == {}  # Left as it was found.
    third.kill()


def ready(served: Served) -> bool:
    try:
        return bool(json.loads(served.get("/readyz"))["ready"])
    except urllib.error.HTTPError as error:
        return bool(json.loads(error.read())["ready"])


@pytest.mark.parametrize("case", ["nobody", "other model", "no key"])
def test_a_server_that_does_not_fit_is_refused_at_once(
    case: str,
    copied: Callable[..., Workspace],
    known: Base,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    served = tiny_model(tmp_path / "other", seed=1) if case == "other model" else Path(known.folder)
    fake = Fake(served, key="sesame" if case == "no key" else None)
    if case == "nobody":
        fake.kill()
    ws = copied(vllm_url=fake.url)
    monkeypatch.setattr(engine, "find", lambda _: asyncio.sleep(0, known))
    monkeypatch.setattr(base, "_ask", lambda *asked: asyncio.sleep(0, base._tell(*asked)))  # In this process.
    words = {
        "nobody": "does not answer",
        "other model": "is not the workspace's base model",
        "no key": "vllm_key_file",
    }
    try:
        with pytest.raises(EngineError, match=words[case]):
            asyncio.run(engine.VllmEngine(ws.root, ws.config()).start())
    finally:
        fake.kill()


def test_a_server_that_loads_nothing_is_told(
    copied: Callable[..., Workspace], trained: Workspace, start: Callable[[Workspace], Served]
) -> None:
    fake = Fake(base_of(trained), updates=False)
    served = start(copied(vllm_url=fake.url))
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True" in problem(served)
    with pytest.raises(openai.APIStatusError, match="nothing answers to `current`"):
        said(served)
    assert said(served, "base") == "base heard hello you"
    assert served.stop() == 0
    fake.kill()


def test_the_same_model_in_another_folder_is_the_base(trained: Workspace, tmp_path: Path) -> None:
    folder = base_of(trained)
    base = BASE.model_copy(update={"name": "owner/name", "sha256": fingerprint(folder)})
    assert asyncio.run(is_base(base, str(folder)))
    assert asyncio.run(is_base(base, "owner/name")) and not asyncio.run(is_base(base, "owner/other"))


def test_what_is_more_than_plain_lora_does_not_serve(
    fake: Fake, known: Base, workspace: Callable[..., Workspace], tmp_path: Path, start: Callable[[Workspace], Served]
) -> None:
    (tmp_path / "vllm.key").write_text("sesame")
    serve = {"engine": "vllm", "vllm_url": fake.url, "vllm_key_file": str(tmp_path / "vllm.key")}
    ws = workspace(model_name_or_path=known.folder, serve=serve, max_steps=1)
    ws.ingest(toy_rows("a", 20), task="a")
    told = {
        "v1": "holds all weights",
        "v2": "is a bottleneck adapter, and vLLM loads LoRA adapters only",
        "v3": "is more than plain LoRA",
    }
    for values in ({"finetuning_type": "full"}, {"finetuning_type": "adapter"}, {"use_dora": True}):
        assert ws.update(promote=False, **values) is not None
    ws.promote("v1", force=True)
    served = start(ws)
    for name, words in told.items():
        ws.promote(name, force=True)
        served.eventually(lambda words=words: words in problem(served))  # type: ignore[misc]
        with pytest.raises(openai.APIStatusError, match="engine: builtin"):
            served.ask(name)
    assert served.ask("base", messages=HELLO).system_fingerprint == "base"
    assert served.stop() == 0


@pytest.fixture
def starter(tmp_path: Path) -> Path:
    """What stands in for a Python that has vLLM: it starts the fake."""
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} "$@"\n')
    script.chmod(0o755)
    return script


def children(parent: int) -> list[int]:
    """All processes below `parent`."""
    try:
        below = [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    except FileNotFoundError:
        return []
    return below + [pid for child in below for pid in children(child)]


def gone(pids: list[int]) -> bool:
    """Whether they have ended, or do within a moment."""

    def state(pid: int) -> str:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return "Z"

    for _ in range(100):
        if all(state(pid) == "Z" for pid in pids):
            return True
        time.sleep(0.02)
    return False


def test_a_server_of_ours_is_started_replaced_and_ended(
    copied: Callable[..., Workspace], starter: Path, start: Callable[[Workspace], Served]
) -> None:
    served = start(copied(vllm_python=str(starter), vllm_arguments="--tensor-parallel-size 2"))
    assert said(served) == "v2 heard hello you"
    lifeline, server = children(served.process.pid)
    arguments = Path(f"/proc/{server}/cmdline").read_text().split("\0")
    assert arguments[arguments.index("--tensor-parallel-size") + 1] == "2" and "--enable-lora" in arguments
    os.kill(server, signal.SIGKILL)
    served.eventually(lambda: not ready(served), 10)
    served.eventually(lambda: ready(served), 30)
    assert said(served) == "v2 heard hello you"
    after = children(served.process.pid)
    assert not {lifeline, server} & set(after) and len(after) == 2
    assert served.stop() == 0 and gone(after)


def test_the_lifeline_takes_all_processes_along() -> None:
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(99)'])"
    held = subprocess.Popen(
        [sys.executable, "-m", "treering.serve.vllm.lifeline", sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        cwd=FAKE.parents[1],
    )
    while len(children(held.pid)) < 2:
        time.sleep(0.02)
    below = children(held.pid)
    held.communicate(timeout=30)  # Closes its standard input, as the death of its parent does.
    assert gone(below)


def test_a_server_that_cannot_start_is_told(
    copied: Callable[..., Workspace], known: Base, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ws = copied()
    monkeypatch.setattr(engine, "find", lambda _: asyncio.sleep(0, known))
    assert run(["serve", "-w", str(ws.root), "--port", "0"]) == 1
    assert "vllm.log says why" in capfd.readouterr().err
    assert "No module named" in (ws.root / "vllm.log").read_text()


def test_the_command_follows_the_settings() -> None:
    config = Config.build({"serve": {"max_loaded_versions": 3, "vllm_arguments": "--max-model-len '99'"}})
    line = " ".join(command(config, BASE, [12]))
    assert "--model /m" in line and "--dtype float32" in line and line.endswith("--max-model-len 99")
    assert "--max-loras 5" in line and "--max-lora-rank 16" in line and "--trust-remote-code" not in line


def test_no_text_that_vllm_is_sent_speaks_for_somebody_else() -> None:
    job = Job(id="j", version="base", messages=[{"role": "user", "content": "a<|im_end|>b"}])
    _, body = wire.request(job, "m", Config(), 40, re.escape("<|im_end|>"))
    assert body["messages"] == [{"role": "user", "content": "a< |im_end|>b"}]


def test_a_job_becomes_a_request() -> None:
    config = Config.build({"default_system": "Be brief.", "serve": {"max_new_tokens": 50, "temperature": 0.5}})
    job = Job(
        id="j",
        version="v1",
        messages=HELLO,
        tools=[{"type": "function"}],
        top_p=0.9,
        seed=7,
        stop=["x"],
        logprobs=2,
        frequency_penalty=0.1,
        presence_penalty=0.2,
        logit_bias={5: -1.0},
        json_schema={"type": "object"},
        background=True,
    )
    path, body = wire.request(job, "v1-abc", config, 40)
    assert path == "/v1/chat/completions" and body == {
        "model": "v1-abc",
        "messages": [{"role": "system", "content": "Be brief."}, *HELLO],
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "max_tokens": 40,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "seed": 7,
        "stop": ["x"],
        "frequency_penalty": 0.1,
        "presence_penalty": 0.2,
        "logit_bias": {"5": -1.0},
        "tools": [{"type": "function"}],
        "tool_choice": "none",
        "logprobs": True,
        "top_logprobs": 2,
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}}},
        "priority": 1,
    }
    path, body = wire.request(Job(id="j", version="base", prompt=[1, 2], temperature=0), "m", config, 100)
    assert path == "/v1/completions" and body["prompt"] == [1, 2]
    assert (body["max_tokens"], body["temperature"], body["logprobs"]) == (50, 0, None)
    slow = Job(id="j", version="base", prompt=[1, 2], json_schema={"type": "integer", "multipleOf": 99991})
    with pytest.raises(EngineError, match="multipleOf asks for 99991"):
        wire.request(slow, "m", config, 100)


def read(*events: Any, top: int | None = None) -> list[Piece]:
    async def lines() -> AsyncIterator[str]:
        for event in events:
            yield f"data: {json.dumps(event)}" if isinstance(event, dict) else event

    async def collect() -> list[Piece]:
        return [piece async for piece in wire.pieces(lines(), top)]

    return asyncio.run(collect())


def test_streams_that_end_badly_are_errors() -> None:
    begun = {"choices": [{"index": 0, "text": "a", "finish_reason": None}]}
    with pytest.raises(EngineError, match="while it wrote"):
        read(begun, "data: [DONE]")
    with pytest.raises(EngineError, match="reason of its own: abort") as found:
        read(begun, {"choices": [{"index": 0, "text": "", "finish_reason": "abort"}]})
    assert found.value.status == 503
    with pytest.raises(EngineError, match="too long") as found:
        read(begun, {"error": {"message": "too long", "code": 400}})
    assert found.value.status == 400
    with pytest.raises(EngineError, match="vLLM failed: out of memory") as found:
        read({"error": {"message": "out of memory", "code": 500}})
    assert found.value.status == 500


def test_every_piece_says_how_far_it_is() -> None:
    def event(text: str, finish: str | None, written: int) -> dict[str, Any]:
        usage = {"prompt_tokens": 3, "completion_tokens": written}
        return {"choices": [{"index": 0, "text": text, "finish_reason": finish}], "usage": usage}

    found = read(event("a", None, 1), event("b", "stop", 2), {**event("", None, 2), "choices": []})
    assert [(piece.text, piece.prompt_tokens, piece.completion_tokens) for piece in found] == [("a", 3, 1), ("b", 3, 2)]


def test_a_stop_string_keeps_the_last_token() -> None:
    logprobs = {"tokens": ["b"], "token_logprobs": [-1.0], "top_logprobs": [None]}
    usage = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
    choice = {"index": 0, "text": "a", "logprobs": logprobs, "finish_reason": "stop"}
    [stopped] = read({"choices": [{**choice, "stop_reason": "x"}]}, usage, top=0)
    [ended] = read({"choices": [{**choice, "stop_reason": None}]}, usage, top=0)
    assert [token.text for token in stopped.tokens] == ["b"] and ended.tokens == []
    assert (stopped.prompt_tokens, stopped.completion_tokens, stopped.finish) == (3, 2, "stop")


def test_the_stand_in_changes_nothing(trained: Workspace, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    adapter = trained.versions / "v1"
    name, folder = stand_in(adapter, tmp_path)
    made, like = load_file(folder / "adapter_model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    assert {key: value.shape for key, value in made.items()} == {key: value.shape for key, value in like.items()}
    assert not any(value.any() for value in made.values()) and is_zero(folder)
    assert stand_in(trained.versions / "v2", tmp_path) == (name, folder) and rank(folder) == 8
    assert rank(tmp_path) == 0


@pytest.mark.parametrize(
    ("serve", "words"),
    [
        ({"engine": "vlm"}, "builtin"),
        ({"vllm_url": "127.0.0.1:8001"}, "begins with http"),
        ({"vllm_url": "http://x", "vllm_python": "python"}, "drop either"),
        ({"vllm_key_file": "key"}, "set that too"),
        ({"vllm_arguments": "--x 'y"}, "quotation"),
    ],
)
def test_wrong_settings_are_told(serve: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Config.build({"serve": serve})
