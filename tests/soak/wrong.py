"""Requests that no server should answer, and what it should say to each."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from tests.soak.expected import CHAT, TEXT, VECTORS

LARGEST = 100_000
"""`serve.max_body_bytes` of the server that gets them."""


@dataclass(frozen=True)
class Wrong:
    """A request with its status, and the route and the version under which the server counts it."""

    name: str
    status: int
    body: bytes = b""
    path: str = CHAT
    headers: dict[str, str] = field(default_factory=dict)
    route: str = ""
    version: str = ""
    method: str = "POST"
    in_pieces: bool = False

    @property
    def content(self) -> bytes | AsyncIterator[bytes]:
        return self._pieces() if self.in_pieces else self.body

    async def _pieces(self) -> AsyncIterator[bytes]:
        for at in range(0, len(self.body), 10_000):
            yield self.body[at : at + 10_000]


def _chat(**settings: object) -> bytes:
    return json.dumps({"model": "v1", "messages": [{"role": "user", "content": "hi"}], **settings}).encode()


def _long(size: int) -> bytes:
    return _chat(messages=[{"role": "user", "content": "x" * size}])


WRONG = [
    Wrong("a byte too large", 413, _chat().ljust(LARGEST + 1)),
    Wrong("far too large", 413, _long(30 * LARGEST)),
    Wrong("too large, its length untold", 413, _long(3 * LARGEST), in_pieces=True),
    Wrong("too large to embed", 413, _long(2 * LARGEST), path=VECTORS),
    Wrong("too large a word", 413, _long(2 * LARGEST), path="/v1/feedback"),
    Wrong("no body", 400),
    Wrong("half of one", 400, _chat()[:-9]),
    Wrong("no JSON", 400, b"model=current", path=TEXT),
    Wrong("no UTF-8", 400, _chat().replace(b"hi", b"\xff\xfe")),
    Wrong("half a character", 400, _chat().replace(b"hi", rb"\ud800")),
    Wrong("no number", 400, _chat(seed=float("nan"))),
    Wrong("nested without end", 400, b"[" * 50_000),
    Wrong("a list", 400, b"[]", path=VECTORS),
    Wrong("another type", 400, _chat(), headers={"content-type": "text/plain"}),
    Wrong("an unknown setting", 400, _chat(best_of=3)),
    Wrong("too hot", 400, _chat(temperature=9, stream=True)),
    Wrong("more than the model reads", 400, _long(4000), version="v1"),
    Wrong("nothing to embed", 400, b'{"model": "v1", "input": []}', path=VECTORS, version="v1"),
    Wrong("an unknown model", 404, _chat(model="gpt-4")),
    Wrong("an unknown path", 404, b"{}", path="/v1/audio/speech", route="unknown"),
    Wrong("another method", 405, method="PUT", body=_chat()),
    Wrong("an unknown key", 401, _chat(), headers={"authorization": "Bearer tr-nobody"}),
    Wrong("no key", 401, b'{"version": "v1"}', path="/admin/promote", headers={"authorization": ""}),
    Wrong("a key that may not", 403, b'{"version": "v1"}', path="/admin/promote"),
    Wrong("another site's page", 403, _chat(), headers={"origin": "http://evil.example"}, route="unknown"),
    Wrong("another name", 400, _chat(), headers={"host": "evil.example"}, route="unknown"),
]
