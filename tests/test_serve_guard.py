"""What a request has to pass before it is answered: keys, limits, and a body that comes in time and can be read."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvicorn

from tests.test_serve_http import ASK, SAID, Told, chat, client_of, server_of
from treering import Workspace, feedback
from treering.serve import incoming, keys
from treering.serve.app import create_app

JSON = {"content-type": "application/json"}


@pytest.fixture
def ws(workspace: Callable[..., Workspace]) -> Workspace:
    return workspace(serve={"max_body_bytes": 20_000, "max_batch_size": 2, "max_queue": 2})


def test_the_last_key_gone_lets_nobody_in_on_loopback_either(ws: Workspace) -> None:
    with client_of(ws) as client:
        assert chat(client).status_code == 200
        made, _ = keys.create(ws, "shop")
        keys.revoke(ws, made.id)
        refused = chat(client)
        assert refused.status_code == 401
        assert "`treering keys create`, or delete keys.json" in refused.json()["error"]["message"]
        (ws.root / keys.FILE).unlink()
        assert chat(client).status_code == 200


def test_what_damaged_the_keys_is_for_the_log(ws: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    (ws.root / keys.FILE).write_text("[{")
    with client_of(ws) as client:
        answer = chat(client)
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "keys_unreadable"
    assert str(ws.root) not in answer.text and f"{ws.root / keys.FILE} cannot be read" in caplog.text


def limited(workspace: Callable[..., Workspace]) -> Workspace:
    return workspace(serve={"requests_per_minute": 2})


def test_all_without_a_key_share_a_limit(workspace: Callable[..., Workspace]) -> None:
    with client_of(limited(workspace)) as client:
        answers = [chat(client, key) for key in (None, "any", None)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert "all without a key together may ask 2 times a minute" in answers[2].json()["error"]["message"]
        assert [client.get("/metrics").status_code for _ in range(3)] == [200] * 3


def test_keeping_the_server_is_not_counted(workspace: Callable[..., Workspace]) -> None:
    ws = limited(workspace)
    _, secret = keys.create(ws, "ops", "admin")
    headers = {"authorization": f"Bearer {secret}"}
    with client_of(ws) as client:
        for path in ("/admin/canary", "/metrics"):
            assert [client.get(path, headers=headers).status_code for _ in range(3)] == [200] * 3
        assert [client.get("/v1/models", headers=headers).status_code for _ in range(3)] == [200, 200, 429]


def test_more_than_there_is_room_for_is_no_matter_of_waiting(ws: Workspace) -> None:
    with client_of(ws) as client:
        for stream in (False, True):
            answer = chat(client, n=5, stream=stream)
            assert answer.status_code == 400 and "retry-after" not in answer.headers
            assert "5 answers are more than the 4 that there is room for" in answer.json()["error"]["message"]
        with server_of(client).limits.entered(1):
            full = chat(client, n=4)
        assert full.status_code == 429 and full.headers["retry-after"] == "1"


def test_many_texts_to_embed_count_as_a_batch(ws: Workspace) -> None:
    body: dict[str, Any] = {"model": "base", "input": ["a", "b"]}
    with client_of(ws) as client:
        with server_of(client).limits.entered(3):
            assert client.post("/v1/embeddings", json=body).status_code == 429
            assert client.post("/v1/embeddings", json={**body, "input": "a"}).status_code == 200
        with server_of(client).limits.entered(2):
            assert client.post("/v1/embeddings", json={**body, "input": ["a"] * 2048}).status_code == 200


@pytest.mark.parametrize(
    ("body", "headers", "words"),
    [
        (b"model=current", JSON, "it is not JSON (Expecting value: line 1 column 1"),
        (b'{"model": "\xff"}', JSON, "it is not UTF-8"),
        (b"[" * 15_000, JSON, "nested too deeply"),
        (json.dumps(ASK).encode(), {}, "came without a content-type; send it as application/json"),
        (json.dumps(ASK).encode(), {"content-type": "text/plain"}, "came as content-type text/plain; send it as"),
    ],
    ids=["text", "bytes", "deep", "no type", "another type"],
)
def test_a_body_that_cannot_be_read_is_told_so(ws: Workspace, body: bytes, headers: dict[str, str], words: str) -> None:
    with client_of(ws) as client:
        answer = client.post("/v1/chat/completions", content=body, headers=headers)
        found = answer.json()["error"]
        assert answer.status_code == 400 and words in found["message"] and found["param"] is None
        keys.create(ws, "shop")
        assert client.post("/v1/chat/completions", content=body, headers=headers).status_code == 401


@pytest.fixture
def port(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The port of a server that gives bodies little time."""
    monkeypatch.setattr(incoming, "SECONDS", 0.3)
    app = create_app(ws, Told())
    app.state.server.opened.set()
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        running = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        running.start()
        yield listener.getsockname()[1]
        server.should_exit = True
        running.join()


def post(port: int, path: str, body: bytes, said: int) -> socket.socket:
    """Begin a request with a body that is `said` to be so long."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    head = ["host: 127.0.0.1", "content-type: application/json", f"content-length: {said}"]
    connection.sendall("\r\n".join([f"POST {path} HTTP/1.1", *head, "", ""]).encode() + body)
    return connection


def rest(connection: socket.socket) -> tuple[bytes, bytes]:
    """The status line, and the body, of what comes before the server closes the connection."""
    with connection:
        head, _, body = b"".join(iter(lambda: connection.recv(65_536), b"")).partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    return head.partition(b"\r\n")[0], body


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/feedback"])
def test_a_body_that_does_not_come_whole_is_not_waited_for(ws: Workspace, port: int, path: str) -> None:
    status, body = rest(post(port, path, b'{"messages": ', 1000))
    assert b"408" in status and "within 0.3 s" in json.loads(body)["error"]["message"]
    assert not feedback.read(ws)


def drip(connection: socket.socket) -> None:
    for _ in range(1000):
        threading.Event().wait(0.005)
        connection.sendall(b" ")


@pytest.mark.parametrize(("path", "status"), [("/admin/promote", b"401"), ("/v1/nothing", b"404")])
def test_who_is_refused_is_told_before_his_body_has_come(port: int, path: str, status: bytes) -> None:
    """And is then listened to no longer than the others."""
    with post(port, path, b"{", 100_000) as connection:
        assert connection.recv(12).endswith(status)
        with pytest.raises(ConnectionError):
            drip(connection)


def test_a_large_body_is_refused_by_its_length_and_its_answer_can_be_read(port: int) -> None:
    """Also by clients that read nothing before they have sent all."""
    connection = post(port, "/v1/feedback", b" " * 100, 3_000_000)
    assert connection.recv(12).endswith(b"413")
    connection.sendall(b" " * 2_999_900)
    with connection:
        assert b"serve.max_body_bytes" in b"".join(iter(lambda: connection.recv(65_536), b""))


def test_feedback_comes_in_time(ws: Workspace, port: int) -> None:
    body = json.dumps(SAID).encode()
    connection = post(port, "/v1/feedback", body[:20], len(body))
    threading.Event().wait(0.1)
    connection.sendall(body[20:])
    with connection:
        assert connection.recv(12).endswith(b"202")
    assert len(feedback.read(ws)) == 1
