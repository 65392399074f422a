"""What the parent writes for an update to replay: rows of what it learned earlier, and its own answers to old prompts.

Rows, beside stored ones or in place of them (LAMOL, Sun et al. 2020, arXiv:1909.03329; self-synthesised rehearsal,
Huang et al. 2024, arXiv:2403.01244): a user's turn is drawn after what the chat template puts before it (Magpie, Xu et
al. 2024, arXiv:2406.08464) and answered greedily. Own answers: as in self-distillation fine-tuning (Yang et al. 2024,
arXiv:2402.13669), here for remembered prompts. Both are asked of the parent before the first step, lesson by lesson,
and live as long as the update: they are in no catalog, no memory and no ledger.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, cast

from treering.data.check import Checks
from treering.data.example import Example, Message
from treering.data.texts import Texts
from treering.errors import ModelError
from treering.files import write_json
from treering.greedy import Answer, Known, text, watched, write
from treering.guides import guides
from treering.model import encode, encode_prompt
from treering.passes import in_parts, losses
from treering.progress import bar, silent
from treering.sampled import draw
from treering.tree import Tree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from treering.lesson import Lesson

FILE = "written.json"

PREFIX = "written:"
"""What ids of written rows begin with; no row of a task has it."""

LONGEST = 256
"""Tokens that a written turn may have."""

TURNS_A_ROW = 4
"""Turns that are drawn at most for each row that is wanted."""

BLOCK = 64
"""Turns drawn, or prompts answered, from one time that all is kept to the next."""

_MARK = "what the user says"

_REMEMBERED = "answering remembered prompts"

_NOTHING = "nothing was learned before that could be lost"

_LIKE = {
    "held out": "like a held-out row",
    "new": "like a new row",
    "remembered": "like a remembered row",
    "drawn": "like one drawn before",
}
"""What is said of turns that are like a text of each kind."""


@dataclass(frozen=True)
class Written:
    """What one lesson replays of the parent's hand.

    `rows` by their ids, and remembered rows whose own answer is another than the stored one as `answers`, by theirs.
    `choices` say what came of the settings, and why.
    """

    rows: Mapping[str, Example] = field(default_factory=dict)
    answers: Mapping[str, Example] = field(default_factory=dict)
    choices: Mapping[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class _Kept:
    """How far it came: the turns `drawn`, those that were answered (None: not to be replayed), and own answers by id.

    `dropped` counts turns by what was wrong with them.
    """

    drawn: int = 0
    turns: list[tuple[str, str | None]] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    own: dict[str, str | None] = field(default_factory=dict)

    @property
    def rows(self) -> list[tuple[str, str]]:
        """What was said and answered, of rows that are good."""
        return [(said, answer) for said, answer in self.turns if answer is not None]

    def drop(self, reason: str) -> None:
        """Count a turn that is not taken."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1


