"""JSON schemas as grammars, built beside the generation: that of a large schema takes a second."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from decimal import Decimal
from functools import cached_property
from typing import Any, cast

import llguidance
import llguidance.hf

from treering.serve.engine import EngineError

SPACE = "[ ]?"
"""What may stand between the parts of JSON: some models would fill their limit with blanks."""

KEPT = 16
"""Grammars that are kept for the next request, or the next choice of the same."""

LARGEST = 50_000
"""Characters of a schema. Reading it takes time and memory that grow with them."""

MOST_WAITING = 8
"""Grammars that wait for their turn, for all clients together."""

MOST_STATES = 10_000
"""A number that is to be a multiple of another is read by an automaton with as many states as that other has units."""


class Grammars:
    """Builds grammars of schemas in a thread, one at a time."""

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._thread = ThreadPoolExecutor(1)
        self._built: OrderedDict[str, Future[llguidance.LLMatcher]] = OrderedDict()

    def of(self, schema: dict[str, Any]) -> Future[llguidance.LLMatcher]:
        """The matcher of `schema`, to be copied for each use; it raises `EngineError` where that cannot be followed."""
        text = checked(schema)
        if text not in self._built:
            if sum(not built.done() for built in self._built.values()) >= MOST_WAITING:
                raise EngineError(
                    f"{MOST_WAITING} other JSON schemas are being read; try again in some seconds",
                    status=429,
                    code="too_many_schemas",
                )
            self._built[text] = self._thread.submit(self._build, text)
            while len(self._built) > KEPT:
                self._built.popitem(last=False)
        self._built.move_to_end(text)
        return self._built[text]

    def drop(self, building: Future[llguidance.LLMatcher]) -> None:
        """Nobody waits for it any more: it is not begun, unless it was."""
        if building.cancel():
            self._built = OrderedDict((text, built) for text, built in self._built.items() if built is not building)

    @cached_property
    def _tokens(self) -> llguidance.LLTokenizer:
        return llguidance.hf.from_tokenizer(cast(Any, self._tokenizer), n_vocab=self._vocabulary)

    def _build(self, text: str) -> llguidance.LLMatcher:
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(
                text, overrides={"whitespace_pattern": SPACE, "coerce_one_of": True}
            )
            matcher = llguidance.LLMatcher(self._tokens, grammar)
            allowed = int.from_bytes(matcher.deep_copy().compute_bitmask(), "little")
            reason = matcher.get_error() if matcher.is_error() else ""
            if not reason and not allowed & ~(1 << self._tokens.eos_token):
                reason = "nothing fits it"
        except Exception as error:  # Schemas are the client's, and may be anything.
            reason = str(error) or type(error).__name__
        if reason:
            raise refused(reason)
        return matcher


def built(building: Future[llguidance.LLMatcher]) -> llguidance.LLMatcher:
    """A matcher of one's own of what was built. Raises `EngineError`."""
    failure = building.exception()
    if isinstance(failure, EngineError):
        raise failure.again()
    return building.result().deep_copy()


def checked(schema: dict[str, Any]) -> str:
    """`schema` as text. Raises `EngineError` for what would take too long to read: once begun, it cannot be ended."""
    try:
        text = json.dumps(schema)
    except (ValueError, RecursionError) as error:
        raise refused(str(error)) from None
    if len(text) > LARGEST:
        raise refused(f"it has {len(text)} characters; {LARGEST} is the most")
    try:
        found = list(_multiples(schema))
    except RecursionError:
        raise refused("it is nested too deeply") from None
    # Those on one number, wherever they stand, are one automaton with as many states as their product; others add up.
    states = math.prod(set(found))
    if states > MOST_STATES:
        raise refused(f"multipleOf asks for {states}; {MOST_STATES} is the most, different ones multiplied")
    return text


def _multiples(schema: Any) -> Iterator[int]:
    if isinstance(schema, dict):
        number = schema.get("multipleOf")
        if isinstance(number, int | float) and number:
            # Of a fraction its digits count: 25 of 0.25.
            yield int("".join(map(str, Decimal(str(number)).as_tuple().digits)))
    for inner in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from _multiples(inner)


def refused(reason: str) -> EngineError:
    """What the client is told of a schema that cannot be followed."""
    return EngineError(f"this JSON schema cannot be followed: {reason}", status=400, code="invalid_json_schema")
