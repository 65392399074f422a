"""Duplicates, leakage and contradictions: what incoming rows are to the rows already stored, and to each other."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import TYPE_CHECKING

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
    ) -> None:
        self.writer, self.config, self.trained, self.judged = writer, config, trained, judged
        self.needed = trained | judged
        self.threshold = config.dedup.threshold
        names, upto = writer.runs()
        self.first = self.last = max(writer.last(), upto)  # No number comes again: the index may know it.
        """The highest numbers of rows that were there before, and that were given until now."""
        self.tied: set[str] = set()
        """Rows of which one that says the same is kept: as a pair they stay on the training side."""
        self.restored: set[int] = set()
        """The numbers of rows that were no longer true before this ingest."""
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
        found, new = list[Judged](), list[Judged]()
        for place, fit in enumerate(fits):
            row, id = fit.row, fit.row.example.id
            was = anew.get(place) if known.get(id) == "superseded" else None
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
                self.restored |= {self.last} if was else set()
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
        """Settle what those of a batch that nobody has met yet are to stored rows and to each other."""
        rows = [one.stored for one in new if one.stored]
        self._batch = {row.seq: one for row, one in zip(rows, new, strict=True)}
        self._gone = set()
        common = self._common_of(task).beside(row.said.words for row in rows)
        signed = index.signatures([common.without(row.said.words) for row in rows])
        asking, near = by_question(self.writer.asking(row.said.asked for row in rows)), self._near(signed)
        earlier = [set[int]() for _ in rows]
        for place, other in within(signed, self.threshold):
            earlier[place].add(other)
        asked: dict[int, list[int]] = {}
        for place, (one, row) in enumerate(zip(new, rows, strict=True)):
            same = asked.setdefault(row.said.asked, [])
            stored = {other.seq: other for other in [*asking.get(row.said.asked, ()), *near[place]]}
            fresh = {rows[at].seq: rows[at] for at in {*same, *earlier[place]} if new[at].is_kept}
            others = [other for seq, other in sorted((stored | fresh).items()) if seq not in self._gone]
            self._settle(one, row, others, common)
            same.append(place)
        kept = [place for place, one in enumerate(new) if one.is_kept]
        self._index.add(signed[kept], [rows[place].seq for place in kept])
        self._common_of(task).learn(rows[place].said.words for place in kept)

    def _settle(self, one: Judged, row: Stored, others: Sequence[Stored], common: Common) -> None:
        """What `row` is to others that came before it."""
        if row.example.id in self.needed and not one.was:
            return
        alike = [other for other in others if row.said.like(other.said, common, self.threshold)]
        if row.split == "train":
            self._train(one, row, alike)
        else:
            self._hold_out(one, row, alike)
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

    def _train(self, one: Judged, row: Stored, alike: Sequence[Stored]) -> None:
        held_out = next((other for other in alike if other.split == "held_out"), None)
        if held_out:
            one.refused = (LEAKAGE, f"{_where(held_out)} is held out and says nearly the same, so scores would lie")
        elif alike and self.config.dedup.near == "drop":
            one.like = alike[0].example.id
        elif alike:
            self.tied |= {row.example.id, *(other.example.id for other in alike)}

    def _hold_out(self, one: Judged, row: Stored, alike: Sequence[Stored]) -> None:
        trained = [other for other in alike if other.split == "train"]
        learned = next((other for other in trained if other.example.id in self.trained), None)
        if learned:
            one.refused = (
                TRAINED,
                f"a version has learned {_where(learned)} which says nearly the same; leave it out",
            )
            return
        for other in trained:
            self._remove(one, other, LEAKAGE, f"{_where(row)} is held out and says nearly the same")

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
        if other.example.id in self.needed and other.seq not in self.restored:
            return
        self._gone.add(other.seq)
        if other.seq in self._batch:
            self._batch[other.seq].refused = (rule, reason)
        else:
            one.removes.append((other, rule, reason))

    def _near(self, signed: index.Signatures) -> list[list[Stored]]:
        """For each signature the stored rows that may be near."""
        pairs = list(self._index.near(signed, self.threshold))
        stored = {row.seq: row for row in self.writer.numbered(seq for _, seq in pairs)}
        found: list[list[Stored]] = [[] for _ in signed]
        for place, seq in sorted(pairs):
            if seq in stored:
                found[place].append(stored[seq])
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
            sets = [self._common_of(row.task).without(row.said.words) for row in page]
            opened.add(index.signatures(sets), [row.seq for row in page])
        return opened


def _where(row: Stored) -> str:
    return f"{row.file}, line {row.line},"


def _differs(other: Stored, how: str = "") -> str:
    which = f"{_where(other)} which {how}," if how else _where(other)
    return f"{which} answers the same with something else; keep the one that is true, or set dedup.contradictions"