class Writer:
    """The parent, as `lesson` has made it ready to learn, asked to write for it.

    `examples` are the texts of rows by their ids, `held_out` the ids of those that judge the update.
    """

    def __init__(
        self,
        lesson: Lesson,
        tokenizer: PreTrainedTokenizerBase,
        examples: Mapping[str, Example],
        held_out: Collection[str],
    ) -> None:
        self.lesson, self.tokenizer = lesson, tokenizer
        self.config, self.pupil = lesson.config, lesson.pupil
        self._examples, self._held_out = examples, held_out
        self._path = lesson.folder / FILE
        self._system = self.config.default_system
        self._checks = Checks(self.config, tokenizer, self.pupil.root)

    @property
    def wanted(self) -> int:
        """How many rows it is to write."""
        asked = self.config.memory.generate
        if not self.lesson.knows:
            return 0
        return round(float(asked[:-1]) / 100 * len(self.lesson.new)) if isinstance(asked, str) else asked

    @property
    def asked(self) -> list[str]:
        """The remembered rows that it is to answer."""
        own = self.config.memory.answers == "own" and self.lesson.knows
        return list(self.lesson.memory.rows) if own else []

    def write(self) -> Written:
        """Write what the settings ask for, from where an interrupted update came to.

        Raises:
            UpdateInterruptedError: the update was asked to stop; what was written until then is kept.
            ModelError: the chat template does not say where the user's turn ends.
        """
        kept = self._kept()
        if self.wanted:
            self._write_rows(kept)
        if self.asked:
            self._answer(kept)
        rows = {f"{PREFIX}{row.id}": row for row in (self._row(*pair) for pair in kept.rows[: self.wanted])}
        answers = {id: self._with(id, own) for id, own in kept.own.items() if own is not None}
        changed = {id: row for id, row in answers.items() if row.answer != self._examples[id].answer}
        return Written(rows, changed, self._choices(kept, len(rows), len(changed)))

    def stand_in(self) -> Written:
        """As many rows as are wanted, made of new ones: to plan with before any is written."""
        new = self.lesson.new
        return Written({f"{PREFIX}{at}": self._examples[new[at % len(new)]] for at in range(self.wanted)})

    def seconds(self) -> float:
        """What `write` takes, measured on a block of rows and one of answers that are not kept."""
        found, kept = 0.0, _Kept()
        if self.wanted:
            started = time.perf_counter()
            self._block(kept, self._texts(), self._opening())
            good = len(kept.rows) / kept.drawn
            turns = min(TURNS_A_ROW, 1 / good if good else TURNS_A_ROW) * self.wanted
            found += (time.perf_counter() - started) * turns / kept.drawn
        if self.asked:
            started = time.perf_counter()
            first = self.asked[:BLOCK]
            self._answered([self._examples[id].prompt for id in first], _REMEMBERED, 0)
            found += (time.perf_counter() - started) * len(self.asked) / len(first)
        return found

    def _write_rows(self, kept: _Kept) -> None:
        texts, opening = self._texts(), self._opening()
        for said, _ in kept.turns:
            texts.add(said, "drawn")
        with bar(f"writing rows{self.lesson.of}", self.wanted, self.pupil.quiet) as advance:
            advance(len(kept.rows))
            while (before := len(kept.rows)) < self.wanted and kept.drawn < TURNS_A_ROW * self.wanted:
                self._block(kept, texts, opening)
                write_json(self._path, asdict(kept))
                advance(min(len(kept.rows), self.wanted) - before, f"{kept.drawn} drawn")

    def _block(self, kept: _Kept, texts: Texts, opening: tuple[list[int], int]) -> None:
        """Draw, sift and answer some turns more."""
        whole = min(BLOCK, self.wanted)
        size = min(whole, TURNS_A_ROW * self.wanted - kept.drawn)
        number, (beginning, end) = kept.drawn // whole, opening
        seeds = [f"{self.config.seed}:written:{self.lesson.of}:{at}" for at in range(kept.drawn, kept.drawn + size)]
        asked = self.config.memory

        def one(part: Sequence[int]) -> list[list[int] | None]:
            tree = Tree(self.pupil.model, self.config, self.pupil.pad_id)
            chances = asked.generate_temperature, asked.generate_top_p
            return draw(tree, beginning, [seeds[at] for at in part], end, LONGEST, *chances, self.pupil.stop)

        taken = self._sifted(self._in_parts([beginning] * size, one, "drawing turns", number), kept, texts)
        answers = self._answered([self._prompt(said) for said in taken], "answering drawn turns", number)
        kept.turns += zip(taken, self._sure(taken, answers, kept, number), strict=True)
        kept.drawn += size

    def _sifted(self, turns: Iterable[list[int] | None], kept: _Kept, texts: Texts) -> list[str]:
        """What those of the drawn turns say that are fit to be answered; these are among `texts` then."""
        taken = []
        for turn in turns:
            said = str(self.tokenizer.decode(turn or [])).strip()
            wrong = self._wrong(turn, said, texts)
            if wrong is None:
                texts.add(said, "drawn")
                taken.append(said)
            else:
                kept.drop(wrong)
        return taken

    def _wrong(self, turn: list[int] | None, said: str, texts: Texts) -> str | None:
        """What is wrong with a drawn turn, as a reason to count."""
        if turn is None:
            return f"without an end within {LONGEST} tokens"
        if not said:
            return "empty"
        if any(self._is_mark(id) for id in turn) or "\N{REPLACEMENT CHARACTER}" in said:
            return "with what is no text"
        like = texts.like(said)
        return _LIKE[like] if like is not None else None

    def _sure(self, taken: Sequence[str], answers: Sequence[str | None], kept: _Kept, number: int) -> list[str | None]:
        """The answers that are good and confident enough, None for the others."""
        rows = [answer and self._fit(self._row(said, answer)) for said, answer in zip(taken, answers, strict=True)]
        read = [encode(self.tokenizer, row) for row in rows if row]
        reading = self.lesson.readings.of("reading written rows", number)
        measured = iter(losses(self.pupil.model, read, self.config, self.pupil.pad_id, self.pupil.stop, reading))
        least, found = self.config.memory.generate_confidence, list[str | None]()
        for row in rows:
            sure = -next(measured) >= least if row else False
            if not row:
                kept.drop("without an answer that ended by itself and broke no rule of rows")
            elif not sure:
                kept.drop(f"with an answer less sure than {least:g} nats a token")
            found.append(row.answer if row and sure else None)
        return found

    def _fit(self, row: Example) -> Example | None:
        """`row`, if it would be taken from a file."""
        return None if self._checks(row).refused else row

    def _answer(self, kept: _Kept) -> None:
        left = [id for id in self.asked if id not in kept.own]
        with bar(f"answering remembered prompts{self.lesson.of}", len(left), self.pupil.quiet) as advance:
            while left:
                now, left = left[:BLOCK], left[BLOCK:]
                number = len(kept.own) // BLOCK
                answers = self._answered([self._examples[id].prompt for id in now], _REMEMBERED, number)
                rows = [answer and self._fit(self._with(id, answer)) for id, answer in zip(now, answers, strict=True)]
                kept.own |= {id: row.answer if row else None for id, row in zip(now, rows, strict=True)}
                write_json(self._path, asdict(kept))
                advance(len(now))

    def _answered(self, prompts: Sequence[Sequence[Message]], what: str, number: int) -> list[str | None]:
        """Greedy answers; None: it did not end within `eval.max_new_tokens`, or says nothing."""
        end, pad_id, limit = cast(int, self.tokenizer.eos_token_id), self.pupil.pad_id, self.config.eval.max_new_tokens
        rows = [encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        model, reading = self.pupil.model, self.lesson.readings.of(f"{what}: prompts", number)
        recalled = [
            guide.recalled for guide in guides(model, self.tokenizer, prompts, self.config, self.pupil.stop, reading)
        ]

        def one(part: Sequence[int]) -> list[str | None]:
            tree = Tree(model, self.config, pad_id, watched=watched(recalled[at] for at in part))
            tree.begin([rows[at] for at in part], [[len(rows[at]) - 1] for at in part])
            answers = [Answer(rows[at], tree.path(rows[at]), limit, recalled[at]) for at in part]
            write(tree, model, answers, Known(()), self.config, end, pad_id, self.pupil.stop)
            return [text(self.tokenizer, answer) or None if len(answer.written) < limit else None for answer in answers]

        return self._in_parts(rows, one, what, number)

    def _in_parts(self, rows: Sequence[Sequence[int]], one: Any, what: str, number: int) -> list[Any]:
        self.pupil.model.eval()
        reading = self.lesson.readings.of(what, number)
        return in_parts(self.pupil.model, rows, one, self.config, silent, self.pupil.stop, reading)

    def _opening(self) -> tuple[list[int], int]:
        """The token ids before what the user says first, and the one that ends it."""
        turns = [turn.as_dict() for turn in self._prompt(_MARK)]
        before, said, after = str(self.tokenizer.apply_chat_template(turns, tokenize=False)).rpartition(_MARK)
        behind = cast("list[int]", self.tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"])
        if not said or not behind or not self._is_mark(behind[0]):
            raise ModelError(
                f"memory.generate is {self.config.memory.generate}, but the model's chat template has no mark at the "
                "end of what a user says, so a turn that is drawn has no end: set memory.generate: 0"
            )
        return cast("list[int]", self.tokenizer(before, add_special_tokens=False)["input_ids"]), behind[0]

    def _is_mark(self, token: int) -> bool:
        added = cast(Any, self.tokenizer).added_tokens_decoder.get(token)
        return token in self.tokenizer.all_special_ids or bool(added and added.special)

    def _texts(self) -> Texts:
        """What users say in the rows that no written one may be like."""
        kinds = {"held out": self._held_out, "new": self.lesson.ids, "remembered": self.lesson.memory.rows}
        return Texts((said, kind) for kind, ids in kinds.items() for said in self._said(ids))

    def _said(self, ids: Iterable[str]) -> Iterable[str]:
        return (turn.content for id in ids for turn in self._examples[id].prompt if turn.role == "user")

    def _prompt(self, said: str) -> tuple[Message, ...]:
        head = (Message("system", self._system),) if self._system else ()
        return (*head, Message("user", said))

    def _row(self, said: str, answer: str) -> Example:
        return Example((*self._prompt(said), Message("assistant", answer)))

    def _with(self, id: str, answer: str) -> Example:
        return Example((*self._examples[id].prompt, Message("assistant", answer)))

    def _kept(self) -> _Kept:
        if not self._path.exists():
            return _Kept()
        found = json.loads(self._path.read_text(encoding="utf-8"))
        return _Kept(**{**found, "turns": [(said, answer) for said, answer in found["turns"]]})

    def _choices(self, kept: _Kept, rows: int, changed: int) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        if self.config.memory.generate not in (0, "0%"):
            found["memory.generate"] = {"value": rows, "reason": self._why(kept)}
        if self.config.memory.answers == "own":
            unanswered = sum(answer is None for answer in kept.own.values())
            reason = (
                f"of {len(kept.own)} remembered rows {changed} have another answer of the parent's, "
                f"{len(kept.own) - changed - unanswered} the same as stored; {unanswered} keep the stored one: the "
                "parent's did not end by itself, was empty or broke a rule of rows"
            )
            found["memory.answers"] = {"value": "own", "reason": reason if self.lesson.knows else _NOTHING}
        return found

    def _why(self, kept: _Kept) -> str:
        parent = self.pupil.parent
        if not self.lesson.knows or parent is None:
            return _NOTHING
        asked = self.config.memory
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(kept.dropped.items()))
        spare = len(kept.rows) - self.wanted
        return (
            f"{self.wanted} wanted; {parent.name} drew {kept.drawn} turns at temperature {asked.generate_temperature:g}"
            f" and top_p {asked.generate_top_p:g}{f', of which {counts}' if counts else ''}"
            + (f"; {spare} were more than wanted" if spare > 0 else "")
            + ("" if parent.manifest["config"].get("train_on_prompt") else f"; {parent.name} did not learn prompts")
        )


def digest(ids: Iterable[str]) -> str:
    """SHA-256 of the ids of written rows, which are hashes of their content."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()
