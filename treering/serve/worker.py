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
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar, cast
from weakref import ref

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import llguidance
import torch

from treering import model as models
from treering.config import Config
from treering.errors import TreeringError, no_memory
from treering.methods.recall import Recalled
from treering.pipes import own_output
from treering.serve.batch import Batch, Row
from treering.serve.engine import EngineError, Job, Piece, Token
from treering.serve.grammars import Grammars, built
from treering.serve.prompts import Prompts
from treering.serve.sampling import Sampler
from treering.serve.text import Writer
from treering.serve.texts import Texts
from treering.serve.versions import Home, Loaded

SLICE_TOKENS = {"cpu": 128}
"""So many tokens of prompts, padding counted, are read between two tokens of the answers under way, and so many of
texts are embedded: nobody waits long for the others' prompts. By device."""

FAST_SLICE_TOKENS = 2048
"""The same on any other device."""

ALONE = 4
"""So many times as many are read at once while no answer is under way: large slices take less time in all."""

IDLE_SECONDS = 0.005
"""How often a worker with nothing to generate looks whether a version has been read."""

log = logging.getLogger("treering.serve")

T = TypeVar("T")


@dataclass
class Answer:
    """A job on its way."""

    job: Job
    prompt: list[int]
    limit: int
    sampler: Sampler
    writer: Writer
    by_hand: bool = False
    """Whether its prompt's turns were put together elsewhere."""
    written: int = 0

    @property
    def asked(self) -> tuple[list[int], bool]:
        """Its prompt, and whether that is a text, which is read otherwise than turns with the same tokens."""
        return self.prompt, self.job.messages is None


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
        self._prompts = Prompts(self._tokenizer, self._context, self._vocabulary, config.default_system)
        self._slice = SLICE_TOKENS.get(model.device.type, FAST_SLICE_TOKENS)
        self._grammars = Grammars(self._tokenizer, self._vocabulary)
        self._drafts: deque[tuple[Job, Future[llguidance.LLMatcher]]] = deque()
        self._waiting: deque[tuple[str, Answer]] = deque()
        self._guided: tuple[ref[Home] | None, tuple[list[int], bool], int | None, Recalled | None]
        self._guided = None, ([], False), 0, None
        self._texts: deque[Texts] = deque()
        self._ends = self._end_tokens(model)

    def run(self) -> None:
        """Until the inbox ends."""
        self._send({"event": "ready"})
        while self._receive():
            self._settle()
            self._finish_drafts()
            self._embed()
            for batch in self._loaded.batches():
                self._step(batch)
                self._read(batch)
            self._admit()

    def _receive(self) -> bool:
        """Take what has come in; wait for it if there is nothing else to do. False: there will be no more."""
        awaited = self._awaited()
        busy = any(map(self._loaded.has, awaited)) or any(batch.rows for batch in self._loaded.batches())
        soon = self._loaded.busy or bool(awaited) or bool(self._drafts)
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
                    if job.json_schema is None:
                        self._waiting.append((job.version, self._prepare(job)))
                    else:
                        self._prompts.of(job)  # What is wrong with it is told at once.
                        self._drafts.append((job, self._grammars.of(job.json_schema)))
                    self._loaded.want(job.version)
            case "embed":
                with self._failing(message["id"]):
                    ids = [self._prompts.text(text) for text in message["texts"]]
                    self._texts.append(Texts(message["id"], message["version"], ids))
                    self._loaded.want(message["version"])
            case "cancel":
                self._cancel(message["id"])
            case "ping":
                self._send({"event": "pong"})

    def _finish_drafts(self) -> None:
        """Jobs whose grammars are there wait for their versions with the others."""
        for job, building in list(self._drafts):
            if building.done():
                self._drafts.remove((job, building))
                with self._failing(job.id):
                    self._waiting.append((job.version, self._prepare(job, built(building))))

    def _prepare(self, job: Job, matcher: llguidance.LLMatcher | None = None) -> Answer:
        """Tokenise and check. Raises `EngineError`."""
        prompt = self._prompts.of(job)
        settings = self._config.serve
        return Answer(
            job,
            prompt,
            min(self._context - len(prompt), settings.max_new_tokens if job.max_tokens is None else job.max_tokens),
            Sampler(
                job,
                settings.temperature if job.temperature is None else job.temperature,
                self._tokenizer,
                matcher,
            ),
            Writer(cast(Any, self._tokenizer).backend_tokenizer, job.stop),
            self._prompts.by_hand(job),
        )

    def _settle(self) -> None:
        """Versions that were read are put in place; what waited for one that cannot be loaded fails."""
        running = {row.owner.job.version for batch in self._loaded.batches() for row in batch.rows}
        running |= {texts.version for texts in self._texts if texts.begun}
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
                for event in texts.go_on(home, self._share()):
                    self._send(event)
                if texts.done:
                    self._send({"event": "embedded", "id": texts.id})
                else:
                    self._texts.append(texts)
            return

    def _share(self) -> int:
        """How many tokens may be read now, by which the answers under way wait."""
        return self._slice if self._busy else ALONE * self._slice

    def _admit(self) -> None:
        """Let waiting answers join, as many as the batch holds: those together whose prompts make one slice."""
        room = self._config.serve.max_batch_size - sum(len(batch.rows) for batch in self._loaded.batches())
        groups: list[tuple[Batch[Answer], list[Row[Answer]]]] = []
        unread: dict[int, int] = {}
        guided = False
        for version, answer in sorted(self._waiting, key=lambda pair: pair[1].job.background):
            home = self._loaded.home(version)
            if home is None:
                self._loaded.want(version)  # It may have gone since the job came in.
                continue
            if room < 1:
                break
            if self._to_guide(home, answer):
                if guided and self._busy:
                    continue  # It takes a pass, for which the answers under way wait: one at a time.
                guided = True
            room -= 1
            self._waiting.remove((version, answer))
            place = None
            with self._failing(answer.job.id):
                place = self._place(home, answer)
            if place is None:
                continue
            own, row = place[0], Row(answer, answer.prompt, place[1])
            unread[id(row)] = own.unread(row)
            for batch, rows in groups:
                longest = max(unread[id(other)] for other in [row, *rows])
                if batch is own and (len(rows) + 1) * longest <= self._slice:
                    rows.append(row)
                    break
            else:
                groups.append((own, [row]))
        for batch, rows in groups:
            try:
                _with_room(batch, partial(batch.join, rows))
            except Exception as error:
                self._give_up(rows, error)

    def _place(self, home: Home, answer: Answer) -> tuple[Batch[Answer], int]:
        """Where `answer` is written, which is told what it recalls.

        Those to one request come one after the other, and have the same.
        """
        if not self._guides(home, answer):
            return home.batch, home.slot
        if self._to_guide(home, answer):
            asked = self._prompts.asked(answer.job)
            found = _with_room(
                home.batch, partial(home.guide, *asked, self._config, self._tokenizer, by_hand=answer.by_hand)
            )
            self._guided = ref(home), answer.asked, *found  # It may leave meanwhile, with all its weights.
        _, _, slot, recalled = self._guided
        if answer.job.messages is not None:  # What is learned are answers to a turn, not how a text goes on.
            answer.sampler.recall(recalled)
        return (home.base, 0) if slot is None else (home.batch, slot)

    def _to_guide(self, home: Home, answer: Answer) -> bool:
        """Whether it takes a pass to know who answers, and what is recalled."""
        last, asked, _, _ = self._guided
        return self._guides(home, answer) and (last is None or last() is not home or asked != answer.asked)

    def _guides(self, home: Home, answer: Answer) -> bool:
        """Whether `home` has anything to say of it.

        A text to go on with recalls nothing, but may be the base model's; one whose turns were put together elsewhere
        looks like nothing that was learned, and all that is chosen for it is an expert, if there are any.
        """
        if answer.job.messages is not None:
            return home.router is not None or home.recall is not None
        return bool(home.experts) or (home.router is not None and not answer.by_hand)

    @property
    def _busy(self) -> bool:
        """Whether answers are under way."""
        return any(batch.running for batch in self._loaded.batches())

    def _read(self, batch: Batch[Answer]) -> None:
        """A slice of the prompts that are being read."""
        if not batch.reading:
            return
        try:
            rows, logits = batch.read(self._share())
        except Exception as error:
            if no_memory(error) and batch.forget():
                return
            gone = batch.reading
            self._give_up(gone, error)
            batch.leave(lambda row: any(row is other for other in gone), keep=False)
        else:
            if logits is not None:
                self._go_on(batch, rows, logits)

    def _give_up(self, rows: list[Row[Answer]], error: Exception) -> None:
        """Prompts that could not be read are the failures of their requests alone."""
        if _fatal(error):
            raise error
        log.error("prompts that could not be read", exc_info=error)
        for row in rows:
            self._fail(row.owner.job.id, _failure(error))

    def _step(self, batch: Batch[Answer]) -> None:
        """One token more for all that run. Where there is no memory for that, the one who came last makes room."""
        if not batch.running:
            return
        try:
            rows, logits = batch.step()
        except Exception as error:
            if not no_memory(error):
                raise
            if batch.forget():
                return
            log.exception("a step that found no memory")
            last = batch.running[-1]
            self._fail(last.owner.job.id, _failure(error))
            batch.leave(lambda row: row is last, keep=False)
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
            batch.leave(lambda row: id(row) in ended)

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
        return Piece(
            text=text,
            tokens=tokens,
            finish=finish,
            prompt_tokens=len(answer.prompt),
            completion_tokens=answer.written,
        )

    def _cancel(self, id: str) -> None:
        left = [building for job, building in self._drafts if job.id == id]
        self._drafts = deque(draft for draft in self._drafts if draft[0].id != id)
        for building in left:
            if all(other is not building for _, other in self._drafts):
                self._grammars.drop(building)
        self._waiting = deque(pair for pair in self._waiting if pair[1].job.id != id)
        self._texts = deque(texts for texts in self._texts if texts.id != id)
        for batch in self._loaded.batches():
            batch.leave(lambda row: row.owner.job.id == id)

    @contextmanager
    def _failing(self, id: str) -> Iterator[None]:
        """Whatever goes wrong inside is the failure of this request alone."""
        try:
            yield
        except EngineError as error:
            self._fail(id, error)
        except Exception as error:
            if _fatal(error):
                raise
            log.exception("request %s failed", id)
            self._fail(id, _failure(error))

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


def _with_room(batch: Batch[Answer], work: Callable[[], T]) -> T:
    """What `work` gives; where it finds no memory, once more without what `batch` keeps for later requests."""
    try:
        return work()
    except Exception as error:
        if not (no_memory(error) and batch.forget()):
            raise
        return work()


def _fatal(error: Exception) -> bool:
    """Whether the process is of no more use: nobody reads what it says, or the device has failed."""
    return isinstance(error, BrokenPipeError | torch.AcceleratorError)


def _failure(error: Exception) -> EngineError:
    """What the client is told of an error that nobody foresaw."""
    if not no_memory(error):
        return EngineError(f"this request cannot be answered ({type(error).__name__}: {error})")
    return EngineError(
        f"there is no memory for this request beside the others ({error}); try again, or lower serve.max_batch_size",
        status=503,
        code="out_of_memory",
    )


def main(root: Path) -> int:
    """Serve standard input until it ends. Returns the exit code."""
    out = own_output()  # The pipe to the server carries events alone.

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
