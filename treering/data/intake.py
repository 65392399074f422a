"""From a file to the catalog: read, check, deduplicate, split, store, all in one transaction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treering import registry
from treering.data import ahead
from treering.data.alike import Said
from treering.data.check import Checks, Fit, fit, opened, refused
from treering.data.dedup import Judge
from treering.data.example import Example
from treering.data.fates import Judged
from treering.data.fetch import STDIN
from treering.data.labels import Labels
from treering.data.read import Bad, Row, RowError, convert, named_in_utf8
from treering.data.rules import ALL, BALANCE, SLIP
from treering.data.shapes import PLAIN, is_plain_text
from treering.data.sources import How, Place, data_files
from treering.data.tombstones import Tombstones
from treering.data.values import RAW_LENGTH
from treering.data.writer import Split, Stored, Writer, choose_held_out
from treering.errors import UsageError
from treering.files import one_line, printable, sha256
from treering.progress import Advance, bar, silent

if TYPE_CHECKING:
    from treering.config import Config
    from treering.workspace import Workspace

TOLD = 100
"""Quarantined rows that are told one by one; the catalog has all."""

BAD_NAME = "its name, or that of a folder it lies in, is not UTF-8; rename it"

SAMPLE = 10_000
"""Rows of a task whose labels are looked at together, the newest."""

DELETED, DELETED_REASON = "deleted", "it was deleted on request (`treering forget`), so it never comes in again"
"""The rule of such a row, and why; its text is not kept."""

_PYTHON = "<python>"
"""Stands for the file of rows that came from Python."""

Rows = Iterable[Mapping[str, object]]
Source = str | Path | Sequence[str | Path] | Rows | None


@dataclass(frozen=True)
class Ingested:
    """What became of the rows: `rows` = `accepted` + `duplicates` + `quarantined`. `tasks`: accepted rows by task.

    `reasons`: quarantined rows by rule. `refused`: the first 100 of them, each with `file`, `line`, `rule`, `reason`.
    `near`: those of the duplicates that another row is only nearly the same as; `superseded`: stored rows that newer
    ones have made untrue; `withdrawn`: stored rows that went to quarantine, for a held-out one says nearly the same;
    `restored`: accepted rows that were superseded until now, and are said anew. `mended` and `warned`: accepted rows by
    the rules that changed them, or only warn. `notices`: what is to be known of files that could be read. `replaced`:
    the superseded ones by their task and that of the rows that came (`by`): how many `rows`, and of them `held_out`.
    """

    rows: int = 0
    accepted: int = 0
    duplicates: int = 0
    quarantined: int = 0
    held_out: int = 0
    tasks: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    refused: list[dict[str, Any]] = field(default_factory=list)
    near: int = 0
    superseded: int = 0
    withdrawn: int = 0
    restored: int = 0
    mended: dict[str, int] = field(default_factory=dict)
    warned: dict[str, int] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    replaced: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Batch:
    """The rows of one file (or of one call from Python), all of one task and one side. `digest` is the file's."""

    name: str
    task: str
    split: Split
    parts: Callable[[Checks], Generator[list[Fit | Bad]]]
    digest: str | None


def ingest(
    ws: Workspace,
    source: Source = None,
    *,
    task: str | None = None,
    held_out: Source = None,
    only: Collection[Path] | None = None,
    config: Config | None = None,
    how: How | None = None,
    quiet: bool = True,
) -> Ingested:
    """Take in `source` (files, folders or rows; the inbox by default); `held_out` is the user's own held-out side.

    Files of the inbox whose content was ingested before are passed over, with `only` all others too. `how`: what was
    told of the files; else they are recognised. Raises `UsageError` before anything is stored when a path does not
    exist or a task cannot be named.
    """
    config = config or ws.config()
    notes: list[str] = []
    batches = _batches(ws, source, task, "train", config, notes, how or How(), only=only) + _batches(
        ws, held_out, task, "held_out", config, notes, how or How(), named=False
    )
    if not batches:
        return Ingested(notices=notes)
    checks = opened(config, ws.root)
    with ws.catalog.writing() as writer, bar("ingesting files", len(batches), quiet) as advance:
        intake = _Intake(ws, writer, config, checks, named=source is not None)
        for batch in batches:
            if batch.digest is not None and writer.know_again(batch.name, batch.digest):
                intake.judge.disputes.unchanged(batch.name)
        for name in {batch.name for batch in batches} - {_PYTHON, STDIN}:
            intake.judge.disputes.read_again(name)
        # Held-out files first, so that a row in both is held out.
        for batch in sorted(batches, key=lambda b: b.split != "held_out"):
            intake.take(batch, advance)
            advance()
        found = intake.finish()
    return replace(found, notices=notes + found.notices)


