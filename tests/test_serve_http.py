"""The server's HTTP side on an engine that does as it is told: who is let in, what is refused, how answers look."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import threading
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, cast

import pytest
from fastapi.testclient import TestClient
from openai.types.chat import ChatCompletionMessage

from treering import Workspace, feedback
from treering.errors import UsageError
from treering.sections import ServeConfig
from treering.serve import keys, run
from treering.serve.answers import Shape
from treering.serve.api import ChatMessage
from treering.serve.app import create_app
from treering.serve.engine import Embeddings, EngineError, Job, Piece, Token
from treering.serve.loops import go_on
from treering.serve.respond import _stream, _StreamResponse, _within
from treering.serve.state import Server
from treering.serve.telemetry import Seen
from treering.serve.tokens import bytes_of, name_of

ASK = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}
SAID = {"messages": ASK["messages"], "answer": "refund", "correction": "fault"}
END = Piece(text="end.", finish="stop", prompt_tokens=3, completion_tokens=2)


class Told:
    """An engine that writes `pieces`, or fails with `bug`; it is ready once `begin` is set, if there is one."""

    alive = True

    def __init__(self, *pieces: Piece) -> None:
        self.pieces = pieces or (Piece(text="the "), END)
        self.begin: threading.Event | None = None
        self.bug: Exception | None = None
        self.jobs: list[Job] = []

    async def start(self) -> None:
        while self.begin is not None and not self.begin.is_set():
            await asyncio.sleep(0.01)
        if self.bug is not None:
            raise self.bug

    async def stop(self) -> None:
        pass

    async def load(self, version: str, *, keep: bool = False) -> None:
        pass

    async def generate(self, job: Job) -> AsyncIterator[Piece]:
        self.jobs.append(job)
        if self.bug is not None:
            raise self.bug
        for piece in self.pieces:
            yield piece

    async def embed(self, version: str, texts: list[str | list[int]]) -> Embeddings:
        return Embeddings(vectors=[[1.0] for _ in texts], tokens=1)


@pytest.fixture
def ws(workspace: Callable[..., Workspace]) -> Workspace:
    return workspace(serve={"max_body_bytes": 20_000, "max_batch_size": 1, "max_queue": 1})


@contextmanager
def client_of(
    ws: Workspace, engine: Told | None = None, *, public: bool = False, opened: bool = True
) -> Iterator[TestClient]:
    app = create_app(ws, engine or Told(), public=public)
    with TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False) as client:
        if opened:
            assert client.portal is not None
            client.portal.call(app.state.server.open)
        yield client


def server_of(client: TestClient) -> Server:
    return cast(Server, cast(Any, client.app).state.server)


def chat(client: TestClient, key: str | None = None, **more: Any) -> Any:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return client.post("/v1/chat/completions", json={**ASK, **more}, headers=headers)


def events(client: TestClient, **more: Any) -> list[Any]:
    """What a client that splits lines as Python does reads from a stream."""
    lines = chat(client, stream=True, **more).text.splitlines()
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]


def test_the_last_key_gone_lets_nobody_in_from_elsewhere(ws: Workspace) -> None:
    made, secret = keys.create(ws, "shop")
    with client_of(ws, public=True) as client:
        assert [chat(client, key).status_code for key in (secret, None)] == [200, 401]
        keys.revoke(ws, made.id)
        for key in (secret, None):
            assert chat(client, key).status_code == client.get("/metrics").status_code == 401


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2:80", "[::1]:8000", "[::1]", "localhost:1", "LOCALHOST"])
def test_loopback_answers_to_its_names(ws: Workspace, host: str) -> None:
    with client_of(ws) as client:
        assert client.get("/healthz", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "192.168.0.1", "[::1", ""])
def test_loopback_answers_to_no_other_name(ws: Workspace, host: str) -> None:
    with client_of(ws) as client:
        answer = client.get("/healthz", headers={"host": host})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_host"


def test_loopback_refuses_other_sites_pages(ws: Workspace) -> None:
    with client_of(ws) as client:
        for origin in ("https://evil.example", "null", "http://127.0.0.1:3000", "http://127.0.0.1:8000.evil.example"):
            answer = client.post("/v1/feedback", json=SAID, headers={"origin": origin})
            assert answer.status_code == 403 and origin in answer.json()["error"]["message"]
        own = client.post("/v1/feedback", json=SAID, headers={"origin": "http://127.0.0.1:8000"})
    assert own.status_code == 202 and len(feedback.read(ws)) == 1


@pytest.mark.parametrize("headers", [{}, {"content-type": "text/plain"}])
def test_a_body_without_its_type_is_refused(ws: Workspace, headers: dict[str, str]) -> None:
    """What a page may send without asking first."""
    with client_of(ws) as client:
        answer = client.post("/v1/feedback", content=json.dumps(SAID).encode(), headers=headers)
    assert answer.status_code == 400 and not feedback.read(ws)


HALF = "\ud800"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"messages": [{"role": "user", "content": HALF}]}),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]}),
        ("chat/completions", {**ASK, "stop": [HALF]}),
        ("chat/completions", {**ASK, "user": HALF}),
        ("chat/completions", {**ASK, HALF: 1}),
        ("chat/completions", {**ASK, "temperature": float("nan")}),
        ("chat/completions", {**ASK, "tools": [{"type": "function", "function": {"name": "f", "description": HALF}}]}),
        (
            "chat/completions",
            {
                **ASK,
                "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": HALF}}},
            },
        ),
        ("completions", {"prompt": HALF}),
        ("embeddings", {"input": ["a", HALF]}),
        ("feedback", {**SAID, "messages": [{"role": "user", "content": HALF}]}),
        ("feedback", {**SAID, "comment": HALF}),
    ],
)
@pytest.mark.parametrize("escaped", [True, False])
def test_half_a_character_is_refused(ws: Workspace, path: str, body: dict[str, Any], escaped: bool) -> None:
    sent = json.dumps({"model": "base", **body} if path != "feedback" else body, ensure_ascii=escaped)
    with client_of(ws) as client:
        answer = client.post(
            f"/v1/{path}", content=sent.encode(errors="surrogatepass"), headers={"content-type": "application/json"}
        )
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_body" and not feedback.read(ws)


def test_a_bug_is_logged_with_its_status(ws: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    engine = Told()
    with caplog.at_level(logging.INFO, "treering.access"), client_of(ws, engine) as client:
        engine.bug = RuntimeError("oh")
        assert chat(client).json()["error"]["code"] == "internal_error"
        assert 'status="500"' in client.get("/metrics").text
    assert json.loads(caplog.messages[0])["status"] == 500


def test_what_the_engine_has_no_room_for_says_when_to_come_again(ws: Workspace) -> None:
    engine = Told()
    with client_of(ws, engine) as client:
        engine.bug = EngineError("8 others", status=429, code="too_many_schemas")
        answer = chat(client)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert answer.json()["error"]["code"] == "too_many_schemas"


def test_until_the_model_is_loaded_it_says_so(ws: Workspace) -> None:
    with client_of(ws, opened=False) as client:
        assert client.get("/healthz").status_code == client.get("/metrics").status_code == 200
        assert client.get("/readyz").status_code == 503
        answer = chat(client)
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
        assert answer.json()["error"]["code"] == "loading"
        assert client.portal is not None
        client.portal.call(server_of(client).open)
        assert client.get("/readyz").status_code == chat(client).status_code == 200


@pytest.fixture
def signals() -> Iterator[None]:
    """A server that ran here leaves its handlers."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def asked(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("host", ["::1", "127.0.0.2"])
