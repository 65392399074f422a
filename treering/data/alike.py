"""When two rows say nearly the same: the same numbers, most of the same words, and the same answer.

Words are compared as sets (Jaccard index). Those that so many rows of a task have that they tell none apart, as those
of an instruction that all begin with, do not count.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property

from treering.data.example import Example, normalise

_UNSPACED = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
"""Scripts that put no blanks between words, or few: each character counts as a word."""

_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")

COMMON, ENOUGH = 0.3, 20
"""Share of a task's rows from which on a word tells none apart, once so many rows are known."""

RARE = 0.02
"""Share of a task's rows below which a count is not kept."""

LONG = 8
"""Words from which on an answer need not be the very same."""


@dataclass(frozen=True)
class Said:
    """What a row says, as it is compared with others.

    `asked` is a hash of all turns before the answer and `answered` one of the answer, both in their normal form, as
    signed 64-bit numbers; `system` is the system turn's normal form; `words` are those of the other turns before the
    answer; `label` is the answer's normal form.
    """

    asked: int
    answered: int
    system: str
    words: frozenset[str]
    label: str

    @classmethod
    def of(cls, example: Example) -> Said:
        """Of a row that ends with its answer, or of a plain text, which asks for itself and for no answer."""
        asking = example.messages if example.is_text else example.prompt
        turns = [(turn.role, normalise(turn.text)) for turn in asking]
        # An answer of nothing but punctuation has no normal form.
        label = "" if example.is_text else example.label or example.answer
        return cls._of(turns, words("\n".join(text for role, text in turns if role != "system")), label)

    @classmethod
    def within(cls, example: Example) -> list[Said]:
        """Of each answer before the last one that is learned too, as if the row ended with it."""
        before = example.messages[:-1]
        ends = [at for at, turn in enumerate(before) if turn.role == "assistant" and turn.is_learned]
        if not ends:
            return []
        turns = [(turn.role, normalise(turn.text)) for turn in before]
        each = [words(text) if role != "system" else frozenset[str]() for role, text in turns]
        return [cls._of(turns[:at], frozenset[str]().union(*each[:at]), turns[at][1] or before[at].text) for at in ends]

    @classmethod
    def _of(cls, turns: Sequence[tuple[str, str]], words: frozenset[str], label: str) -> Said:
        return cls(
            _hash("\x1f".join(f"{role}\x1e{text}" for role, text in turns)),
            _hash(label),
            "\n".join(text for role, text in turns if role == "system"),
            words,
            label,
        )

    @cached_property
    def answer(self) -> frozenset[str]:
        """The words of the answer."""
        return words(self.label)

    def like(self, other: Said, common: Common, threshold: float) -> bool:
        """Whether a model would learn nothing from this row that it did not from the other."""
        return (
            self.system == other.system
            and (self.answered == other.answered or self._answers_like(other, threshold))
            and _near(common.without(self.words), common.without(other.words), threshold)
            and _numbers(self.words) == _numbers(other.words)
        )

    def _answers_like(self, other: Said, threshold: float) -> bool:
        long = min(len(self.answer), len(other.answer)) >= LONG
        return long and _numbers(self.answer) == _numbers(other.answer) and _near(self.answer, other.answer, threshold)

    def contradicts(self, other: Said, threshold: float) -> bool:
        """Whether it answers the same with something else."""
        return (
            self.asked == other.asked and self.answered != other.answered and not self._answers_like(other, threshold)
        )


@dataclass
class Common:
    """How many of a task's `rows` have each word."""

    rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    _words: frozenset[str] = frozenset()

    def learn(self, rows: Iterable[Set[str]]) -> None:
        """Count the words of more rows."""
        for row in rows:
            self.rows += 1
            self.counts.update(row)
        if self.rows >= ENOUGH:
            self._words = self._above(COMMON)

    def beside(self, rows: Iterable[Set[str]]) -> Common:
        """The same with more rows, as they are compared; this one does not learn them."""
        found = Common(self.rows, self.counts.copy())
        found.learn(rows)
        return found

    def unlearn(self, rows: Iterable[Set[str]]) -> None:
        """Take rows out again, and with them words that fewer than `ENOUGH` others have: these could tell of them."""
        for row in rows:
            self.rows -= 1
            for word in row & self.counts.keys():
                self.counts[word] -= 1
                if self.counts[word] < ENOUGH:
                    del self.counts[word]

    def without(self, words: frozenset[str]) -> frozenset[str]:
        """Those that tell rows apart; all of them, where none does."""
        return words - self._words or words

    def kept(self) -> dict[str, int]:
        """The counts worth keeping for later."""
        return {word: self.counts[word] for word in sorted(self._above(RARE))}

    @classmethod
    def of(cls, rows: int, counts: dict[str, int]) -> Common:
        """From what `kept` gave."""
        found = cls(rows, Counter(counts))
        found.learn(())
        return found

    def _above(self, share: float) -> frozenset[str]:
        return frozenset(word for word, count in self.counts.items() if count >= share * self.rows)


def words(text: str) -> frozenset[str]:
    """The words of a text in its normal form."""
    return frozenset(_WORD.findall(text))


def _near(one: Set[str], other: Set[str], threshold: float) -> bool:
    shared = len(one & other)
    return shared > 0 and shared >= threshold * (len(one) + len(other) - shared)


def _numbers(words: Iterable[str]) -> set[str]:
    """Rows that differ in a number, a code or a date are about different things."""
    return {word for word in words if any(map(str.isdigit, word))}


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
