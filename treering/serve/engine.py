"""What the server asks of whatever generates: the small interface that every engine fulfils."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict

from treering.errors import TreeringError

BASE = "base"
"""The name under which the untouched base model answers."""


class EngineError(TreeringError):
    """A request failed in the engine. `code` is its short name, `status` the HTTP status that fits."""

    def __init__(self, message: str, *, status: int = 500, code: str = "engine_error") -> None:
        super().__init__(message)
        self.status = status
        self.code = code

    def again(self) -> EngineError:
        """The same to be raised anew: one that is kept and raised each time holds all that its raising has passed."""
        return EngineError(str(self), status=self.status, code=self.code)


class _Wire(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Job(_Wire):
    """One answer to generate: a conversation (`messages`) or a plain text (`prompt`), and how to choose its tokens."""

    id: str
    version: str
    """`base` or a version's name."""
    messages: list[dict[str, Any]] | None = None
    prompt: str | list[int] | None = None
    tools: list[dict[str, Any]] | None = None
    max_tokens: int | None = None
    """Tokens to write at most; None: as the settings say."""
    temperature: float | None = None
    """0 takes the likeliest token; None: as the settings say."""
    top_p: float = 1.0
    seed: int | None = None
    stop: list[str] = []
    logprobs: int | None = None
    """How many of the likeliest tokens to report beside the chosen one; None: no log-probabilities at all."""
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    json_schema: dict[str, Any] | None = None
    """The answer is JSON that fits this schema."""
    background: bool = False
    """Nobody waits for the answer: all others go first."""
    whole: bool = False
    """Nobody sees the answer before its end: its pieces come then, and until then it may be started over."""


class Token(_Wire):
    """A generated token with its log-probability and those of the likeliest others, (text, log-probability) each.

    What is only a part of a character is called by its bytes (`serve/tokens.py`).
    """

    text: str
    logprob: float
    top: list[tuple[str, float]] = []


class Piece(_Wire):
    """What a step adds to an answer. The last one has a `finish`: `stop` (it ended by itself) or `length`."""

    text: str = ""
    tokens: list[Token] = []
    finish: Literal["stop", "length"] | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Embeddings(_Wire):
    """One vector a text, of length one, and the tokens read."""

    vectors: list[list[float]]
    tokens: int


class Engine(Protocol):
    """Loads versions and generates with them. Every method may raise `EngineError`."""

    async def start(self) -> None:
        """Get ready to answer with the base model."""

    async def stop(self) -> None:
        """End what still runs."""

    async def load(self, version: str, *, keep: bool = False) -> None:
        """Have `version` ready, so that no request waits for it; `keep` it so until another one is to be kept."""

    def generate(self, job: Job) -> AsyncIterator[Piece]:
        """Pieces of the answer as they are written. Leaving the iterator early cancels the job."""

    async def embed(self, version: str, texts: list[str | list[int]]) -> Embeddings:
        """Mean of the last hidden states of each text."""

    @property
    def alive(self) -> bool:
        """Whether it can take jobs now."""
