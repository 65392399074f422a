"""The process that generates: jobs in on standard input, pieces out on standard output, one JSON object a line.

It knows nothing of HTTP, keys or `current`. When standard input ends, so does it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
"""Prompts of so many tokens in all, padding counted, join at once: nobody waits long for the others' prompts."""

EMBEDDED_TOKENS = 512
"""Texts of so many tokens in all are embedded between two tokens of the answers under way."""

IDLE_SECONDS = 0.005
"""How often a worker with nothing to generate looks whether a version has been read."""

log = logging.getLogger("treering.serve")


@dataclass
class Answer:
    """A job on its way."""

    job: Job
    prompt: list[int]
    limit: int
    sampler: Sampler
    writer: Writer
    written: int = 0


@dataclass
class Texts:
    """Texts to embed: their tokens, and which are left, the longest last."""

    id: str
    version: str
    ids: list[list[int]]
    left: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.left = sorted(range(len(self.ids)), key=lambda at: len(self.ids[at]))

    def next(self, tokens: int) -> list[int]:
        """Takes the longest of those left, and as many more as fit into `tokens` beside it."""
        count = max(1, tokens // len(self.ids[self.left[-1]]))
        taken, self.left = self.left[-count:], self.left[:-count]
        return taken


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
        self._loaded = Loaded(root / "versions", base, config, cast(int, self._tokenizer.pad_token_id), self._tell)
        model = self._loaded.batches()[0].model
        self._context = int(model.config.max_position_embeddings)
        self._vocabulary = int(model.config.vocab_size)
        self._grammar: Any = None
        self._waiting: deque[tuple[str, Answer]] = deque()
        self._texts: deque[Texts] = deque()
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
        awaited = self._awaited()
        busy = any(map(self._loaded.has, awaited)) or any(batch.rows for batch in self._loaded.batches())
        soon = self._loaded.busy or bool(awaited)
        while True:
            try:
                message = self._inbox.get(block=not busy, timeout=IDLE_SECONDS if soon else None)
            except Empty:
                return True
            if message is None:
                return False
            self._take(message)
            busy = True

    def _take(self, message: dict[str, Any]) -> None:
        match message["op"]:
            case "load":
                self._loaded.want(message["version"], message["keep"])
                if self._loaded.has(message["version"]):
                    self._send({"event": "loaded", "version": message["version"], "error": None})
            case "generate":
                with self._failing(message["job"]["id"]):
                    job = Job.model_validate(message["job"])
                    self._waiting.append((job.version, self._prepare(job)))
                    self._loaded.want(job.version)
            case "embed":
                with self._failing(message["id"]):
                    ids = [self._text_ids(text) for text in message["texts"]]
                    self._texts.append(Texts(message["id"], message["version"], ids))
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
            ids = job.prompt if isinstance(job.prompt, list) else self._ids(cast(str, job.prompt))
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
        return self._ids(text, add_special_tokens=False)

    def _text_ids(self, text: str | list[int]) -> list[int]:
        """The tokens of a text to embed."""
        ids = text if isinstance(text, list) else self._ids(text)
        if not 1 <= len(ids) <= self._context or not all(0 <= id < self._vocabulary for id in ids):
            raise EngineError(
                f"one of the texts has {len(ids)} tokens; each text needs 1 to {self._context}, "
                f"each from 0 to {self._vocabulary - 1}",
                status=400,
                code="invalid_input",
            )
        return ids

    def _ids(self, text: str, **settings: Any) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise EngineError(
                f"the text has half a character, U+{ord(text[error.start]):04X}; send both halves of it or neither",
                status=400,
                code="invalid_text",
            ) from None
        return list(cast(Any, self._tokenizer)(text, **settings)["input_ids"])

    def _settle(self) -> None:
        """Versions that were read are put in place; what waited for one that cannot be loaded fails."""
        running = {row.owner.job.version for batch in self._loaded.batches() for row in batch.rows}
        for version, error in self._loaded.settle(running, self._awaited()).items():
            self._send({"event": "loaded", "version": version, "error": error})
            if error is None:
                continue
            failure = EngineError(error, status=503, code="version_unavailable")
            for name, answer in [pair for pair in self._waiting if pair[0] == version]:
                self._waiting.remove((name, answer))
                self._fail(answer.job.id, failure)
            for texts in [texts for texts in self._texts if texts.version == version]:
                self._texts.remove(texts)
                self._fail(texts.id, failure)

    def _awaited(self) -> set[str]:
        """Versions that something waits for."""
        return {version for version, _ in self._waiting} | {texts.version for texts in self._texts}

    def _embed(self) -> None:
        """A few of the texts that wait, of each request in turn."""
        for _ in range(len(self._texts)):
            texts = self._texts.popleft()
            home = self._loaded.home(texts.version)
            if home is None:
                self._loaded.want(texts.version)  # It may have gone since the last of them.
                self._texts.append(texts)
                continue
            with self._failing(texts.id):
                taken = texts.next(EMBEDDED_TOKENS)
                vectors = home.batch.embed([texts.ids[at] for at in taken], home.slot).tolist()
                for at, vector in zip(taken, vectors, strict=True):
                    event = {
                        "event": "vector",
                        "id": texts.id,
                        "at": at,
                        "vector": vector,
                        "tokens": len(texts.ids[at]),
                    }
                    self._send(event)
                if texts.left:
                    self._texts.append(texts)
                else:
                    self._send({"event": "embedded", "id": texts.id})
            return

    def _admit(self) -> None:
        """Let waiting answers join, as many as the batch and one reading of prompts hold."""
        joining: dict[int, tuple[Batch[Answer], list[Row[Answer]]]] = {}
        room = self._config.serve.max_batch_size - sum(len(batch.rows) for batch in self._loaded.batches())
        count = longest = 0
        for version, answer in sorted(self._waiting, key=lambda pair: pair[1].job.background):
            home = self._loaded.home(version)
            if home is None:
                self._loaded.want(version)  # It may have gone since the job came in.
                continue
            longest = max(longest, len(answer.prompt))
            if room <= count or (joining and (count + 1) * longest > PREFILL_TOKENS):
                break
            count += 1
            self._waiting.remove((version, answer))
            _, rows = joining.setdefault(id(home.batch), (home.batch, []))
            rows.append(Row(answer, answer.prompt, home.slot))
        for batch, rows in joining.values():
            try:
                logits = batch.join(rows)
            except torch.OutOfMemoryError as error:
                log.exception("prompts that found no memory")
                for row in rows:
                    self._fail(row.owner.job.id, _no_memory(error))
            else:
                self._go_on(batch, rows, logits)

    def _go_on(self, batch: Batch[Answer], rows: list[Row[Answer]], logits: torch.Tensor) -> None:
        """Choose the next token of `rows`, tell what it adds, let go of those that ended."""
        ended = set(map(id, rows))
        for row, scores in zip(rows, logits, strict=True):
            with self._failing(row.owner.job.id):
                row.last, token = row.owner.sampler.choose(scores)
                piece = self._piece(row.owner, row.last, token)
                if piece.text or piece.tokens or piece.finish:
                    self._send({"event": "piece", "id": row.owner.job.id, **piece.model_dump(exclude_defaults=True)})
                if not piece.finish:
                    ended.remove(id(row))
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
        self._texts = deque(texts for texts in self._texts if texts.id != id)
        for batch in self._loaded.batches():
            gone = {at for at, row in enumerate(batch.rows) if row.owner.job.id == id}
            if gone:
                batch.leave(gone)

    @contextmanager
    def _failing(self, id: str) -> Iterator[None]:
        """Whatever goes wrong inside is the failure of this request alone."""
        try:
            yield
        except EngineError as error:
            self._fail(id, error)
        except BrokenPipeError:
            raise
        except torch.OutOfMemoryError as error:
            self._fail(id, _no_memory(error))
        except Exception as error:
            log.exception("request %s failed", id)
            self._fail(id, EngineError(f"this request cannot be answered ({type(error).__name__}: {error})"))

    def _tell(self, version: str) -> None:
        self._send({"event": "reading", "version": version})

    def _fail(self, id: str, error: EngineError) -> None:
        # What is quoted of the request may hold half characters, which no response can.
        text = str(error).encode(errors="replace").decode()
        self._send({"event": "failed", "id": id, "error": text, "status": error.status, "code": error.code})

    def _end_tokens(self, model: Any) -> set[int]:
        own = getattr(model.generation_config, "eos_token_id", None)
        return {
            cast(int, self._tokenizer.eos_token_id),
            *(own if isinstance(own, list) else [own] if own is not None else []),
        }


def _no_memory(error: torch.OutOfMemoryError) -> EngineError:
    return EngineError(
        f"there is no memory for this request beside the others ({error}); try again, or lower serve.max_batch_size",
        status=503,
        code="out_of_memory",
    )


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
        try:
            for line in sys.stdin:
                inbox.put(json.loads(line))
        finally:
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