def retake(ws: Workspace, rows: Sequence[tuple[int, str, Split, Row]], *, checked: bool) -> Ingested:
    """Take rows out of quarantine and in: each with its number there, its task and side, and what it is now.

    All are newer than what is stored. Raises `UsageError`, and changes nothing, where one is refused.
    """
    config = ws.config()
    policies = {task: config.dedup.policy(task) for _, task, _, _ in rows}
    kept = {task: "keep-both" if policy == "keep-both" else "supersede" for task, policy in policies.items()}
    newest = config.dedup.model_copy(update={"contradictions": kept})
    off = {name: "off" for name, rule in ALL.items() if "off" in rule.levels}
    config = config.model_copy(update={"dedup": newest} | ({} if checked else {"checks": off}))
    checks = opened(config, ws.root)
    with ws.catalog.writing() as writer:
        intake = _Intake(ws, writer, config, checks, named=True, released=True)
        for number, *_ in rows:
            writer.drop_refused(number)
        for (task, split), same in groupby(rows, key=lambda row: row[1:3]):
            own = [row for *_, row in same]
            intake.take(_Batch(own[0].file, task, split, partial(fit, own, task=task), None))
        found = intake.finish()
        if found.refused:
            first = found.refused[0]
            where = f"the row of {first['file']}, line {first['line']}"
            raise UsageError(f"{where} is refused, {first['rule']}: {first['reason']}; nothing was taken")
    return found


