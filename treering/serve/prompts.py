"""What a request gives the model to read, as tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from treering.data.example import Message
from treering.data.marks import marks_of, neutral
from treering.features import LONGEST, last_turn
from treering.rendering import rendered
from treering.serve.engine import EngineError, Job

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HEAD = 8
"""A text of more characters a token of the context than this is judged by its head first: all of it takes long."""


class Prompts:
    """Tokenises for a model that reads `context` tokens out of `vocabulary`. `system` stands before conversations."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, context: int, vocabulary: int, system: str | None = None
    ) -> None:
        self._tokenizer = cast(Any, tokenizer)
        self._context = context
        self._vocabulary = vocabulary
        self._system = system
        self._marks = marks_of(tokenizer)
        self._asked: object = None
        self._last: list[int] | EngineError = []

    def of(self, job: Job) -> list[int]:
        """The tokens before the answer, at least one and fewer than the context has. Raises `EngineError`."""
        asked = job.messages, job.tools, job.prompt
        if asked != self._asked:  # The answers to one request come one after the other.
            try:
                self._last = self._read(job)
            except EngineError as error:
                self._last = error
            self._asked = asked
        if isinstance(self._last, EngineError):
            raise self._last.again()
        return self._last

    def asked(self, job: Job) -> tuple[list[int], int]:
        """What tells who is to answer: tokens, and where among them the last turn begins.

        A plain text is read as if somebody asked about it; of one with marks of the template nothing is known but that.
        """
        if self.by_hand(job):
            return self.of(job), 0
        # Its end alone is read, and with the template's own tokens all of it might be too long.
        messages = job.messages or [{"role": "user", "content": self._text(job)[-HEAD * LONGEST :]}]
        *before, last = messages
        ids = self._rendered(job, messages)
        return ids, last_turn(ids, self._rendered(job, [*before, {**last, "content": ""}]))

    def by_hand(self, job: Job) -> bool:
        """Whether its prompt is a text with marks of the template: turns that were put together elsewhere."""
        return job.messages is None and self._marks is not None and self._marks.search(self._text(job)) is not None

    def _text(self, job: Job) -> str:
        return job.prompt if isinstance(job.prompt, str) else str(self._tokenizer.decode(job.prompt))

    def text(self, text: str | list[int]) -> list[int]:
        """The tokens of a text to embed, at least one. Raises `EngineError`."""
        ids = text if isinstance(text, list) else self._ids(text)
        if not 1 <= len(ids) <= self._context or not self._known(ids):
            raise EngineError(
                f"one of the texts has {len(ids)} tokens; each text needs 1 to {self._context}, "
                f"each from 0 to {self._vocabulary - 1}",
                status=400,
                code="invalid_input",
            )
        return ids

    def _read(self, job: Job) -> list[int]:
        if job.messages is not None:
            ids = self._rendered(job, job.messages)
        else:
            ids = job.prompt if isinstance(job.prompt, list) else self._ids(cast(str, job.prompt))
            if not ids or not self._known(ids):
                raise EngineError(
                    f"the prompt needs at least one token, each from 0 to {self._vocabulary - 1}",
                    status=400,
                    code="invalid_prompt",
                )
        if len(ids) >= self._context:
            raise self._too_long(f"{len(ids)}")
        return ids

    def _rendered(self, job: Job, messages: list[dict[str, Any]]) -> list[int]:
        return self._ids(self._conversation(job, messages), add_special_tokens=False)

    def _conversation(self, job: Job, messages: list[dict[str, Any]]) -> str:
        if messages[0]["role"] != "system" and (self._system is not None or job.tools):
            messages = [{"role": "system", "content": self._system or ""}, *messages]
        if job.tools:
            messages = [{**messages[0], "tools": job.tools}, *messages[1:]]
        if self._marks is not None:  # Else a client's text could speak for the assistant, or for the operator.
            messages = [neutral(Message.of(turn), self._marks).as_dict() for turn in messages]
        try:
            return rendered(self._tokenizer, messages, open_answer=True)
        except Exception as error:  # Templates raise whatever they like for turns they do not take.
            raise EngineError(
                f"the chat template refuses these messages: {error}", status=400, code="invalid_messages"
            ) from None

    def _ids(self, text: str, **settings: Any) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise EngineError(
                f"the text has half a character, U+{ord(text[error.start]):04X}; send both halves of it or neither",
                status=400,
                code="invalid_text",
            ) from None
        head = text[: HEAD * self._context]
        if len(head) < len(text):
            count = len(self._tokenizer(head, **settings)["input_ids"])
            if count > self._context + 1:  # The last token may change with what follows.
                raise self._too_long(f"more than {count}")
        return list(self._tokenizer(text, **settings)["input_ids"])

    def _known(self, ids: list[int]) -> bool:
        return all(0 <= id < self._vocabulary for id in ids)

    def _too_long(self, count: str) -> EngineError:
        return EngineError(
            f"the prompt has {count} tokens; this model reads {self._context} and needs room for an answer",
            status=400,
            code="context_length_exceeded",
        )
