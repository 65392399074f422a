"""A conversation as the text that a model reads: by its chat template, and around what that has no place for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from treering.data.example import Message
from treering.data.tools import CALLED, OFFERED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def rendered(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Mapping[str, Any]], *, open_answer: bool) -> str:
    """The text of OpenAI-style turns; a system turn may have `tools`. Raises what the chat template does.

    Tools and calls are said as text (`Message.text`) where the template does not know them.
    """
    said: list[Any] = [*turns]
    tools = None
    if any(len(turn) > 2 for turn in turns):
        said = [_told(turn, str(tokenizer.chat_template)) for turn in turns]
        tools = said[0].pop(OFFERED, None)
        if tools and not said[0]["content"]:
            del said[0]  # It was there for the tools alone.
    text = tokenizer.apply_chat_template(said, tools=tools, tokenize=False, add_generation_prompt=open_answer)
    return cast(str, text)


def _told(turn: Mapping[str, Any], template: str) -> dict[str, Any]:
    unknown = [key for key in (OFFERED, CALLED) if turn.get(key) and key not in template]
    if not unknown:
        return dict(turn)
    return {**{key: value for key, value in turn.items() if key not in unknown}, "content": Message.of(turn).text}
