"""Plain text: its paragraphs, several together as far as they are short, a piece at a time where one is long."""

from __future__ import annotations

import re
from collections.abc import Iterator

from treering.data.containers import Found, Source
from treering.data.containers.text import Text
from treering.data.names import KNOWN_KEYS
from treering.data.values import RowError, plain

MOST = 2000
"""Characters of a passage, about: few enough for `cutoff_len`, many enough to be about something."""


def read_passages(source: Source) -> Iterator[Found]:
    """Yield each passage as `text`, with the line on which it begins; none spans two paragraphs where one is long."""
    text = Text(source)
    if looks := _rows(text.first_lines()[0]):
        raise RowError("unknown-format", f"it looks like {looks}; name it so, or tell what it is (--format)")
    start, passage = 0, ""
    for line, paragraph in _paragraphs(text.lines()):
        if passage and len(passage) + len(paragraph) > MOST:
            yield Found(start, {"text": passage})
            passage = ""
        start = start if passage else line
        passage = f"{passage}\n\n{paragraph}" if passage else paragraph
        while len(passage) > MOST:
            end = _end(passage)
            yield Found(start, {"text": passage[:end].rstrip()})
            passage = passage[end:].lstrip()
    if passage:
        yield Found(start, {"text": passage})


def _rows(first: str) -> str | None:
    """What a file of rows is that begins with this line, which nobody wants to have learned as prose."""
    if first.startswith(("{", "[{", '["')) or first == "[":
        return "JSON (.json, .jsonl)"
    names = [plain(name).strip('"') for name in re.split(r"[,;\t]", first)]
    return "a table (.csv, .tsv)" if len(names) > 1 and KNOWN_KEYS.issuperset(names) else None


def _paragraphs(lines: Iterator[str]) -> Iterator[tuple[int, str]]:
    """What stands between blank lines; a line that is long by itself comes at once, so that memory holds no more."""
    start, gathered = 0, ""
    for number, line in enumerate(lines, 1):
        if line.strip():
            start = start if gathered else number
            gathered += line
        if gathered and (not line.strip() or len(gathered) > 10 * MOST):
            yield start, gathered.strip()
            gathered = ""
    if gathered:
        yield start, gathered.strip()


def _end(text: str) -> int:
    """Where to cut a text that is too long: after a sentence, else between words, else anywhere."""
    head = text[:MOST]
    places = (max(map(head.rfind, (". ", "! ", "? ", ".\n", "。"))) + 1, head.rfind(" "))
    return next((place for place in places if place > MOST // 2), MOST)
