"""Duplicates, leakage and contradictions: what incoming rows are to the rows already stored, and to each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from typing import TYPE_CHECKING

import numpy as np

from treering.data import index
from treering.data.alike import Common, Said
from treering.data.check import Fit
from treering.data.disputes import CONTRADICTION, Disputes, by_question
from treering.data.example import Example
from treering.data.fates import Judged, fate
from treering.data.index import Index, within
from treering.data.writer import Known, Split, Stored, Writer

if TYPE_CHECKING:
    from treering.config import Config

LEAKAGE, TRAINED = "leakage", "held-out-was-trained"
"""Rules of quarantine."""


class Judge:
    """Judges the rows of one ingest, batch by batch; `released`: as said just now, whatever file they are of.
    `takes_back`: rows that a hold set aside come in again, and are compared with what came since.

    `trained` are the ids that a version has learned, `judged` those that one was judged by: where a catalog was lost,
    such rows come in as new, and all of them are kept on their side, for the versions need them. What is kept has to be
    stored before the next batch comes.
    """

    def __init__(
        self,
        writer: Writer,
        config: Config,
        trained: Set[str],
        judged: Set[str] = frozenset(),
        released: bool = False,
        takes_back: bool = False,
    ) -> None:
        self.writer, self.config, self.trained, self.judged = writer, config, trained, judged
        self.takes_back = takes_back
        self.needed = trained | judged
        self.threshold = config.dedup.threshold
        names, upto = writer.runs()
        self.first = self.last = max(writer.last(), upto)  # No number comes again: the index may know it.
        """The highest numbers of rows that were there before, and that were given until now."""
        self.tied: set[str] = set()
        """Rows of which one that says the same is kept: as a pair they stay on the training side."""
        self.restored: set[int] = set()
        """The numbers of rows that were no longer true before this ingest."""
        self.returned: set[int] = set()
        """The numbers of rows that a hold had set aside until this ingest."""
        self.disputes = Disputes(writer, config.dedup, released)
        self._disputed: set[int] = set()
        """What rows of this ingest answered differently, where all of them went to quarantine."""
        self._common: dict[str, Common] = {}
        self._batch: dict[int, Judged] = {}
        """The rows that are being judged by their numbers."""
        self._gone: set[int] = set()
        """The numbers of those that went to quarantine meanwhile."""
        self._left: list[int] = []
        """The numbers of rows that were stored and are no longer."""
        self._index = self._opened(names, upto)

    def judge(self, fits: Sequence[Fit], task: str, split: Split, given: bool) -> list[Judged]:
        """What becomes of these rows of one task, in their order."""
        known: dict[str, Known] = self.writer.known([fit.row.example.id for fit in fits])
        anew = self.disputes.said_anew(fits, known)
        aside = [id for id, where in known.items() if where == "aside"] if self.takes_back and split == "train" else []
        back = {row.example.id: row for row in self.writer.aside(aside)}
        found, new = list[Judged](), list[Judged]()
        for place, fit in enumerate(fits):
            row, id = fit.row, fit.row.example.id
            where = known.get(id)
            was = anew.get(place) if where == "superseded" else back.get(id) if where == "aside" else None
            if was:
                del known[id]
            one = Judged(row, fate(id, split, known, self.trained), was=was)
            found.append(one)
            if one.fate == "new":
                known[id] = split
                self.last += 1
                held_out = id in self.judged or (was is not None and was.split == "held_out")
                side: Split = "held_out" if held_out else split
                own = given or (was is not None and was.given)
                one.stored = Stored(self.last, row.example, fit.said, task, side, own, row.file, row.line)
                self.restored |= {self.last} if where == "superseded" else set()
                self.returned |= {self.last} if where == "aside" else set()
                new.append(one)
            elif one.fate == "to_held_out":
                number = self.writer.number(id)
                one.stored = Stored(number, row.example, fit.said, task, "held_out", True, row.file, row.line)
                new.append(one)
            elif one.fate == "already_trained":
                why = "it is to be held out, but a version has already learned it; leave it out of the held-out file"
                one.refused = (TRAINED, why)
        self._compare(new, task)
        return found

    def let_go(self, row: Stored) -> None:
        """Know nothing more of a row that is stored no longer."""
        self._common_of(row.task).unlearn([row.said.words])
        self._left.append(row.seq)

    def move(self, row: Example, before: str, task: str) -> None:
        """Count the words of a row in its new task."""
        said = Said.of(row)
        self._common_of(before).unlearn([said.words])
        self._common_of(task).learn([said.words])

    def close(self) -> None:
        """Keep what was learned of the rows for the next ingest, in the same transaction."""
        self._index.drop(self._left)
        for task, common in self._common.items():
            self.writer.keep_common(task, common)
        self.writer.keep_runs(self._index.save(), self.last)

    # How rows compare

    def _compare(self, new: Sequence[Judged], task: str) -> None:
        """Settle what those of a batch that are new on their side are to stored rows and to each other."""
        rows = [one.stored for one in new if one.stored]
        self._batch = {row.seq: one for row, one in zip(rows, new, strict=True)}
        self._gone = set()
        common = self._common_of(task).beside(row.said.words for row in rows)
        said = _Sayings(rows, lambda _: common)
        fresh = said.alike(self.threshold)
        for one, row, stored, earlier in zip(new, rows, self._stored(rows, said), fresh, strict=True):
            others = stored | {rows[at].seq: rows[at] for at in earlier if new[at].is_kept}
            others.pop(row.seq, None)  # It was stored for training until now.
            self._settle(one, row, [other for seq, other in sorted(others.items()) if seq not in self._gone], common)
        added = [one.is_kept and one.fate == "new" for one in new]  # The others were counted when they came.
        kept = [at for at, place in enumerate(said.of) if added[place]]
        self._index.add(said.signed[kept], [rows[said.of[at]].seq for at in kept])
        self._common_of(task).learn(row.said.words for row, is_new in zip(rows, added, strict=True) if is_new)

    def _settle(self, one: Judged, row: Stored, others: Sequence[Stored], common: Common) -> None:
        """What `row` is to others that came before it."""
        if row.example.id in self.needed and not one.was:
            return
        if row.split == "train":
            self._train(one, row, others, common)
        else:
            self._hold_out(one, row, others, common)
        if not one.is_kept:
            return
        if row.said.asked in self._disputed:
            one.refused = (CONTRADICTION, "rows of this ingest answer the same with something else; keep the true one")
        against = [other for other in others if row.said.contradicts(other.said, self.threshold)]
        rival = self.disputes.rival(row, [other for other in against if other.seq <= self.first])
        if rival:
            one.refused = (CONTRADICTION, _differs(rival))
            return
        for other in against:
            self._contradict(one, row, other)

    def _train(self, one: Judged, row: Stored, others: Sequence[Stored], common: Common) -> None:
        told = self._told(row, others, common)
        held_out = next((other for other in told if other.split == "held_out"), None)
        alike = [other for other in told if row.said.like(other.said, common, self.threshold)]
        if held_out:
            one.refused = (LEAKAGE, f"{_where(held_out)} is held out and says nearly the same, so scores would lie")
        elif alike and self.config.dedup.near == "drop":
            one.like = alike[0].example.id
        elif kin := [*told, *self._telling(row, others, common)]:
            self.tied |= {row.example.id, *(other.example.id for other in kin)}

    def _hold_out(self, one: Judged, row: Stored, others: Sequence[Stored], common: Common) -> None:
        trained = [other for other in self._telling(row, others, common) if other.split == "train"]
        learned = next((other for other in trained if other.example.id in self.trained), None)
        if learned:
            one.refused = (
                TRAINED,
                f"a version has learned {_where(learned)} which says nearly the same; leave it out",
            )
            return
        for other in trained:
            self._remove(one, other, LEAKAGE, f"{_where(row)} is held out and says nearly the same")

    def _told(self, row: Stored, others: Sequence[Stored], common: Common) -> list[Stored]:
        """Those of the others whose answer a model learns from `row`, as its last or on the way to it."""
        learned = [row.said, *row.within] if others else []
        return [o for o in others if any(said.like(o.said, common, self.threshold) for said in learned)]

    def _telling(self, row: Stored, others: Sequence[Stored], common: Common) -> list[Stored]:
        """Those of the others from which a model learns the answer of `row`."""
        return [other for other in others if self._told(other, [row], common)]

    def _contradict(self, one: Judged, row: Stored, other: Stored) -> None:
        """Do as the task's policy says with `row`, which answers what the `other` answers with something else."""
        policy, together = self.config.dedup.policy(row.task), other.seq > self.first
        if policy == "auto":
            policy = "quarantine" if together else "supersede"
        if policy == "supersede" and not together:
            one.replaces.append(other)
        elif policy == "supersede":
            self._remove(one, other, CONTRADICTION, _differs(row, "came later"))
        elif policy == "quarantine":
            one.refused = (CONTRADICTION, _differs(other))
            if together:
                self._disputed.add(row.said.asked)
                self._remove(one, other, CONTRADICTION, _differs(row))

    def _remove(self, one: Judged, other: Stored, rule: str, reason: str) -> None:
        """Have `other` go to quarantine because of `one`: from the same batch, or from among stored rows."""
        if other.example.id in self.needed and other.seq not in self.restored | self.returned:
            return
        self._gone.add(other.seq)
        if other.seq in self._batch:
            self._batch[other.seq].refused = (rule, reason)
        else:
            one.removes.append((other, rule, reason))

    def _stored(self, rows: Sequence[Stored], said: _Sayings) -> list[dict[int, Stored]]:
        """For each of the rows the stored ones, by their numbers, that it may be near, as a whole or on the way."""
        pairs = list(self._index.near(said.signed, self.threshold, said.of))
        near = {row.seq: row for row in self.writer.numbered(seq for _, seq in pairs)}
        ending = by_question(self.writer.asking(asked for every in said.asked for asked in every))
        passing: dict[int, list[Stored]] = {}
        for other in self.writer.asking_within(row.said.asked for row in rows):
            for one in other.within:
                passing.setdefault(one.asked, []).append(other)
        found = list[dict[int, Stored]]()
        for asked in said.asked:
            same = [*passing.get(asked[0], ()), *(other for one in asked for other in ending.get(one, ()))]
            found.append({other.seq: other for other in same})
        for place, seq in pairs:
            if seq in near:
                found[place][seq] = near[seq]
        return found

    def _common_of(self, task: str) -> Common:
        if task not in self._common:
            self._common[task] = self.writer.common(task)
        return self._common[task]

    def _opened(self, names: Sequence[str], upto: int) -> Index:
        """The index of these runs, with all rows after `upto`; made anew where it is lost or damaged."""
        index.clear(self.writer.index, names)
        try:
            opened = Index(self.writer.index, names)
        except (OSError, ValueError):
            index.clear(self.writer.index, ())
            opened, upto = Index(self.writer.index, ()), 0
        for page in self.writer.after(upto):
            said = _Sayings(page, self._common_of)
            opened.add(said.signed, [page[place].seq for place in said.of])
        return opened