def test_the_port_answers_while_the_model_is_loaded(ws: Workspace, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Told()
    engine.begin = threading.Event()
    monkeypatch.setattr(run, "_engine", lambda _: engine)
    listening: list[str] = []
    listen = run._listen

    def noted(host: str, port: int) -> Any:
        listener = listen(host, port)
        listening.append(f"http://{run._address(listener)}")
        return listener

    monkeypatch.setattr(run, "_listen", noted)
    ready = threading.Event()
    seen: list[int] = []

    def visit() -> None:
        try:
            while not listening:
                pass
            seen.extend(asked(listening[0] + path) for path in ("/healthz", "/readyz", "/v1/models"))
            assert engine.begin is not None
            engine.begin.set()
            ready.wait(10)
            seen.extend(asked(listening[0] + path) for path in ("/readyz", "/v1/models"))
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    visitor = threading.Thread(target=visit)
    visitor.start()
    run.serve(ws, host, 0, ready=lambda _: ready.set())
    visitor.join()
    assert seen == [200, 503, 503, 200, 200]


@pytest.mark.usefixtures("signals")
def test_a_model_that_cannot_be_loaded_ends_it(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Told()
    engine.bug = UsageError("no such folder")
    monkeypatch.setattr(run, "_engine", lambda _: engine)
    with pytest.raises(UsageError, match="no such folder"):
        run.serve(ws, "127.0.0.1", 0)


def test_a_loop_that_fails_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    runs: list[int] = []

    async def loop() -> None:
        runs.append(1)
        if len(runs) < 3:
            raise KeyError("oh")

    asyncio.run(go_on("the loop", loop, seconds=0))
    assert len(runs) == 3 and [record.getMessage()[:15] for record in caplog.records] == ["the loop failed"] * 2


def test_feedback_is_within_the_limits(ws: Workspace) -> None:
    with client_of(ws) as client:
        large = client.post("/v1/feedback", json={**SAID, "comment": "x" * 20_000})
        named = client.post("/v1/feedback", json={**SAID, "task": "\N{KATAKANA LETTER A}" * 100})
        with server_of(client).limits.entered(2):
            full = client.post("/v1/feedback", json=SAID)
        _, secret = keys.create(ws, "shop", requests_per_minute=1)
        headers = {"authorization": f"Bearer {secret}"}
        kept, often = (client.post("/v1/feedback", json=SAID, headers=headers) for _ in range(2))
    assert [answer.status_code for answer in (large, named, full, kept, often)] == [413, 400, 429, 202, 429]
    assert "300 bytes" in named.json()["error"]["message"] and len(feedback.read(ws)) == 1


@pytest.mark.parametrize("field", ["prompt", "input"])
def test_true_is_no_token(ws: Workspace, field: str) -> None:
    path = {"prompt": "completions", "input": "embeddings"}[field]
    with client_of(ws) as client:
        for tokens, status in (([True, False], 400), ([[True]], 400), ([1, 0], 200), ([[1], [0]], 200)):
            answer = client.post(f"/v1/{path}", json={"model": "base", field: tokens})
            assert answer.status_code == status, answer.text


def test_what_changes_no_answer_is_taken_and_all_else_refused(ws: Workspace) -> None:
    ignored: dict[str, Any] = {
        "service_tier": "auto",
        "prompt_cache_key": "a",
        "safety_identifier": "b",
        "metadata": {"c": "d"},
    }
    with client_of(ws) as client:
        assert chat(client, **ignored).status_code == 200
        for unknown in ("reasoning_effort", "verbosity"):
            assert chat(client, None, **{unknown: "low"}).status_code == 400


def test_an_embedding_says_which_version_made_it(ws: Workspace) -> None:
    with client_of(ws) as client:
        answer = client.post("/v1/embeddings", json={"model": "current", "input": "a"})
    assert answer.json()["system_fingerprint"] == answer.headers["x-treering-version"] == "base"


def test_no_page_fetches_scripts_from_elsewhere(ws: Workspace) -> None:
    with client_of(ws) as client:
        assert client.get("/docs").status_code == client.get("/redoc").status_code == 404
        assert client.get("/openapi.json").json()["info"]["title"] == "treering"


def test_a_thumb_is_for_one_answer_and_counts_once(ws: Workspace) -> None:
    with client_of(ws) as client:

        def rate(**more: Any) -> Any:
            said = {"messages": ASK["messages"], "answer": "the end.", "rating": "down", **more}
            return client.post("/v1/feedback", json=said)

        whole, streamed = chat(client).json()["id"], events(client)[0]["id"]
        text = client.post("/v1/completions", json={"model": "current", "prompt": "a"}).json()["id"]
        refused = [
            rate(),
            rate(version="base"),
            rate(response_id="chatcmpl-1"),
            rate(response_id=whole, version="v7"),
            rate(response_id=whole, task="x" * 300),
        ]
        assert [answer.status_code for answer in refused] == [400, 400, 404, 400, 400]
        assert "as `response_id`; a correction alone needs none" in refused[0].json()["error"]["message"]
        taken = [rate(response_id=id) for id in (whole, streamed, text)]
        assert [answer.status_code for answer in taken] == [202] * 3
        again = rate(response_id=whole, rating="up")
        assert again.status_code == 409 and "the first one stands" in again.json()["error"]["message"]
    assert {entry.feedback.version for entry in feedback.read(ws)} == {"base"}
    assert [entry.feedback.response_id for entry in feedback.read(ws)] == [whole, streamed, text]


def test_a_thumb_that_could_not_be_kept_may_come_again(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    with client_of(ws) as client:
        said = {"messages": ASK["messages"], "rating": "down", "response_id": chat(client).json()["id"]}
        with monkeypatch.context() as full:
            full.setattr(feedback, "append_line", lambda *_: (_ for _ in ()).throw(OSError(28, "no space")))
            assert client.post("/v1/feedback", json=said).status_code == 500
        assert client.post("/v1/feedback", json=said).status_code == 202


def test_a_correction_names_no_answer_and_known_versions_only(ws: Workspace) -> None:
    with client_of(ws) as client:
        given = [client.post("/v1/feedback", json={**SAID, **more}) for more in ({}, {"version": "base"})]
        wrong = client.post("/v1/feedback", json={**SAID, "version": "v7"})
    assert [answer.status_code for answer in (*given, wrong)] == [202, 202, 404]
    assert "there is no model 'v7'" in wrong.json()["error"]["message"] and len(feedback.read(ws)) == 2


def test_an_answer_may_be_sent_back_as_it_came(ws: Workspace) -> None:
    message = ChatCompletionMessage(role="assistant", content="b").model_dump()
    assert {"annotations", "audio", "function_call", "refusal", "tool_calls"} <= message.keys()
    with client_of(ws) as client:
        assert chat(client, messages=[*ASK["messages"], message, *ASK["messages"]]).status_code == 200
        assert chat(client, messages=[{**message, "audio": {"id": "x"}}]).status_code == 400


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ('{"city": "Tromsø"}', {"city": "Tromsø"}),
        ("", {}),
        ("not JSON", "not JSON"),
        (r'{"a": "\ud800"}', r'{"a": "\ud800"}'),
        ('{"a": NaN}', '{"a": NaN}'),
        ("[" * 5000, "[" * 5000),
    ],
    ids=["object", "empty", "text", "half", "nan", "deep"],
)
def test_templates_get_arguments_as_values(written: str, shown: Any) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": written}}
    turn = ChatMessage.model_validate({"role": "assistant", "content": None, "tool_calls": [call]}).turn()
    assert turn["tool_calls"] == [{**call, "function": {"name": "f", "arguments": shown}}]


def test_each_prompt_counts_once(ws: Workspace) -> None:
    with client_of(ws) as client:
        server_of(client).limits._room = 8
        body = {"model": "base", "prompt": ["ab", "cd"], "n": 2}
        usage = client.post("/v1/completions", json=body).json()["usage"]
        assert usage == {"prompt_tokens": 6, "completion_tokens": 8, "total_tokens": 14}
        assert chat(client, n=2).json()["usage"]["prompt_tokens"] == 3


def call(text: str) -> str:
    return f"<tool_call>{text}</tool_call>"


def shape(**settings: Any) -> Shape:
    return Shape("id", "chat.completion", "current", "v1", **{"tools": True, **settings})


def message_of(text: str, **settings: Any) -> Any:
    return shape(**settings).whole([[Piece(text=text, finish="stop")]])["choices"][0]["message"]


def test_what_the_model_called_keeps_its_characters() -> None:
    [made] = message_of(call('{"name": "wetter", "arguments": {"ort": "Zürich"}}'))["tool_calls"]
    assert made["function"] == {"name": "wetter", "arguments": '{"ort": "Zürich"}'}
    [made] = message_of(call(r'{"name": "f", "arguments": "{\"a\": 1}"}'))["tool_calls"]
    assert made["function"]["arguments"] == '{"a": 1}'


@pytest.mark.parametrize(
    "written",
    [
        '{"name": 5, "arguments": {}}',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": "no"}',
        '{"arguments": {}}',
        r'{"name": "f", "arguments": {"a": "\ud800"}}',
        '{"name": "f", "arguments": {"a": NaN}}',
        '{"a":' * 3000 + "}",
    ],
)
def test_what_is_no_call_stays_text(written: str) -> None:
    assert message_of(call(written)) == {"role": "assistant", "content": call(written), "refusal": None}


def test_one_call_where_one_was_asked_for(ws: Workspace) -> None:
    two = call('{"name": "f"}') + call('{"name": "g"}')
    engine = Told(Piece(text=two, finish="stop"))
    tools = [{"type": "function", "function": {"name": "f"}}]
    with client_of(ws, engine) as client:
        for parallel, names in ((None, ["f", "g"]), (True, ["f", "g"]), (False, ["f"])):
            answer = chat(client, tools=tools, parallel_tool_calls=parallel).json()["choices"][0]["message"]
            assert [made["function"]["name"] for made in answer["tool_calls"]] == names


def test_a_streamed_call_keeps_its_logprobs(ws: Workspace) -> None:
    text = call('{"name": "f"}')
    first, last = (Piece(text=part, tokens=[Token(text=part, logprob=-1.0)]) for part in (text[:5], text[5:]))
    engine = Told(first, last.model_copy(update={"finish": "stop"}))
    with client_of(ws, engine) as client:
        [event] = events(client, tools=[{"type": "function", "function": {"name": "f"}}], logprobs=True)
    choice = event["choices"][0]
    assert choice["delta"]["tool_calls"][0] | {"id": ""} == {
        "index": 0,
        "id": "",
        "type": "function",
        "function": {"name": "f", "arguments": "{}"},
    }
    assert choice["finish_reason"] == "tool_calls"
    assert [token["token"] for token in choice["logprobs"]["content"]] == [text[:5], text[5:]]


def test_no_character_ends_a_line_of_a_stream(ws: Workspace) -> None:
    text = "a\u2028b\u2029c\x85d é"
    with client_of(ws, Told(Piece(text=text), END)) as client:
        found = events(client)
    assert found[0]["choices"][0]["delta"]["content"] == text


def test_the_time_of_a_slow_reader_is_its_own() -> None:
    async def pieces(*waits: float) -> Any:
        for wait in waits:
            await asyncio.sleep(wait)
            yield 0, Piece(text="x")
        yield 0, END

    async def read(pause: float, *waits: float) -> tuple[list[str], int]:
        seen = Seen("req-1", "POST", "/", status=200)
        found = []
        async for event in _stream(seen, shape(tools=False), pieces(*waits), [[]], False, seconds=0.5):
            found.append(event)
            await asyncio.sleep(pause)
        return found, seen.status

    found, status = asyncio.run(read(0.3, 0.01, 0.01, 0.01))
    assert found[-1] == "[DONE]" and len(found) == 5 and status == 200
    found, status = asyncio.run(read(0.0, 0.3, 0.3))
    assert json.loads(found[-1])["error"]["code"] == "timeout" and len(found) == 2 and status == 504


def test_who_reads_nothing_makes_room() -> None:
    async def pieces() -> Any:
        while True:
            yield 0, Piece(text="x")

    async def unread() -> tuple[list[str], int]:
        seen = Seen("req-1", "POST", "/", status=200)
        ended: list[str] = []
        inside = ExitStack()
        inside.callback(ended.append, "room")
        source = _stream(seen, shape(tools=False), pieces(), [[]], False, seconds=60)
        response = _StreamResponse(source, inside, seen, ServeConfig(request_timeout=0.2))

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()

        async def receive() -> Any:
            await asyncio.Event().wait()

        async with asyncio.timeout(10):
            await response({"type": "http", "method": "POST"}, receive, send)
        return ended, seen.status

    assert asyncio.run(unread()) == (["room"], 499)


@pytest.mark.parametrize(("events", "status"), [(1, 499), (3, 200)], ids=["midway", "at the end"])
def test_who_leaves_a_stream_is_told_by_the_log(events: int, status: int) -> None:
    async def pieces() -> Any:
        yield 0, Piece(text="x")
        yield 0, END

    async def read() -> int:
        seen = Seen("req-1", "POST", "/", status=200)
        source = cast(Any, _stream(seen, shape(tools=False), pieces(), [[]], False, seconds=60))
        for _ in range(events):
            await anext(source)
        await source.aclose()
        return seen.status

    assert asyncio.run(read()) == status


def test_a_stuck_engine_is_let_go() -> None:
    ended: list[int] = []

    async def pieces() -> Any:
        try:
            yield 0, Piece(text="x")
            await asyncio.Event().wait()
        finally:
            ended.append(1)

    async def read() -> None:
        with suppress(TimeoutError):
            async for _ in _within(0.05, pieces()):
                pass
        assert ended == [1]

    asyncio.run(read())


EURO = [r"bytes:\xe2", r"bytes:\x82", r"bytes:\xac"]


def test_offsets_count_over_the_whole_answer() -> None:
    made = Shape("id", "text_completion", "current", "v1")
    tokens = [Token(text=text, logprob=-1.0) for text in ("ab", *EURO, "c", "é")]
    pieces = [Piece(text="ab", tokens=tokens[:2]), Piece(tokens=tokens[2:3]), Piece(text="€c", tokens=tokens[3:])]
    wanted = [0, 2, 2, 2, 3, 4]
    found: list[int] = []
    for count in range(1, 4):
        event = made.chunk(0, pieces[:count])
        assert event is not None
        found += event["choices"][0]["logprobs"]["text_offset"]
    assert found == wanted
    whole = made.whole([[*pieces[:2], pieces[2].model_copy(update={"finish": "stop"})]])
    assert whole["choices"][0]["logprobs"]["text_offset"] == wanted


def test_a_part_of_a_character_has_its_own_bytes(tokenizer: Any) -> None:
    names = [name_of(tokenizer, id) for id in tokenizer("a€ \ufffd")["input_ids"]]
    assert names[:5] == ["a", *EURO, " "]
    assert b"".join(map(bytes_of, names)).decode() == "a€ \ufffd"
    token = Token(text=EURO[0], logprob=-1.0, top=[(EURO[0], -1.0), (EURO[1], -2.0)])
    choice = shape(tools=False).whole([[Piece(tokens=[token], finish="stop")]])["choices"][0]
    [entry] = choice["logprobs"]["content"]
    assert entry["bytes"] == [0xE2] and [other["bytes"] for other in entry["top_logprobs"]] == [[0xE2], [0x82]]


class Fallback:
    """A tokenizer that writes bytes it has no token for as `<0xE2>`."""

    def decode(self, ids: list[int]) -> str:
        return "\ufffd"

    def convert_ids_to_tokens(self, id: int) -> str:
        return ("<0xE2>", "\ufffd")[id]


def test_bytes_that_a_vocabulary_falls_back_to() -> None:
    assert [name_of(Fallback(), id) for id in (0, 1)] == [r"bytes:\xe2", "\ufffd"]


def test_tokens_of_one_text_stand_for_the_likeliest() -> None:
    token = Token(text="a", logprob=-1.0, top=[("a", -1.0), ("b", -2.0), ("a", -3.0)])
    choice = Shape("id", "text_completion", "current", "v1").whole([[Piece(tokens=[token], finish="stop")]])
    assert choice["choices"][0]["logprobs"]["top_logprobs"] == [{"a": -1.0, "b": -2.0}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from treering.model import load_tokenizer
    from treering.testing import tiny_model

    return load_tokenizer(tiny_model(tmp_path_factory.mktemp("tokenizer")))
