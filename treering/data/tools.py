"""Tools that a conversation offers and calls of them: read from rows, and said as text where a chat template cannot.

As text a call stands between `<tool_call>` and `</tool_call>`, as the models of Qwen and SmolLM2 write it and as the
server reads it back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_OFFERED = "These functions may be called, each a line of JSON:\n<tools>\n{}\n</tools>\nA call is written as\n{}"
_CALL = "<tool_call>\n{}\n</tool_call>"

CALLED, OFFERED = "tool_calls", "tools"

DEEPEST = 50
"""Levels of lists and objects in each other."""


class ToolError(ValueError):
    """Tools or calls that are not what OpenAI's format has."""


def compact(value: object) -> str:
    """JSON on one line, keys in their order: a model learns arguments in the order in which somebody wrote them."""
    return json.dumps(value, ensure_ascii=False)


def offered(value: object) -> list[dict[str, Any]]:
    """Tools as OpenAI has them, from a list or its JSON text; functions alone are wrapped. Raises `ToolError`."""
    tools = _decoded(value, "tools")
    if not isinstance(tools, list):
        raise ToolError("tools are no list; write them as OpenAI has them")
    return [_tool(tool, number) for number, tool in enumerate(tools, 1)]


def _tool(tool: object, number: int) -> dict[str, Any]:
    function = _filled(tool.get("function") or tool) if isinstance(tool, Mapping) else {}
    function.pop("type", None)
    if not isinstance(function.get("name"), str):
        raise ToolError(f"tool {number} has no name; write it as OpenAI has it")
    return {"type": "function", "function": function}


def called(value: object) -> list[dict[str, Any]]:
    """Calls as templates read them, arguments as objects, from a list, one call or JSON text. Raises `ToolError`."""
    calls = _decoded(value, "the calls")
    return [_called(call, number) for number, call in enumerate(calls if isinstance(calls, list) else [calls], 1)]


def _called(call: object, number: int) -> dict[str, Any]:
    function = (call.get("function") or call) if isinstance(call, Mapping) else {}
    arguments = _decoded(function.get("arguments") or {}, f"the arguments of call {number}")
    if not isinstance(function.get("name"), str) or not isinstance(arguments, Mapping):
        raise ToolError(f"call {number} needs a name, and arguments that are an object")
    id = call.get("id") if isinstance(call, Mapping) else None
    told = {"type": "function", "function": {"name": function["name"], "arguments": _filled(arguments)}}
    return {"id": id, **told} if isinstance(id, str) else told


def _decoded(value: object, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ToolError(f"{what} cannot be read as JSON ({error})") from None


def _filled(value: Any, depth: int = 0) -> Any:
    """Without the nulls that a table adds for keys which only other rows have."""
    if depth > DEEPEST:
        raise ToolError(f"tools or calls are nested more than {DEEPEST} deep; make them flatter")
    if isinstance(value, Mapping):
        return {str(key): _filled(part, depth + 1) for key, part in value.items() if part is not None}
    return [_filled(part, depth + 1) for part in value] if isinstance(value, list) else value


def strings(value: Any, how: Callable[[str], str]) -> Any:
    """A JSON value with `how` done to each text in it, names of keys included."""
    if isinstance(value, Mapping):
        return {how(key): strings(part, how) for key, part in value.items()}
    if isinstance(value, list):
        return [strings(part, how) for part in value]
    return how(value) if isinstance(value, str) else value


def offer_as_text(tools: Sequence[Mapping[str, Any]]) -> str:
    """What a system turn says where the template has no place for tools."""
    example = _CALL.format('{"name": "...", "arguments": {...}}')
    return _OFFERED.format("\n".join(compact(tool["function"]) for tool in tools), example)


def calls_as_text(calls: Sequence[Mapping[str, Any]]) -> str:
    """What an assistant's turn says where the template has no place for calls."""
    return "\n".join(_CALL.format(_call_as_text(call["function"])) for call in calls)


def _call_as_text(function: Mapping[str, Any]) -> str:
    return compact({"name": function["name"], "arguments": function["arguments"]})