class _Intake:
    """One ingest: takes its batches in, and counts what becomes of their rows.

    `named`: the user named the files, which takes back rows that a hold set aside; `released`: the rows themselves, so
    that they are said anew.
    """

    def __init__(
        self, ws: Workspace, writer: Writer, config: Config, checks: Checks, named: bool, released: bool = False
    ) -> None:
        versions = registry.readable(ws)
        trained = {id for version in versions for id in version.rows}
        judged = {id for version in versions for id in registry.measured(version)}
        self.writer, self.checks, self.stones = writer, checks, Tombstones(ws.root)
        self.mended_anyway = checks.mending(config, ws.root, self.stones.personal) if self.stones else None
        self.judge, self.share = Judge(writer, config, trained, judged, released, named), config.val_size
        self.counts: Counter[str] = Counter()
        self.tasks: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.mended: Counter[str] = Counter()
        self.warned: Counter[str] = Counter()
        self.told: list[dict[str, Any]] = []
        self.notices: list[str] = []
        self.replaced: dict[tuple[str, str], Counter[str]] = {}
        """The sides of rows that are no longer true, by their task and that of the rows that came."""

    def take(self, batch: _Batch, advance: Advance = silent) -> None:
        """Take in the rows of one file; `advance` is told how far that is."""
        with closing(batch.parts(self.checks)) as parts:
            for found in parts:
                self._take_part(batch, found)
                advance(0, f"{self.counts['rows']:,} rows")
        if batch.digest is not None:
            self.writer.remember_file(batch.name, batch.digest)

    def _take_part(self, batch: _Batch, found: Sequence[Fit | Bad]) -> None:
        part = [self._deleted(one) for one in found] if self.stones else found
        part = self._past_the_rules(part)
        self.counts["rows"] += len(part)
        good, bad = [one for one in part if isinstance(one, Fit)], [one for one in part if isinstance(one, Bad)]
        judged = self.judge.judge(good, batch.task, batch.split, batch.split == "held_out")
        for one in judged:
            if one.refused and one.stored and one.stored.seq in self.judge.returned:
                self._tell(refused(one.row, *one.refused))  # It stays in quarantine, where it is since the hold.
            elif one.refused:
                bad.append(refused(one.row, *one.refused))
        self._refuse(batch, bad)
        self._make_room(judged, batch.task)
        self._store([one.stored for one in judged if one.stored and one.is_kept], batch.task)
        for row, one in zip(good, judged, strict=True):
            if one.is_kept:
                self.mended.update(row.mended)
                self.warned.update(row.warned)
            elif one.fate != "new" and not one.refused:
                self._meet_again(one, batch.task)
        for one in judged:
            if one.like and one.was:  # A row that was set aside needs no decision any more.
                self.writer.settle(one.was)
        near = sum(one.like is not None for one in judged)
        self.counts["duplicates"] += near
        self.counts["near"] += near
        self.writer.leave_out(batch.task, [(one.row, one.like) for one in judged if one.like and not one.was])

    def finish(self) -> Ingested:
        """Settle the sides of all rows that were taken in; returns what became of them."""
        for task in [task for task, count in self.tasks.items() if count]:
            self._look_at_labels(task)
        self.judge.close()
        self._hold_out()
        return Ingested(
            self.counts["rows"],
            self.tasks.total(),
            self.counts["duplicates"],
            self.reasons.total(),
            self.counts["held_out"],
            {task: count for task, count in self.tasks.items() if count},
            dict(self.reasons),
            self.told,
            self.counts["near"],
            self.counts["superseded"],
            self.counts["withdrawn"],
            self.counts["restored"],
            dict(self.mended),
            dict(self.warned),
            self.notices,
            [
                {"task": task, "by": by, "rows": sides.total(), "held_out": sides["held_out"]}
                for (task, by), sides in self.replaced.items()
            ],
        )

    def _look_at_labels(self, task: str) -> None:
        """What only the rows of a task together show, once the new ones are among them."""
        rows, levels = self.writer.newest(task, SAMPLE), self.checks.levels
        labels = Labels.of([example for _, example in rows])
        slips = labels.slips() if levels[SLIP] != "off" else {}
        new = [seq for seq, row in rows if row.answer in slips and seq > self.judge.first]
        free = [row for row in self.writer.numbered(new) if row.example.id not in self.judge.needed]
        for row in free:
            said, rejects = row.example.answer, levels[SLIP] == "reject"
            # What is kept of a row quotes no other: that one may be deleted.
            other = "a frequent one of its task" if rejects else repr(slips[said])
            reason = f"the rare label {said!r} looks like {other}; correct it if it is a slip"
            if rejects:
                self._take_out(row, SLIP, f"{reason}, or set the level of {SLIP} to warn")
            else:
                self.warned[SLIP] += 1
                self._note(task, f"{row.file}, line {row.line}: {reason}")
        ratio = labels.imbalance()
        if ratio and levels[BALANCE] == "warn":
            self._note(task, f"its most frequent label has {ratio:.0f} times as many rows as its rarest")

    def _note(self, task: str, text: str) -> None:
        if len(self.notices) < TOLD:
            self.notices.append(f"{task}: {text}")

    def _hold_out(self) -> None:
        """Hold out a share of the new rows of each task that has no held-out rows of the user's own.

        What a version has learned keeps its side: a catalog that was lost and made again cannot know it.
        """
        for task, ids in self.writer.trained_since(self.judge.first).items():
            if self.writer.has_given_held_out(task):
                continue
            free = [id for id in ids if id not in self.judge.trained and id not in self.judge.tied]
            stored, held_out = self.writer.sizes(task)
            chosen = sorted(choose_held_out(free, self.share, stored - len(free), held_out))
            self.writer.to_held_out(chosen)
            self.counts["held_out"] += len(chosen)

    def _deleted(self, one: Fit | Bad) -> Fit | Bad:
        """The row, or where it was deleted on request what may be said of it."""
        row = one.row if isinstance(one, Fit) else one
        what = one.row.example if isinstance(one, Fit) else one.example or one.raw
        known = self.stones.know(what)
        if not known and isinstance(what, Example) and self.mended_anyway:
            # It may come in another form than the one that was deleted, for the levels of rules were changed.
            known = self.stones.know(self.mended_anyway(what).row)
        if not known:
            return one
        return Bad(row.file, row.line, DELETED, DELETED_REASON, "")

    def _past_the_rules(self, part: Sequence[Fit | Bad]) -> Sequence[Fit | Bad]:
        """Rows that a rule refuses, but that are stored, as they were released, are judged as any other."""
        known = self.writer.known([one.example.id for one in part if isinstance(one, Bad) and one.example])

        def past(one: Fit | Bad) -> Fit | Bad:
            if isinstance(one, Fit) or one.example is None or known.get(one.example.id, "like") == "like":
                return one
            return Fit(Row(one.file, one.line, one.example), Said.of(one.example))

        return [past(one) for one in part] if known else part

    def _refuse(self, batch: _Batch, bad: Sequence[Bad]) -> None:
        for row in bad:
            self._tell(row)
        self.writer.refuse(batch.task, bad, batch.split)

    def _tell(self, row: Bad) -> None:
        self.reasons[row.rule] += 1
        if len(self.told) < TOLD:
            self.told.append({"file": row.file, "line": row.line, "rule": row.rule, "reason": row.reason})

    def _make_room(self, judged: Sequence[Judged], task: str) -> None:
        """Take away stored rows that new ones make untrue, or that may not stand beside them."""
        for one in judged:
            for removed in one.removes:
                self._take_out(*removed)
        replaced = {row.example.id: row for one in judged if one.is_kept for row in one.replaces}
        self.counts["superseded"] += len(replaced)
        self.writer.supersede(list(replaced))
        for row in replaced.values():
            self.replaced.setdefault((row.task, task), Counter())[row.split] += 1
        for was in [one.was for one in judged if one.is_kept and one.was]:
            was_aside = self.writer.take_back(was.example.id) is not None
            self.writer.delete(was)
            self.judge.let_go(was)
            self.counts["restored"] += not was_aside

    def _take_out(self, row: Stored, rule: str, reason: str) -> None:
        bad = refused(Row(row.file, row.line, row.example), rule, reason)
        if row.seq in self.judge.returned:
            self.writer.set_aside([row.example.id], reason)
            self.judge.let_go(row)
        else:
            self.writer.refuse(row.task, [bad], row.split)
            self._put_away(row)
        if row.seq > self.judge.first:  # It came with this ingest, and was counted as accepted.
            self.tasks[row.task] -= 1
            self.counts["held_out"] -= row.split == "held_out"
            self._tell(bad)
        else:
            self.counts["withdrawn"] += 1

    def _put_away(self, row: Stored) -> None:
        if row.seq in self.judge.restored:
            self.writer.supersede([row.example.id])
            self.counts["restored"] -= 1
        else:
            self.writer.delete(row)
            self.judge.let_go(row)

    def _store(self, rows: Sequence[Stored], task: str) -> None:
        self.writer.add(rows)
        self.tasks[task] += len(rows)
        self.counts["held_out"] += sum(row.split == "held_out" for row in rows)

    def _meet_again(self, one: Judged, task: str) -> None:
        """A row that is there already."""
        if one.fate == "to_held_out":
            self.judge.move(one.row.example, self.writer.hold_out(one.row.example.id, task), task)
            self.counts["held_out"] += 1
            self.tasks[task] += 1
        else:
            self.counts["duplicates"] += 1


