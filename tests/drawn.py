"""Requests drawn from the OpenAPI page of a running server, right and wrong ones; answers held against the page."""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]

TROUBLE = ("tools", "response_format", "top_logprobs", "logprobs", "logit_bias", "n")
"""What the tiny model, or one of the others, often refuses: left out of every other request."""


def met(url: str, key: str, examples: int) -> dict[str, Counter[int]]:
    """How often each route met each status, over so many right requests a route and half as many wrong ones.

    No answer is one that the page does not name, and none is the server's fault. Versions are called v1 and v2.
    """
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [cast(Any, result).ok() for result in schema.get_all_operations()]
    return {operation.label: _met(operation, key, examples) for operation in operations}


def _met(operation: Any, key: str, examples: int) -> Counter[int]:
    statuses = Counter[int]()

    def ask(case: Any) -> None:
        case.headers = {**(case.headers or {}), "authorization": f"Bearer {key}"}
        statuses[case.call_and_validate(checks=CHECKS, timeout=60).status_code] += 1

    def right(case: Any, name: str, plain: bool) -> None:
        _fit(case, name, plain)
        ask(case)

    good, bad = (
        operation.as_strategy(generation_mode=mode) for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    )
    _run(cast(Any, given)(good, st.sampled_from(["v1", "v2"]), st.booleans())(right), examples)
    if operation.body:
        _run(cast(Any, given)(bad)(ask), examples // 2)
    return statuses


def _run(drawn: Any, examples: int) -> None:
    how = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
    settings(max_examples=examples, phases=[Phase.generate], **cast(Any, how))(drawn)()


def _fit(case: Any, name: str, plain: bool) -> None:
    """Name what there is, and keep answers short; what else was drawn stays, unless the request is to be `plain`."""
    if case.path_parameters:
        case.path_parameters = {"name": name}
    body = case.body
    if not isinstance(body, dict):
        return
    if "model" in body:
        body["model"] = name
    if case.path.endswith("completions"):
        body |= {"max_tokens": 1} | ({"max_completion_tokens": 1} if "messages" in body else {})
    if plain:
        for trouble in TROUBLE:
            body.pop(trouble, None)
        body |= {given: "some text" for given in ("prompt", "input") if given in body}  # Few numbers are tokens.
    match case.path:
        case "/v1/feedback" if plain:  # A rating is for an answer that was given.
            body |= {"rating": None, "version": None, "correction": "as it should be", "task": "a"}
        case "/admin/promote":
            body |= {"version": name, "force": True}
        case "/admin/rollback":
            body["version"] = name if plain else None
        case "/admin/canary" if plain:
            begins = name == "v1"
            body |= {"version": name if begins else None, "share": None, "shadow": begins, "off": not begins}
