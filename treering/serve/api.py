"""What OpenAI's clients send: requests checked, and turned into jobs for the engine.

Settings that would change an answer and are not supported are refused, not passed over.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, model_validator

from treering.files import json_line
from treering.serve.engine import Job
from treering.serve.errors import ApiError

MOST_CHOICES = 16

Texts = str | list[str] | list[StrictInt] | list[list[StrictInt]]
"""One text or many, as text or as tokens. Strict, for `true` is no token."""


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, given: Any) -> Any:
        """Clients send null for what they leave open, also for settings that are not known here."""
        return {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else given

    model: str = Field(examples=["current"], description="`current`, `base` or a version such as `v3`.")
    user: str | None = None
    # These change no answer, here or anywhere.
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None


class Function(BaseModel):
    """A function the model may call."""

    model_config = ConfigDict(extra="allow")
    name: str


class Tool(BaseModel):
    """A tool, as the chat template sees it."""

    type: Literal["function"]
    function: Function


class TextPart(BaseModel):
    """A part of a message; only text is read."""

    type: Literal["text"]
    text: str


class CalledFunction(BaseModel):
    """What the model called, and with what."""

    name: str
    arguments: str

    def turn(self) -> dict[str, Any]:
        """As chat templates read it: they write the arguments as JSON themselves."""
        try:
            arguments = json.loads(self.arguments or "{}")
            json_line(arguments)  # Escapes may hold what no text may.
        except (ValueError, RecursionError):
            arguments = self.arguments
        return {"name": self.name, "arguments": arguments}


class ToolCall(BaseModel):
    """A call that the model made."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction

    def turn(self) -> dict[str, Any]:
        """As chat templates read it."""
        return {"id": self.id, "type": self.type, "function": self.function.turn()}


class ChatMessage(BaseModel):
    """One turn of a conversation. An answer may be sent back as it came, with all that is empty in it."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_what_is_empty(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {key: value for key, value in given.items() if value is not None and value != []}

    def turn(self) -> dict[str, Any]:
        """As chat templates read it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or [])
        role = "system" if self.role == "developer" else self.role
        calls = [call.turn() for call in self.tool_calls] if self.tool_calls else None
        others = {"name": self.name, "tool_calls": calls, "tool_call_id": self.tool_call_id}
        return {"role": role, "content": text, **{key: value for key, value in others.items() if value is not None}}


class JsonSchema(BaseModel):
    """A schema by name."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, protected_namespaces=())
    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None
    description: str | None = None


class TextFormat(BaseModel):
    """Free text."""

    type: Literal["text"]


class ObjectFormat(BaseModel):
    """Any JSON object."""

    type: Literal["json_object"]


class SchemaFormat(BaseModel):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class StreamOptions(BaseModel):
    """What a stream carries beside the answer."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class _Generate(_Request):
    """What chat and text completions share."""

    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None

    def _common(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "stop": [self.stop] if isinstance(self.stop, str) else self.stop or [],
            "frequency_penalty": self.frequency_penalty or 0.0,
            "presence_penalty": self.presence_penalty or 0.0,
            "logit_bias": self.logit_bias or {},
            "whole": not self.stream,
        }

    def _seed(self, choice: int) -> int | None:
        """Each choice of a request draws from its own numbers."""
        return None if self.seed is None else (self.seed + choice) % 2**63


class ChatRequest(_Generate):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None
    store: bool | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def active_tools(self) -> list[dict[str, Any]] | None:
        """The tools the model is shown."""
        return None if self.tool_choice == "none" or not self.tools else [tool.model_dump() for tool in self.tools]

    def jobs(self, id: str, version: str) -> list[Job]:
        """One job a choice."""
        schema = None
        if isinstance(self.response_format, ObjectFormat):
            schema = {"type": "object"}
        elif isinstance(self.response_format, SchemaFormat):
            schema = self.response_format.json_schema.schema_
        return [
            Job(
                id=f"{id}-{choice}",
                version=version,
                messages=[message.turn() for message in self.messages],
                tools=self.active_tools,
                max_tokens=self.max_completion_tokens or self.max_tokens,
                seed=self._seed(choice),
                logprobs=(self.top_logprobs or 0) if self.logprobs else None,
                json_schema=schema,
                **self._common(),
            )
            for choice in range(self.n or 1)
        ]


class CompletionRequest(_Generate):
    """`POST /v1/completions`."""

    prompt: Texts
    logprobs: int | None = Field(None, ge=0, le=5)
    # Some clients send these always; only such values leave an answer as it is.
    echo: Literal[False] = False
    best_of: Literal[1] = 1

    def jobs(self, id: str, version: str) -> list[Job]:
        """One job a prompt and choice, prompt by prompt. Raises `ApiError` for too many."""
        prompts = _texts(self.prompt)
        count = self.n or 1
        if len(prompts) * count > MOST_CHOICES:
            raise ApiError(
                f"{len(prompts)} prompts with n={count} are more than {MOST_CHOICES} answers; send several requests",
                status=400,
                code="too_many_answers",
            )
        return [
            Job(
                id=f"{id}-{at * count + choice}",
                version=version,
                prompt=prompt,
                max_tokens=16 if self.max_tokens is None else self.max_tokens,  # OpenAI's default here.
                seed=self._seed(choice),
                logprobs=self.logprobs,
                **self._common(),
            )
            for at, prompt in enumerate(prompts)
            for choice in range(count)
        ]


class EmbeddingRequest(_Request):
    """`POST /v1/embeddings`."""

    input: Texts
    encoding_format: Literal["float", "base64"] | None = None

    def texts(self) -> list[str | list[int]]:
        """What to embed."""
        return _texts(self.input)


def _texts(given: Texts) -> list[str | list[int]]:
    """One entry a text, whether one or many were given, as text or as tokens."""
    if isinstance(given, str):
        return [given]
    if given and isinstance(given[0], int):
        return [list(given)]
    if not given or len(given) > 2048:
        raise ApiError(f"{len(given)} texts were given; give 1 to 2048", status=400, code="invalid_input")
    return list(given)  # type: ignore[arg-type]
