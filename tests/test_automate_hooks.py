"""Hooks: what is sent, how it is signed, and that none of them can hold the loop."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from treering import Workspace
from treering.automate import events, hooks
from treering.automate.events import Events
from treering.automate.hooks import Hooks, secret, signed
from treering.automate.loop import Automation
from treering.config import Config
from treering.errors import ConfigError, UsageError
from treering.sections import AutomateConfig

KEY = "0123456789abcdef0123456789abcdef"


class Receiver:
    """A real server that checks signatures as a receiver would, and answers with `codes`, then with 204."""

    def __init__(self) -> None:
        self.requests: list[tuple[dict[str, str], bytes]] = []
        self.codes: list[int] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.requests.append(({k.lower(): v for k, v in self.headers.items()}, body))
                self.send_response(receiver.codes.pop(0) if receiver.codes else 204)
                self.send_header("location", "/elsewhere")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/hook?key=private"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def events(self) -> list[dict[str, Any]]:
        """What came, once its signature was found right."""
        found = []
        for headers, body in self.requests:
            content = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
            digest = hmac.new(KEY.encode(), content, hashlib.sha256).digest()
            assert headers["webhook-signature"] == "v1," + base64.b64encode(digest).decode()
            assert abs(int(headers["webhook-timestamp"]) - time.time()) < 300
            assert headers["content-type"] == "application/json"
            found.append(json.loads(body))
        return found


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    found = Receiver()
    yield found
    found.server.shutdown()
    found.server.server_close()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "PAUSES", (0.0, 0.0))


@pytest.fixture
def config(tmp_path: Path, receiver: Receiver) -> AutomateConfig:
    (tmp_path / "secret").write_text(KEY + "\n")
    return AutomateConfig(webhook=receiver.url, webhook_secret_file="secret")


def sent(root: Path, config: AutomateConfig, *names: str) -> list[str]:
    """Send events; returns the complaints."""
    complaints: list[str] = []
    hooks = Hooks(root, complaints.append)
    for name in names:
        hooks.send({"event": name, "reason": "größer"}, config)
    hooks.close()
    return complaints


def test_a_webhook_is_signed_and_in_order(tmp_path: Path, config: AutomateConfig, receiver: Receiver) -> None:
    assert sent(tmp_path, config, "update.started", "update.promoted") == []
    assert receiver.events == [
        {"event": "update.started", "reason": "größer"},
        {"event": "update.promoted", "reason": "größer"},
    ]


def test_the_receiver_in_the_documentation_works(tmp_path: Path, config: AutomateConfig, receiver: Receiver) -> None:
    page = (Path(__file__).parents[1] / "docs" / "automation.md").read_text()
    names: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0], names)
    sent(tmp_path, config, "update.promoted")
    ((headers, body),) = receiver.requests
    assert names["is_genuine"](headers, body, KEY.encode())
    assert not names["is_genuine"](headers, body + b" ", KEY.encode())
    assert not names["is_genuine"](headers, body, KEY.encode(), seconds=-1)


def test_the_signature_is_that_of_the_standard() -> None:
    """The example that libraries for Standard Webhooks test themselves with."""
    key = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    found = signed(b'{"test": 2432232314}', key, 1614265330, "msg_p5jXN8AQM9LWM0D4loKWxJek")
    assert found["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_a_webhook_is_tried_again_under_the_same_id(tmp_path: Path, config: AutomateConfig, receiver: Receiver) -> None:
    receiver.codes = [500, 302]
    assert sent(tmp_path, config, "update.held") == []
    assert len(receiver.events) == 3
    assert len({headers["webhook-id"] for headers, _ in receiver.requests}) == 1


def test_a_webhook_that_fails_is_given_up_and_the_address_kept_secret(
    tmp_path: Path, config: AutomateConfig, receiver: Receiver
) -> None:
    receiver.codes = [500] * 3
    (complaint,) = sent(tmp_path, config, "update.held", "update.started")
    assert complaint.startswith("webhook at 127.0.0.1 on update.held: HTTP Error 500")
    assert complaint.endswith("tried 3 times") and "private" not in complaint and KEY not in complaint
    assert len(receiver.events) == 4  # The next one is sent all the same.


def test_a_receiver_that_hangs_holds_nobody(
    tmp_path: Path, config: AutomateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    monkeypatch.setattr(hooks, "post", lambda *_: release.wait(60))
    monkeypatch.setattr(hooks, "_WAITING", 1)
    complaints: list[str] = []
    found = Hooks(tmp_path, complaints.append)
    found._queue.maxsize = 2
    for _ in range(5):
        found.send({"event": "update.held"}, config)
    assert len(complaints) >= 2 and "is only in the log" in complaints[0]
    found.close(seconds=0.1)
    release.set()


def test_a_command_gets_the_event(tmp_path: Path) -> None:
    (tmp_path / "hook.sh").write_text('cat > "$1"\necho noise\n')
    assert sent(tmp_path, AutomateConfig(on_event="sh hook.sh 'got it'"), "update.promoted") == []
    assert json.loads((tmp_path / "got it").read_text()) == {"event": "update.promoted", "reason": "größer"}


@pytest.mark.parametrize(
    ("command", "told"),
    [("sh -c 'exit 3'", "exit code 3"), ("no-such-program", "No such file"), ("sleep 60", "longer than 0.2 seconds")],
)
def test_a_command_that_fails_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, told: str
) -> None:
    monkeypatch.setattr(hooks, "SECONDS", 0.2 if command.startswith("sleep") else 10.0)
    (complaint,) = sent(tmp_path, AutomateConfig(on_event=command), "update.held")
    assert told in complaint and complaint.endswith("tried 3 times")


def test_secrets(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw\n")
    assert secret(file) == base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    file.write_text("short")
    with pytest.raises(UsageError, match="shorter than 16 bytes"):
        secret(file)
    file.write_text("whsec_!")
    with pytest.raises(UsageError, match="cannot be read"):
        secret(file)
    with pytest.raises(UsageError, match="cannot be read"):
        secret(tmp_path / "none")


def test_a_missing_secret_is_told_and_stops_nothing(workspace: Callable[..., Workspace]) -> None:
    ws = workspace(automate={"webhook": "https://x.test/", "webhook_secret_file": "none"})
    assert Automation(ws).run(threading.Event(), once=True) == "idle"
    reasons = [entry["reason"] for entry in events.history(ws) if entry["event"] == "hook.failed"]
    assert len(reasons) == 2 and "automate.webhook_secret_file:" in reasons[0] and "cannot be read" in reasons[0]


def test_every_event_is_sent_and_a_failed_hook_is_noted_but_not_sent(
    workspace: Callable[..., Workspace], receiver: Receiver
) -> None:
    ws = workspace()
    (ws.root / "secret").write_text(KEY)
    config = AutomateConfig(webhook=receiver.url, webhook_secret_file="secret", on_event="false")
    auto = Automation(ws)
    log: Events = auto.events
    for name in events.NAMES:
        log.add(name, config, reason="why")
    log.hooks.close()
    assert [event["event"] for event in receiver.events] == list(events.NAMES)
    assert {event["workspace"] for event in receiver.events} == {str(ws.root)}
    told = [entry for entry in events.history(ws) if "tried 3 times" in entry.get("reason", "")]
    assert {entry["event"] for entry in told} == {"hook.failed"} and len(told) == len(events.NAMES)


def test_events_are_those_that_are_documented() -> None:
    page = (Path(__file__).parents[1] / "docs" / "automation.md").read_text()
    package = Path(events.__file__).parent
    for name, meaning in events.NAMES.items():
        assert f"| `{name}` | {meaning} |" in page
    source = "".join(path.read_text() for path in package.glob("*.py") if path.name != "events.py")
    source = source.replace('f"{step}.failed"', '"look.failed" "ingest.failed" "update.failed"') + '"hook.failed"'
    assert all(f'"{name}"' in source for name in events.NAMES)


def test_a_command_that_hangs_leaves_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even what it started."""
    monkeypatch.setattr(hooks, "SECONDS", 0.5)
    sent(tmp_path, AutomateConfig(on_event="sh -c 'sleep 600 & echo $! >> pids; wait'"), "update.held")
    pids = (tmp_path / "pids").read_text().split()
    deadline = time.monotonic() + 10
    while any(runs(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(pids) == 3


def runs(pid: str) -> bool:
    """Whether there is such a process that has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_time_limit_is_that_of_the_whole_call(
    tmp_path: Path, config: AutomateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each byte comes in time; all of them never do."""
    monkeypatch.setattr(hooks, "SECONDS", 1.0)
    listener = socket.create_server(("127.0.0.1", 0))

    def drip() -> None:
        with suppress(OSError), listener.accept()[0] as connection:
            connection.sendall(b"HTTP/1.1 200 OK\r\nx: ")
            while True:
                connection.sendall(b"x")
                time.sleep(0.1)

    threading.Thread(target=drip, daemon=True).start()
    began = time.monotonic()
    with listener, pytest.raises(TimeoutError, match="longer than 1 seconds"):
        hooks.post(f"http://127.0.0.1:{listener.getsockname()[1]}/", b"{}", tmp_path / "secret")
    assert time.monotonic() - began < 10


def test_nothing_secret_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "SECONDS", 1.0)
    (tmp_path / "secret").write_text(KEY)
    complaints = sent(tmp_path, AutomateConfig(on_event="sleep 60 --key=S3CRET"), "update.held")
    complaints += sent(tmp_path, AutomateConfig(on_event="./none S3CRET"), "update.held")
    for url in ("http://127.0.0.1:1/S3CRET", "http://nowhere.invalid/S3CRET"):
        complaints += sent(tmp_path, AutomateConfig(webhook=url, webhook_secret_file="secret"), "update.held")
    assert len(complaints) == 4 and not any("S3CRET" in complaint for complaint in complaints)
    assert "Connection refused" in complaints[2]


@pytest.mark.parametrize(
    "url",
    [
        "http://[::1/x",
        "http://host:port/S3CRET",
        "http://host/a S3CRET",
        "http://",
        "https://x/\n",
        "https://b:S3CRET@x/",
    ],
)
def test_an_address_that_cannot_be_sent_to_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match=r"automate\.webhook: ") as found:
        Config.build({"automate": {"webhook": url, "webhook_secret_file": "secret"}})
    assert "S3CRET" not in str(found.value)
    with pytest.raises(ConfigError, match="go together") as found:
        Config.build({"automate": {"webhook": "https://x.test/S3CRET"}})
    assert "S3CRET" not in str(found.value)


def test_whatever_a_hook_meets_the_next_event_is_sent(
    tmp_path: Path, config: AutomateConfig, receiver: Receiver
) -> None:
    broken = config.model_copy(update={"on_event": "'"})  # No setting that was read could hold it.
    assert len(sent(tmp_path, broken, "update.held", "update.started")) == 2
    assert [event["event"] for event in receiver.events] == ["update.held", "update.started"]
