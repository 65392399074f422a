"""What people ask a model about anything: prompts of a kind that no task taught, by which a router tells them.

Outlier exposure (Hendrycks et al. 2019, arXiv:1812.04606): examples of what is elsewhere tell far more than how far it
is from all that is known. They come with the system turns of the rows learned as well as with none, so that it is not
the missing system turn that tells them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable
from functools import cache
from pathlib import Path

from treering.data.example import Example, Message

FILE = Path(__file__).with_name("anything.txt")

MOST = 4
"""System turns of one update's rows under which they are read, the commonest."""


@cache
def prompts(file: Path = FILE) -> tuple[str, ...]:
    """The prompts in `file`, a line each."""
    return tuple(line for line in file.read_text(encoding="utf-8").splitlines() if line.strip())


def forms(examples: Iterable[Example], known: Collection[str]) -> dict[str, list[list[Message]]]:
    """The prompts in the forms that `examples` have, and in the bare one; of a hash each, those `known` left out."""
    turns = Counter(example.prompt[:1] for example in examples if example.prompt[0].role == "system")
    found: dict[str, tuple[Message, ...]] = {"": ()}
    for turn, _ in turns.most_common(MOST):
        found[hashlib.sha256(turn[0].text.encode()).hexdigest()[:16]] = turn
    return {
        form: [[*turn, Message("user", prompt)] for prompt in prompts()]
        for form, turn in found.items()
        if form not in known
    }
