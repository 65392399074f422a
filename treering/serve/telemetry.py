"""What the server tells about itself: Prometheus metrics and one JSON line a request."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from treering.serve.trial import Part

access = logging.getLogger("treering.access")

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


@dataclass
class Seen:
    """What is known of a request when it ends."""

    id: str
    method: str
    path: str
    started: float = field(default_factory=time.perf_counter)
    status: int = 0
    trace: dict[str, str] = field(default_factory=dict)
    """The headers that tell which trace it belongs to."""
    model: str | None = None
    """What was asked for; `version` is what that was."""
    version: str | None = None
    key: str | None = None
    first_token: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    texts: list[str] | None = None
    """The answers, once all are whole."""
    part: Part | None = None
    """Its part in the trial of a version, if it has any."""
    contents: dict[str, Any] | None = None


class Telemetry:
    """The metrics of one server."""

    def __init__(self) -> None:
        self._all = CollectorRegistry()
        self._requests = Counter(
            "treering_requests", "Requests answered.", ["path", "status", "version"], registry=self._all
        )
        self._seconds = Histogram(
            "treering_request_seconds", "Time to the whole answer.", ["path"], buckets=SECONDS, registry=self._all
        )
        self._first = Histogram(
            "treering_first_token_seconds", "Time to the first token of a stream.", buckets=SECONDS, registry=self._all
        )
        self._tokens = Counter("treering_tokens", "Tokens read and written.", ["kind", "version"], registry=self._all)
        self._tried = Counter(
            "treering_canary_requests",
            "Requests while a version was on trial: canary, control or shadow; answered, failed or dropped.",
            ["arm", "outcome"],
            registry=self._all,
        )
        self._inside = Gauge("treering_answers_under_way", "Answers generated or waiting now.", registry=self._all)
        self._up = Gauge("treering_engine_up", "1 while the engine can answer.", registry=self._all)
        self._serving = Gauge(
            "treering_serving", "1 for the version that answers to `current`.", ["version"], registry=self._all
        )

    def tried(self, arm: str, outcome: str) -> None:
        """Count a request that has a part in the trial of a version."""
        self._tried.labels(arm, outcome).inc()

    def page(self, inside: int, alive: bool, serving: str) -> bytes:
        """The metrics in Prometheus' text format, with how things stand now."""
        self._inside.set(inside)
        self._up.set(alive)
        self._serving.clear()
        self._serving.labels(serving).set(1)
        return generate_latest(self._all)

    def ended(self, seen: Seen) -> None:
        """Count a request and write its line: no contents unless they were asked for."""
        seconds = time.perf_counter() - seen.started
        self._requests.labels(seen.path, str(seen.status), seen.version or "").inc()
        self._seconds.labels(seen.path).observe(seconds)
        if seen.first_token is not None:
            self._first.observe(seen.first_token)
        if seen.version is not None:
            self._tokens.labels("prompt", seen.version).inc(seen.prompt_tokens)
            self._tokens.labels("completion", seen.version).inc(seen.completion_tokens)
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request": seen.id,
            "method": seen.method,
            "path": seen.path,
            "status": seen.status,
            "version": seen.version,
            "arm": seen.part.arm if seen.part else None,
            "key": seen.key,
            "seconds": round(seconds, 4),
            "first_token_seconds": None if seen.first_token is None else round(seen.first_token, 4),
            "prompt_tokens": seen.prompt_tokens,
            "completion_tokens": seen.completion_tokens,
            **({"contents": seen.contents} if seen.contents else {}),
        }
        access.info(json.dumps(line, ensure_ascii=False))
