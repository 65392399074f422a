"""The load: clients that ask for a streamed answer, one after the other. Run by locust; see `serving.py`.

Beside locust's own figures of a request there are four more, told as request types: `first` (milliseconds to the first
text), `gap` (milliseconds between two texts), `answer` (milliseconds to the last) and `text`, whose length is the
tokens that came, of answers cut off by the end of the run as well.
"""

from __future__ import annotations

import json
import random
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from locust import FastHttpUser, events, task
from tokenizers import Tokenizer

from treering import examples


@events.init_command_line_parser.add_listener
def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--models", default="current", help="their names, with commas; each request draws one")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--tokenizer", default="", help="tokenizer.json that counts the tokens of all servers")


def questions() -> list[str]:
    """What users of the packaged shop ask."""
    rows = [json.loads(line) for path in sorted(examples.path().glob("*/test.jsonl")) for line in path.open()]
    return [row["messages"][-2]["content"] for row in rows]


class Client(FastHttpUser):
    """Asks, reads the stream to its end, asks again."""

    network_timeout = 600.0

    def on_start(self) -> None:
        """Every client has an order of questions of its own."""
        options = self.environment.parsed_options
        assert options is not None
        self.models, self.max_tokens = options.models.split(","), options.max_tokens
        self.tokenizer = Tokenizer.from_file(str(Path(options.tokenizer)))
        self.random = random.Random(id(self))
        self.questions = questions()

    @task
    def ask(self) -> None:
        """One streamed answer."""
        question = self.random.choice(self.questions)
        body = {
            "model": self.random.choice(self.models),
            "messages": [{"role": "user", "content": f"{question}\nAnswer in three sentences."}],
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "stream": True,
        }
        text = ""
        last = started = time.perf_counter()
        try:
            with self.client.post("/v1/chat/completions", json=body, stream=True, catch_response=True) as response:
                if response.status_code != 200:
                    response.failure(f"status {response.status_code}: {response.text[:200]}")
                    return
                while line := response.stream.readline(b"\n"):
                    piece = _piece(line.decode())
                    if piece:
                        now = time.perf_counter()
                        self._tell("gap" if text else "first", now - last)
                        text, last = text + piece, now
                if not text:
                    response.failure("no text came")
            self._tell("answer", time.perf_counter() - started)
        finally:
            self._tell("text", time.perf_counter() - started, len(self.tokenizer.encode(text).ids) if text else 0)

    def _tell(self, kind: str, seconds: float, length: int = 0) -> None:
        self.environment.events.request.fire(
            request_type=kind,
            name=kind,
            response_time=1000 * seconds,
            response_length=length,
            exception=None,
            context={},
        )


def _piece(line: str) -> str:
    if not line.startswith("data: {"):
        return ""
    event: dict[str, Any] = json.loads(line.removeprefix("data: "))
    choices = event.get("choices") or [{}]
    return choices[0].get("delta", {}).get("content") or ""
