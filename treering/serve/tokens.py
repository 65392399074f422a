"""What a single token is called. Some are only a part of a character, and no text at all."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

PART = re.compile(r"bytes:((?:\\x[0-9a-f]{2})+)")
"""OpenAI's name for a token that is no text: `bytes:\\xe2\\x82`."""


def name_of(tokenizer: Any, id: int) -> str:
    """The text of a token, or its bytes if they are no whole characters."""
    text = str(tokenizer.decode([id]))
    if "\N{REPLACEMENT CHARACTER}" not in text:
        return text
    raw = _raw(str(tokenizer.convert_ids_to_tokens(id)))
    try:
        raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
    return text


def bytes_of(name: str) -> bytes:
    """The bytes of a token by its name."""
    part = PART.fullmatch(name)
    return bytes.fromhex(part[1].replace("\\x", "")) if part else name.encode()


def _raw(token: str) -> bytes:
    """The bytes of a token as vocabularies write it: `<0xE2>`, or a letter for each byte."""
    if fallback := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
        return bytes.fromhex(fallback[1])
    letters = _letters()
    return bytes(letters[letter] for letter in token) if set(token) <= letters.keys() else token.encode()


@cache
def _letters() -> dict[str, int]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}
