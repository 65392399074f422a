"""From a file to the catalog: read, check, deduplicate, split, store, all in one transaction."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treering import registry
from treering.data.catalog import Stored, Writer, choose_held_out
from treering.data.check import check
from treering.data.dedup import Split, fate
from treering.data.example import Example
from treering.data.fetch import STDIN
from treering.data.read import Bad, Row, RowError, convert, named_in_utf8, read
from treering.data.sources import DataFile, How, Place, data_files
from treering.errors import UsageError
from treering.files import printable, sha256
from treering.progress import bar

if TYPE_CHECKING:
    from treering.config import Config
    from treering.workspace import Workspace

TOLD = 100
"""Quarantined rows that are told one by one; the catalog has all."""

BAD_NAME = "its name, or that of a folder it lies in, is not UTF-8; rename it"

_PYTHON = "<python>"
"""Stands for the file of rows that came from Python."""

Rows = Iterable[Mapping[str, object]]
Source = str | Path | Sequence[str | Path] | Rows | None


@dataclass(frozen=True)
class Ingested:
    """What became of the rows: `rows` = `accepted` + `duplicates` + `quarantined`. `tasks`: accepted rows by task.

    `reasons`: quarantined rows by rule. `refused`: the first 100 of them, each with `file`, `line`, `rule`, `reason`.
    `notices`: what is to be known of files that could be read.
    """

    rows: int
    accepted: int
    duplicates: int
    quarantined: int
    held_out: int
    tasks: dict[str, int]
    reasons: dict[str, int]
    refused: list[dict[str, Any]]
    notices: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Batch:
    """The rows of one file (or of one call from Python), all of one task and one side. `digest` is the file's."""

    name: str
    task: str
    split: Split
    rows: Callable[[], Iterable[Row | Bad]]
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
        return Ingested(0, 0, 0, 0, 0, {}, {}, [], notes)
    count_tokens = _counter(config)
    total = {"rows": 0, "duplicates": 0, "quarantined": 0, "held_out": 0}
    tasks: dict[str, int] = {}
    reasons: dict[str, int] = {}
    told: list[dict[str, Any]] = []
    with ws.catalog.writing() as writer, bar("ingesting files", len(batches), quiet) as advance:
        versions = registry.readable(ws)
        trained = {id for version in versions for id in version.rows}
        judged = {id for version in versions for id in registry.measured(version)}
        incoming: dict[str, Stored] = {}
        # Held-out files first, so that a row in both is held out.
        for batch in sorted(batches, key=lambda b: b.split != "held_out"):
            bad = []
            for found in batch.rows():
                total["rows"] += 1
                refused = found if isinstance(found, Bad) else _refuse(found, count_tokens, config.cutoff_len)
                if refused is None and isinstance(found, Row):
                    refused = _take(writer, batch, found, trained, incoming, total, tasks, source is not None)
                if refused is not None:
                    bad.append(refused)
                    reasons[refused.rule] = reasons.get(refused.rule, 0) + 1
            total["quarantined"] += len(bad)
            told += [
                {"file": row.file, "line": row.line, "rule": row.rule, "reason": row.reason}
                for row in bad[: TOLD - len(told)]
            ]
            writer.quarantine(batch.task, None if batch.name in (_PYTHON, STDIN) else batch.name, bad)
            if batch.digest is not None:
                writer.remember_file(batch.name, batch.digest)
            advance()
        for name in dict.fromkeys(row.task for row in incoming.values()):
            new = [row for row in incoming.values() if row.task == name]
            rows = _split(writer, name, new, config.val_size, trained, judged)
            writer.add(rows)
            tasks[name] = tasks.get(name, 0) + len(rows)
            total["held_out"] += sum(row.split == "held_out" for row in rows)
    return Ingested(**total, accepted=sum(tasks.values()), tasks=tasks, reasons=reasons, refused=told, notices=notes)