class _Sayings:
    """What `rows` say, as a whole and then on the way (`Said.within`).

    `asked` has what is asked each time, row by row; `signed` the signatures of all, and `of` the place of the row that
    each is of.
    """

    def __init__(self, rows: Sequence[Stored], common_of: Callable[[str], Common]) -> None:
        whole = index.signatures([common_of(row.task).without(row.said.words) for row in rows])
        parts: list[index.Signatures] = []
        self.asked: list[list[int]] = []
        self.of: list[int] = []
        for place, row in enumerate(rows):
            within = row.within  # Row by row: those of a long conversation have many words in all.
            parts.append(whole[place : place + 1])
            if within:
                parts.append(index.signatures([common_of(row.task).without(said.words) for said in within]))
            self.asked.append([row.said.asked, *(said.asked for said in within)])
            self.of += [place] * (1 + len(within))
        self.signed = np.concatenate(parts) if parts else whole

    def alike(self, threshold: float) -> Iterator[set[int]]:
        """For each row the places of those before it that it may be near, as a whole or on the way."""
        near = [set[int]() for _ in self.asked]
        for place, other in within(self.signed, threshold, self.of):
            near[place].add(other)
        ending: dict[int, list[int]] = {}
        passing: dict[int, list[int]] = {}
        for place, (whole, *way) in enumerate(self.asked):
            found = near[place].union(passing.get(whole, ()), *(ending.get(asked, ()) for asked in (whole, *way)))
            ending.setdefault(whole, []).append(place)
            for asked in way:
                passing.setdefault(asked, []).append(place)
            yield found


def _where(row: Stored) -> str:
    return f"{row.file}, line {row.line},"


def _differs(other: Stored, how: str = "") -> str:
    which = f"{_where(other)} which {how}," if how else _where(other)
    return f"{which} answers the same with something else; keep the one that is true, or set dedup.contradictions"
