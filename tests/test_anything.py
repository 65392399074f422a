"""Prompts about anything: none is a question that general ability is measured by, and they take the form of rows."""

from __future__ import annotations

import json

from treering import anything
from treering.bench.general import QUESTIONS
from treering.data.example import Example, Message, normalise


def test_none_of_them_is_asked_by_the_benchmark() -> None:
    asked = {normalise(json.loads(line)["question"]) for line in QUESTIONS.read_text().splitlines()}
    prompts = [normalise(prompt) for prompt in anything.prompts()]
    assert len(set(prompts)) == len(prompts) == 150 and not asked & set(prompts)


def row(system: str | None) -> Example:
    turns = [Message("user", "hi"), Message("assistant", "hello")]
    return Example((*([Message("system", system)] if system else []), *turns))


def test_they_are_read_in_the_commonest_new_forms() -> None:
    rows = [row(None), *(row(f"system {at}") for at in range(6)), *(row("system 5") for _ in range(3)), row("system 2")]
    found = anything.forms(rows, ())
    systems = [prompts[0][0].text if prompts[0][0].role == "system" else "" for prompts in found.values()]
    assert systems[:3] == ["", "system 5", "system 2"] and len(systems) == 1 + anything.MOST
    assert all([turn.text for turn in prompts[0]][-1] == anything.prompts()[0] for prompts in found.values())
    first = list(found)[1]
    assert set(found) - set(anything.forms(rows, ["", first])) == {"", first}
