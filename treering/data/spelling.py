"""One text however it is written: in another normal form, over lines, with blanks of another kind, or escaped."""

from __future__ import annotations

import json
import re
import unicodedata

_ESCAPES = re.compile(r"(?:\\u[0-9a-fA-F]{4})+|\\x[0-9a-fA-F]{2}|\\.", re.DOTALL)
_UNSEEN = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")
"""Soft hyphens, joiners, marks of direction: nobody sees them, nor types them when looking for a name."""

_NESTED = 3
"""JSON in JSON that is looked into."""


def plainly(text: str) -> str:
    """The form in which texts are searched: NFKC, case folded, white space collapsed, nothing that is not seen."""
    if text.isascii():
        return " ".join(text.lower().split())
    folded = unicodedata.normalize("NFKC", _UNSEEN.sub("", text)).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def readings(text: str) -> list[str]:
    """Plainly, the text and what it says once the escapes of JSON are read; it may be cut off, or no JSON at all."""
    found = [plainly(text)]
    for _ in range(_NESTED):
        if "\\" not in text:
            break
        text = _ESCAPES.sub(_unescaped, text)
        found.append(plainly(text))
    return found


def _unescaped(found: re.Match[str]) -> str:
    if found[0][1] == "x" and len(found[0]) == 4:  # Of Python; JSON has none.
        return chr(int(found[0][2:], 16))
    try:
        said: str = json.loads(f'"{found[0]}"')
    except ValueError:
        return found[0][1:]  # A backslash before any other character, as `\'` of Python.
    return said.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # A half of a pair is no character.