def _take(
    writer: Writer,
    batch: _Batch,
    row: Row,
    trained: set[str],
    incoming: dict[str, Stored],
    total: dict[str, int],
    tasks: dict[str, int],
    named: bool,
) -> Bad | None:
    """Put a good row where it belongs; returns it as refused if it cannot be held out any more.

    `named`: the user named its file, which takes back rows that a hold set aside.
    """
    id = row.example.id
    stored = writer.splits([id])
    if id in incoming:
        stored = {id: incoming[id].split}
    what = fate(id, batch.split, stored, trained)
    if what == "aside" and named:
        total["held_out"] += writer.take_back(id) == "held_out"
        tasks[batch.task] = tasks.get(batch.task, 0) + 1
    elif what in ("duplicate", "aside"):
        total["duplicates"] += 1
    elif what == "already_trained":
        reason = "it is to be held out, but a version has already learned it; leave it out of the held-out file"
        return Bad(row.file, row.line, "held-out-was-trained", reason, row.example.answer[:200])
    elif what == "to_held_out":
        writer.hold_out(id, batch.task)
        tasks[batch.task] = tasks.get(batch.task, 0) + 1
        total["held_out"] += 1
    else:
        given = batch.split == "held_out"
        incoming[id] = Stored(row.example, batch.task, batch.split, given, row.file, row.line)
    return None


def _split(
    writer: Writer, task: str, rows: list[Stored], share: float, trained: set[str], judged: set[str]
) -> list[Stored]:
    """Hold out a share of the training rows of a task that has no held-out rows of the user's own.

    What a version has learned, or was judged by, keeps its side: a catalog that was lost and made again cannot know it.
    """
    rows = [replace(row, split="held_out") if row.example.id in judged else row for row in rows]
    if any(row.given for row in rows) or writer.has_given_held_out(task):
        return rows
    free = [row.example.id for row in rows if row.split == "train" and row.example.id not in trained]
    stored, held_out = writer.sizes(task)
    held_out += sum(row.split == "held_out" for row in rows)
    chosen = choose_held_out(free, share, stored + len(rows) - len(free), held_out)
    return [replace(row, split="held_out") if row.example.id in chosen else row for row in rows]


def _refuse(row: Row, count_tokens: Callable[[Example], int], cutoff_len: int) -> Bad | None:
    found = check(row.example, count_tokens, cutoff_len)
    if found is None:
        return None
    return Bad(row.file, row.line, *found, raw=" | ".join(m.content for m in row.example.messages)[:2000])


def _counter(config: Config) -> Callable[[Example], int]:
    from treering.model import load_tokenizer, resolve, token_counter

    folder = resolve(config.model_name_or_path, config.trust_remote_code)
    return token_counter(load_tokenizer(folder, config.trust_remote_code))


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
        return _files(ws.inbox, None, split, config, True, notes, how, skip) if named else []
    if isinstance(source, str | Path):
        source = [source]
    items = list(source)
    if all(isinstance(item, str | Path | Place) for item in items):
        places = [item if isinstance(item, Place) else Path(str(item)) for item in items]
        return [b for place in places for b in _files(place, task, split, config, named, notes, how)]
    if task is None:
        raise UsageError("rows from Python need task='...', the name of the task they belong to")
    return [_Batch(_PYTHON, task, split, lambda: _convert(items, config), None)]


def _convert(items: Sequence[Any], config: Config) -> Iterable[Row | Bad]:
    for number, item in enumerate(items, start=1):
        try:
            yield Row(_PYTHON, number, convert(item, system=config.default_system))
        except RowError as error:
            yield Bad(_PYTHON, number, error.rule, error.reason, repr(item)[:2000])


def _files(
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
    for file in data_files(source, how, lambda name, text: notes.append(f"{name}: {text}")):
        if skip(file.path):
            continue
        side: Split = file.side if by_name and file.side == "held_out" else split
        name = printable(task or file.task())
        digest = None if file.name == STDIN else _digest(file.path)
        batches.append(_Batch(file.name, name, side, partial(_rows, file, config, notes), digest))
    return batches


def _rows(file: DataFile, config: Config, notes: list[str]) -> Iterable[Row | Bad]:
    if named_in_utf8(file.path):
        note = lambda text: notes.append(f"{file.name}: {text}")  # noqa: E731
        return read(file.path, system=config.default_system, name=file.name, layout=file.layout, note=note)
    # A name is kept with every row, and whoever reads it must find the file by it.
    return [Bad(file.name, 0, "file-name", BAD_NAME, "")]


def _digest(file: Path) -> str | None:
    try:
        return sha256(file)
    except OSError:
        return None
