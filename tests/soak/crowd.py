"""Clients that ask all at once: most read their answers, some break off, some send what no server should take."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2

from tests.soak.expected import CHAT, VECTORS, Answer, Expected, Question
from tests.soak.wrong import WRONG, Wrong

CLIENTS = 12
FEEDBACK = "/v1/feedback"
JSON = {"content-type": "application/json"}
LOST = 503
"""What the server counts for a stream whose end it could only tell by an error event."""
DONE = {"done": True}
"""The last event of a stream."""


@dataclass
class Asked:
    """One request, and what came of it."""

    kind: str
    route: str
    model: str = ""
    began: float = field(default_factory=time.time)
    answered: float = 0.0
    """When the first byte came; 0: none did."""
    status: int = 0
    """As the server counts it; 0: the client left, and does not know."""
    version: str = ""
    flaw: str = ""

    def expect(self, what: str, found: object, wanted: object) -> None:
        """Note the first flaw."""
        if found != wanted and not self.flaw:
            self.flaw = f"{what}: {found!r}, not {wanted!r}"


class Crowd:
    """Everybody who asks the server at `url`, and all they asked."""

    def __init__(
        self, url: str, key: str, expected: Expected, versions: list[str], questions: list[Question], long: Question
    ) -> None:
        self.asked: list[Asked] = []
        self.told: set[str] = set()
        """Ids of the feedback that the server has taken."""
        self._url, self._key = url, key
        self._expected = expected
        self._models = ["current"] * len(versions) + versions
        self._questions, self._long = questions, long
        self._random = random.Random("crowd")

    async def ask(self, count: int) -> None:
        """So many requests of all kinds."""
        kinds = {self._whole: 42, self._stream: 35, self._leave: 10, self._err: 10, self._tell: 3}
        drawn = iter(self._random.choices(list(kinds), list(kinds.values()), k=count))

        async def person() -> None:
            async with self._client() as client:
                for kind in drawn:
                    await kind(client)

        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(person())

    async def kill(self, worker: int) -> tuple[float, float]:
        """Kill the process in the middle of an answer that it writes; returns when, and when the next one answered."""
        killed: list[float] = []

        def shoot() -> None:
            os.kill(worker, signal.SIGKILL)
            killed.append(time.time())

        async with self._client() as client:
            await self._read(client, self._long, "base", shoot)
            await self._whole(client)
        return killed[0], time.time()

    def _client(self) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(base_url=self._url, headers={"authorization": f"Bearer {self._key}"}, timeout=120)

    @asynccontextmanager
    async def _asking(
        self, client: httpx2.AsyncClient, asked: Asked, status: int = 200, **sent: Any
    ) -> AsyncIterator[httpx2.Response]:
        """The answer once it begins; whatever breaks it is a flaw."""
        self.asked.append(asked)
        try:
            async with client.stream(**{"method": "POST", "url": asked.route, **sent}) as answer:
                asked.answered, asked.status = time.time(), answer.status_code
                asked.version = answer.headers.get("x-treering-version", "")
                asked.expect("status", asked.status, status)
                if asked.model != "current":
                    asked.expect("version", asked.version, asked.model)
                yield answer
        except httpx2.HTTPError as error:
            asked.flaw = repr(error)

    async def _whole(self, client: httpx2.AsyncClient) -> None:
        question, model = self._random.choice(self._questions), self._random.choice(self._models)
        asked = Asked("whole", question.path, model)
        async with self._asking(client, asked, json={**question.body, "model": model}) as answer:
            said = json.loads(await answer.aread())
            if answer.status_code != 200:
                asked.flaw += f": {said}"
            elif question.path == VECTORS:
                wanted = self._expected.vectors[asked.version, question.name]
                pairs = zip(said["data"][0]["embedding"], wanted, strict=True)
                asked.expect("near", all(abs(one - other) < 1e-4 for one, other in pairs), True)
            else:
                choice, tokens = said["choices"][0], said["usage"]["completion_tokens"]
                text = choice["message"]["content"] if question.path == CHAT else choice["text"]
                self._compare(asked, question, Answer(text, choice["finish_reason"], tokens))
                asked.expect("fingerprint", said["system_fingerprint"], asked.version)

    async def _stream(self, client: httpx2.AsyncClient) -> None:
        question = self._random.choice([question for question in self._questions if question.path != VECTORS])
        await self._read(client, question, self._random.choice(self._models))

    async def _read(
        self, client: httpx2.AsyncClient, question: Question, model: str, begun: Callable[[], None] = lambda: None
    ) -> None:
        """A stream, to its end; `begun` is called once there is text."""
        asked = Asked("stream", question.path, model)
        text, finish, tokens, event = "", "", 0, dict[str, Any]()
        async with self._asking(client, asked, json=_streamed(question, model)) as answer:
            async for event in _events(answer):
                if not text and (text := _text(event)):
                    begun()
                else:
                    text += _text(event)
                for choice in event.get("choices", []):
                    finish = choice["finish_reason"] or finish
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        if "error" in event:
            asked.kind, asked.status = "lost", LOST
            asked.expect("error", event["error"]["code"], "engine_restarted")
            self._compare_part(asked, question, text)
        else:
            asked.expect("end", event, DONE)
            self._compare(asked, question, Answer(text, finish, tokens))

    async def _leave(self, client: httpx2.AsyncClient) -> None:
        """Break off: while the answer is read, while it is waited for, or while the request is sent."""
        asked = Asked("left", self._long.path, self._random.choice(self._models))
        share = self._random.choice((0.0, 0.5, 1.0))
        if share:
            await self._send(asked, share)
        else:
            text = ""
            async with self._asking(client, asked, json=_streamed(self._long, asked.model)) as answer:
                events = aiter(_events(answer))
                for _ in range(self._random.randint(1, 20)):
                    text += _text(await anext(events, DONE))
            self._compare_part(asked, self._long, text)
        asked.status = 0

    async def _send(self, asked: Asked, share: float) -> None:
        """Send so much of the request, and leave without an answer."""
        self.asked.append(asked)
        body = json.dumps({**self._long.body, "model": asked.model}).encode()
        host, _, port = self._url.removeprefix("http://").partition(":")
        head = {"host": host, "authorization": f"Bearer {self._key}", "content-length": len(body), **JSON}
        lines = [f"POST {asked.route} HTTP/1.1", *(f"{name}: {value}" for name, value in head.items()), "", ""]
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write("\r\n".join(lines).encode() + body[: int(share * len(body))])
        await writer.drain()
        await asyncio.sleep(self._random.uniform(0, 0.4))
        writer.close()

    async def _err(self, client: httpx2.AsyncClient) -> None:
        wrong: Wrong = self._random.choice(WRONG)
        asked = Asked("wrong", wrong.path, wrong.version)
        sent = {"method": wrong.method, "content": wrong.content, "headers": {**JSON, **wrong.headers}}
        async with self._asking(client, asked, wrong.status, **sent) as answer:
            asked.expect(wrong.name, set(json.loads(await answer.aread())), {"error"})
        asked.route = wrong.route or wrong.path

    async def _tell(self, client: httpx2.AsyncClient) -> None:
        asked = Asked("feedback", FEEDBACK)
        said = {"messages": [{"role": "user", "content": "hi"}], "correction": "hello"}
        async with self._asking(client, asked, 202, json=said) as answer:
            self.told.add(json.loads(await answer.aread()).get("id"))

    def _compare(self, asked: Asked, question: Question, found: Answer) -> None:
        asked.expect("answer", found, self._expected.answers.get((asked.version, question.name)))

    def _compare_part(self, asked: Asked, question: Question, text: str) -> None:
        whole = self._expected.answers.get((asked.version, question.name))
        asked.expect("part", text, whole and whole.text[: len(text)])


def _streamed(question: Question, model: str) -> dict[str, Any]:
    return {**question.body, "model": model, "stream": True, "stream_options": {"include_usage": True}}


async def _events(answer: httpx2.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in answer.aiter_lines():
        if line.startswith("data: "):
            yield DONE if line == "data: [DONE]" else json.loads(line.removeprefix("data: "))


def _text(event: dict[str, Any]) -> str:
    """What an event adds to an answer."""
    choices = event.get("choices", [])
    return "".join(choice["delta"].get("content", "") if "delta" in choice else choice["text"] for choice in choices)