def _batches(
    ws: Workspace,
    source: Source,
    task: str | None,
    split: Split,
    config: Config,
    notes: list[str],
    how: How,
    *,
    named: bool = True,
    only: Collection[Path] | None = None,
) -> list[_Batch]:
    """One batch a file. `named`: a file's own name may put it on the held-out side (`test.jsonl`)."""
    if source is None:
        skip = lambda file: ws.catalog.took(file) or (only is not None and file not in only)  # noqa: E731
        return _files(ws, ws.inbox, None, split, config, True, notes, how, skip) if named else []
    if isinstance(source, str | Path):
        source = [source]
    items = list(source)
    if all(isinstance(item, str | Path | Place) for item in items):
        places = [item if isinstance(item, Place) else Path(str(item)) for item in items]
        return [b for place in places for b in _files(ws, place, task, split, config, named, notes, how)]
    if not task:
        raise UsageError("rows from Python need task='...', the name of the task they belong to")
    task = one_line(task)
    return [_Batch(_PYTHON, task, split, partial(fit, _convert(items, config), task=task), None)]


def _convert(items: Sequence[Any], config: Config) -> Iterable[Row | Bad]:
    shape = PLAIN if items and is_plain_text(items[0]) else None
    to_example = partial(convert, system=config.default_system, shape=shape, pairs=config.stage == "dpo")
    for number, item in enumerate(items, start=1):
        try:
            yield Row(_PYTHON, number, to_example(item))
        except RowError as error:
            yield Bad(_PYTHON, number, error.rule, error.reason, _shown(item))


def _shown(item: object) -> str:
    try:
        return printable(repr(item)[:RAW_LENGTH])
    except (RecursionError, ValueError):  # Nested too deep, or a number with too many digits.
        return ""


def _files(
    ws: Workspace,
    source: Path | Place,
    task: str | None,
    split: Split,
    config: Config,
    by_name: bool,
    notes: list[str],
    how: How,
    skip: Callable[[Path], bool] = lambda _: False,
) -> list[_Batch]:
    batches = []
    for file in data_files(source, how, lambda name, text: notes.append(printable(f"{name}: {text}"))):
        if skip(file.path):
            continue
        side: Split = file.side if by_name and file.side == "held_out" else split
        name = one_line(task or file.task())
        digest = None if file.name == STDIN else _digest(file.path)
        job = ahead.Job(file.path, file.name, file.layout, name, config, ws.root)
        batches.append(_Batch(file.name, name, side, partial(_parts, job, notes), digest))
    return batches


def _parts(job: ahead.Job, notes: list[str], checks: Checks) -> Generator[list[Fit | Bad]]:
    def note(text: str) -> None:
        notes.append(printable(f"{job.name}: {text}"))

    if not named_in_utf8(job.path):
        # A name is kept with every row, and whoever reads it must find the file by it.
        yield [Bad(job.name, 0, "file-name", BAD_NAME, "")]
    elif _size(job.path) >= ahead.LARGE:
        yield from ahead.parts(job, note)
    else:
        yield from fit(ahead.rows(job, note), checks, job.task)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0  # Reading it says why.


def _digest(file: Path) -> str | None:
    try:
        return sha256(file)
    except OSError:
        return None
