"""Traces of requests: a span each, in the client's trace, and nothing of what was said."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from tests.test_serve_http import Told, chat, client_of
from treering import Workspace
from treering.cli import run
from treering.serve.engine import EngineError

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture
def ws(workspace: Callable[..., Workspace]) -> Workspace:
    return workspace(serve={"telemetry": "otlp"})


def test_a_request_leaves_a_span_in_its_clients_trace(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = InMemorySpanExporter()
    monkeypatch.setattr("opentelemetry.exporter.otlp.proto.http.trace_exporter.OTLPSpanExporter", lambda: memory)
    engine = Told()
    with client_of(ws, engine) as client:
        client.headers["traceparent"] = f"00-{TRACE}-{PARENT}-01"
        answer = chat(client, model="current", user="SECRET")
        assert chat(client, stream=True).text.endswith("[DONE]\n\n")
        engine.bug = EngineError("dead SECRET", status=503)
        chat(client, messages=[{"role": "user", "content": "SECRET"}])
        chat(client, model="SECRET")
        del client.headers["traceparent"]
        client.get("/readyz")
        client.get("/v1/models")
    whole, stream, failed, unknown, models = spans = memory.get_finished_spans()
    assert [span.name for span in spans] == ["POST /v1/chat/completions"] * 4 + ["GET /v1/models"]
    assert all(span.kind is SpanKind.SERVER for span in spans)
    assert whole.context is not None and whole.parent is not None
    assert (f"{whole.context.trace_id:032x}", f"{whole.parent.span_id:016x}") == (TRACE, PARENT)
    assert models.parent is None
    assert dict(whole.attributes or {}) == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "gen_ai.request.model": "current",
        "gen_ai.response.model": "base",
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 2,
        "treering.request": answer.headers["x-request-id"],
    }
    assert (stream.attributes or {})["gen_ai.usage.output_tokens"] == 2
    assert [span.status.is_ok for span in spans] == [True, True, False, True, True]
    assert (failed.attributes or {})["http.response.status_code"] == 503
    assert (unknown.attributes or {})["http.response.status_code"] == 404
    assert whole.start_time is not None and whole.end_time is not None
    assert 0 <= whole.end_time - whole.start_time < 10e9
    assert whole.resource.attributes["service.name"] == "treering"
    assert not any("SECRET" in span.to_json() for span in spans)


def test_without_opentelemetry_it_says_what_to_install(
    ws: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    assert run(["serve", "-w", str(ws.root), "--port", "0"]) == 3
    assert "pip install 'treering[otel]'" in capsys.readouterr().err


def test_by_default_nothing_is_loaded_or_sent(tmp_path: Path) -> None:
    ws = Workspace.create(tmp_path / "plain")
    with client_of(ws) as client:
        assert client.app.state.server.tracing is None  # type: ignore[attr-defined]
