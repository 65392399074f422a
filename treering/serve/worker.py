"""The process that generates: jobs in on standard input, pieces out on standard output, one JSON object a line.

It knows nothing of HTTP, keys or `current`. When standard input ends, so does it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, cast

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import llguidance.hf
import torch

from treering import model as models
from treering.config import Config
from treering.errors import TreeringError
from treering.serve.batch import Batch, Row
from treering.serve.engine import EngineError, Job, Piece, Token
from treering.serve.sampling import Sampler
from treering.serve.text import Writer
from treering.serve.versions import Loaded

PREFILL_TOKENS = 2048
"""Prompts of so many tokens in all join at once, so that nobody waits long for the others' prompts."""

IDLE_SECONDS = 0.005
"""How often a worker with nothing to generate looks whether a version has been read."""


@dataclass
class Answer:
    """A job on its way."""

    job: Job
    prompt: list[int]
    limit: int
    sampler: Sampler
    writer: Writer
    written: int = 0


class Worker:
    """Runs the jobs of `inbox` together, and hands every event to `send`."""

    def __init__(
        self, root: Path, config: Config, inbox: SimpleQueue[dict[str, Any] | None], send: Callable[[Any], None]
    ) -> None:
        base = models.resolve(config.model_name_or_path, config.trust_remote_code)
        self._config = config
        self._inbox = inbox
        self._send = send
        self._tokenizer = models.load_tokenizer(base, config.trust_remote_code)
        self._loaded = Loaded(root / "versions", base, config, cast(int, self._tokenizer.pad_token_id))
        model = self._loaded.batches()[0].model
        self._context = int(model.config.max_position_embeddings)
        self._vocabulary = int(model.config.vocab_size)
        self._grammar: Any = None
        self._waiting: deque[tuple[str, Answer]] = deque()
        self._texts: deque[dict[str, Any]] = deque()
        self._ends = self._end_tokens(model)

    def run(self) -> None:
        """Until the inbox ends."""
        self._send({"event": "ready"})
        while self._receive():
            self._settle()
            self._embed()
            for batch in self._loaded.batches():
                if batch.rows:
                    self._go_on(batch, batch.rows, batch.step())
            self._admit()

    def _receive(self) -> bool:
        """Take what has come in; wait for it if there is nothing else to do. False: there will be no more."""
        wanted = {version for version, _ in self._waiting} | {message["version"] for message in self._texts}
        busy = any(map(self._loaded.has, wanted)) or any(batch.rows for batch in self._loaded.batches())
        reading = self._loaded.busy
        while True:
            try:
                message = self._inbox.get(block=not busy, timeout=IDLE_SECONDS if reading else None)
            except Empty:
                return True
            if message is None:
                return False
            self._take(message)
            busy = True

    def _take(self, message: dict[str, Any]) -> None:
        match message["op"]:
            case "load":
                self._loaded.want(message["version"])
                if self._loaded.home(message["version"]):
                    self._send({"event": "loaded", "version": message["version"], "error": None})
            case "generate":
                job = Job.model_validate(message["job"])
                try:
                    self._waiting.append((job.version, self._prepare(job)))
                except EngineError as error:
                    self._fail(job.id, error)
                else:
                    self._loaded.want(job.version)
            case "embed":
                self._texts.append(message)
                self._loaded.want(message["version"])
            case "cancel":
                self._cancel(message["id"])

    def _prepare(self, job: Job) -> Answer:
        """Tokenise and check. Raises `EngineError`."""
        prompt = self._prompt(job)
        room = self._context - len(prompt)
        if room < 1:
            raise EngineError(
                f"the prompt has {len(prompt)} tokens; this model reads {self._context} and needs room for an answer",
                status=400,
                code="context_length_exceeded",
            )
        settings = self._config.serve
        if job.json_schema is not None and self._grammar is None:
            self._grammar = llguidance.hf.from_tokenizer(cast(Any, self._tokenizer), n_vocab=self._vocabulary)
        return Answer(
            job,
            prompt,
            min(room, settings.max_new_tokens if job.max_tokens is None else job.max_tokens),
            Sampler(
                job,
                settings.temperature if job.temperature is None else job.temperature,
                self._tokenizer,
                self._grammar if job.json_schema is not None else None,
            ),
            Writer(cast(Any, self._tokenizer).backend_tokenizer, job.stop),
        )

    def _prompt(self, job: Job) -> list[int]:
        tokenizer = cast(Any, self._tokenizer)
        if job.messages is None:
            ids = job.prompt if isinstance(job.prompt, list) else tokenizer(job.prompt)["input_ids"]
            if not ids or not all(0 <= id < self._vocabulary for id in ids):
                raise EngineError(
                    f"the prompt needs at least one token, each from 0 to {self._vocabulary - 1}",
                    status=400,
                    code="invalid_prompt",
                )
            return list(ids)
        if job.tools and "tools" not in cast(str, tokenizer.chat_template):
            raise EngineError("the chat template of this model takes no tools", status=400, code="tools_not_supported")
        messages = job.messages
        system = self._config.default_system
        if system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        try:
            text = tokenizer.apply_chat_template(messages, tools=job.tools, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # Templates raise whatever they like for turns they do not take.
            raise EngineError(
                f"the chat template refuses these messages: {error}", status=400, code="invalid_messages"
            ) from None
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def _settle(self) -> None:
        """Versions that were read are put in place; what waited for one that cannot be loaded fails."""
        for version, error in self._loaded.settle(self._used).items():
            self._send({"event": "loaded", "version": version, "error": error})
            if error is None:
                continue
            failure = EngineError(error, status=503, code="version_unavailable")
            for name, answer in [pair for pair in self._waiting if pair[0] == version]:
                self._waiting.remove((name, answer))
                self._fail(answer.job.id, failure)
            for message in [m for m in self._texts if m["version"] == version]:
                self._texts.remove(message)
                self._fail(message["id"], failure)

    def _used(self) -> set[str]:
        return {row.owner.job.version for batch in self._loaded.batches() for row in batch.rows}

    def _embed(self) -> None:
        for message in list(self._texts):
            home = self._loaded.home(message["version"])
            if home is None:
                continue
            self._texts.remove(message)
            tokenizer = cast(Any, self._tokenizer)
            ids = [text if isinstance(text, list) else tokenizer(text)["input_ids"] for text in message["texts"]]
            wrong = [len(row) for row in ids if not 1 <= len(row) <= self._context]
            if wrong or not all(0 <= id < self._vocabulary for row in ids for id in row):
                self._fail(
                    message["id"],
                    EngineError(f"each text needs 1 to {self._context} known tokens", status=400, code="invalid_input"),
                )
                continue
            vectors = [home.batch.embed([row], home.slot)[0].tolist() for row in ids]
            self._send({"event": "embedded", "id": message["id"], "vectors": vectors, "tokens": sum(map(len, ids))})

    def _admit(self) -> None:
        """Let waiting answers join, as many as the batch and one reading of prompts hold."""
        joining: dict[int, tuple[Batch[Answer], list[Row[Answer]]]] = {}
        room = self._config.serve.max_batch_size - sum(len(batch.rows) for batch in self._loaded.batches())
        tokens = 0
        for version, answer in sorted(self._waiting, key=lambda pair: pair[1].job.background):
            home = self._loaded.home(version)
            if home is None:
                self._loaded.want(version)  # It may have gone since the job came in.
                continue
            tokens += len(answer.prompt)
            if room <= 0 or (joining and tokens > PREFILL_TOKENS):
                break
            room -= 1
            self._waiting.remove((version, answer))
            _, rows = joining.setdefault(id(home.batch), (home.batch, []))
            rows.append(Row(answer, answer.prompt, home.slot))
        for batch, rows in joining.values():
            self._go_on(batch, rows, batch.join(rows))

    def _go_on(self, batch: Batch[Answer], rows: list[Row[Answer]], logits: torch.Tensor) -> None:
        """Choose the next token of `rows`, tell what it adds, let go of those that ended."""
        ended = set()
        for row, scores in zip(rows, logits, strict=True):
            row.last, token = row.owner.sampler.choose(scores)
            piece = self._piece(row.owner, row.last, token)
            if piece.text or piece.tokens or piece.finish:
                self._send({"event": "piece", "id": row.owner.job.id, **piece.model_dump(exclude_defaults=True)})
            if piece.finish:
                ended.add(id(row))
        if ended:
            batch.leave({at for at, row in enumerate(batch.rows) if id(row) in ended})

    def _piece(self, answer: Answer, id: int, token: Token | None) -> Piece:
        answer.written += 1
        finish: Any = None
        if id in self._ends:
            text, token, finish = answer.writer.rest(), None, "stop"
        else:
            text = answer.writer.push(id)
            if answer.writer.stopped:
                finish = "stop"
            elif answer.sampler.ended:
                text, finish = text + answer.writer.rest(), "stop"
            elif answer.written >= answer.limit:
                text, finish = text + answer.writer.rest(), "length"
        tokens = [token] if token else []
        counts = {"prompt_tokens": len(answer.prompt), "completion_tokens": answer.written} if finish else {}
        return Piece(text=text, tokens=tokens, finish=finish, **counts)

    def _cancel(self, id: str) -> None:
        self._waiting = deque(pair for pair in self._waiting if pair[1].job.id != id)
        for batch in self._loaded.batches():
            gone = {at for at, row in enumerate(batch.rows) if row.owner.job.id == id}
            if gone:
                batch.leave(gone)

    def _fail(self, id: str, error: EngineError) -> None:
        self._send({"event": "failed", "id": id, "error": str(error), "status": error.status, "code": error.code})

    def _end_tokens(self, model: Any) -> set[int]:
        own = getattr(model.generation_config, "eos_token_id", None)
        return {
            cast(int, self._tokenizer.eos_token_id),
            *(own if isinstance(own, list) else [own] if own is not None else []),
        }


def main(root: Path) -> int:
    """Serve standard input until it ends. Returns the exit code."""
    # Whatever a library prints goes to standard error; the pipe to the server carries events alone.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def send(event: Any) -> None:
        out.write(json.dumps(event) + "\n")
        out.flush()

    inbox: SimpleQueue[dict[str, Any] | None] = SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            inbox.put(json.loads(line))
        inbox.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        Worker(root, Config.load(root / "treering.yaml"), inbox, send).run()
    except TreeringError as error:
        send({"event": "fatal", "error": str(error)})
        return 1
    except BrokenPipeError:
        pass  # The server has gone.
    return 0


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    os._exit(code)  # A version that is still being read is not worth waiting for.
